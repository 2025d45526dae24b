"""Inference cost: multiply-accumulates (MACs) per image, counted from the real token counts.

What the literature calls GFLOPs of a ViT are giga-MACs (DeiT-S: 4.6); torch's flop counter reports two per MAC.
Matrix products are counted wherever they are, elementwise work (norms, softmax, activations, additions) is not,
except for merging's own normalisation and averaging, which a fair comparison must not hide.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tokmerge.policies import Policy


def linear_macs(module: nn.Module) -> int:
    """MACs per token of every linear layer inside ``module``.

    >>> linear_macs(nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)))
    64
    """
    return sum(m.in_features * m.out_features for m in module.modules() if isinstance(m, nn.Linear))


def module_macs(module: nn.Module, *shape: int) -> int:
    """MACs of one forward of ``module`` on an input of that shape, counted by torch on the meta device."""
    ghost = copy.deepcopy(module).to("meta").float().eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ghost(torch.empty(shape, device="meta"))
    return counter.get_total_flops() // 2


@dataclass(frozen=True)
class ViTCost:
    """What a vision transformer costs, block by block.

    Attributes:
        embed: MACs of the patch embedding, per image.
        attn_linear: MACs per token of each block's attention projections.
        mlp_linear: MACs per token of each block's MLP.
        attn_dim: heads x head_dim.
        head_dim: width of the matching feature.
        embed_dim: width D of the tokens.
        pool_per_token: MACs per token of the pooling (attention pooling only).
        head: MACs per image of what follows the tokens (pooling's fixed part, classifier).
        protected: leading tokens that never merge.
    """

    embed: int
    attn_linear: tuple[int, ...]
    mlp_linear: tuple[int, ...]
    attn_dim: int
    head_dim: int
    embed_dim: int
    pool_per_token: int
    head: int
    protected: int

    @classmethod
    def of(cls, model: VisionTransformer, image_shape: tuple[int, ...]) -> "ViTCost":
        """Read the cost off a timm model for (C, H, W) images."""
        blocks: Any = model.blocks
        attn_dim, pool_per_token = blocks[0].attn.attn_dim, 0
        head = sum(linear_macs(m) for m in (model.head, getattr(model, "head_dist", None)) if m is not None)
        pool: Any = model.attn_pool
        if pool is not None:
            pool_per_token = linear_macs(pool.kv) + 2 * pool.latent_len * attn_dim
            head += (linear_macs(pool) - linear_macs(pool.kv)) * pool.latent_len
        return cls(
            embed=module_macs(model.patch_embed, 1, *image_shape),
            attn_linear=tuple(linear_macs(block.attn) for block in blocks),
            mlp_linear=tuple(linear_macs(block.mlp) for block in blocks),
            attn_dim=attn_dim,
            head_dim=blocks[0].attn.head_dim,
            embed_dim=model.embed_dim,
            pool_per_token=pool_per_token,
            head=head,
            protected=model.num_prefix_tokens,
        )

    def blocks(self, tokens: Tensor, policy: Policy | None = None) -> Tensor:
        """MACs of each block.

        Args:
            tokens: (B, L + 1) int64, tokens entering each block and after the last.
            policy: what merged them; None for no merging.

        Returns:
            (B, L) int64, merging overhead included.
        """
        before, after = tokens[:, :-1], tokens[:, 1:]
        linear = tokens.new_tensor(self.attn_linear)
        mlp = tokens.new_tensor(self.mlp_linear)
        macs = before * linear + 2 * before * before * self.attn_dim + after * mlp
        if policy is None:
            return macs
        active = torch.tensor([policy.active(layer) for layer in range(macs.shape[1])], device=macs.device)
        # The metric's normalisation, for keys after their mean over heads; the weighted sum and division of tokens.
        whole = policy.feature == "tokens"
        width = self.embed_dim if whole else self.head_dim
        metric = before * (2 * width if whole else 2 * width + self.attn_dim)
        average = (before != after) * (before + after) * self.embed_dim
        match = policy.match_macs(before - self.protected, width)
        return macs + active * (match + metric + average)

    def pooling(self, tokens: Tensor) -> Tensor:
        """MACs of what follows the blocks: (B, L + 1) tokens -> (B,) int64."""
        return (tokens[:, -1] - self.protected) * self.pool_per_token + self.head

    def total(self, tokens: Tensor, policy: Policy | None = None) -> Tensor:
        """MACs of each image, patch embedding and head included: (B, L + 1) -> (B,) int64."""
        return self.embed + self.blocks(tokens, policy).sum(1) + self.pooling(tokens)


@dataclass(frozen=True)
class LanguageCost:
    """What the language model costs.

    Attributes:
        linear: MACs per token of one layer.
        attn_dim: heads x head_dim.
        head: MACs of one token's scores over the vocabulary.
        depth: number of layers, all alike.
    """

    linear: int
    attn_dim: int
    head: int
    depth: int

    @classmethod
    def of(cls, model: Any) -> "LanguageCost":
        """Read the cost off a transformers LlavaForConditionalGeneration with a dense language model."""
        layers = model.model.language_model.layers
        heads = model.config.text_config.num_attention_heads
        return cls(
            linear_macs(layers[0]), heads * layers[0].self_attn.head_dim, linear_macs(model.lm_head), len(layers)
        )

    def prefill(self, prompt: Tensor, left: Tensor, pruned: int) -> Tensor:
        """MACs of reading a prompt, with the scores that the first answer token needs.

        Args:
            prompt: (B,) tokens in the first layers.
            left: (B,) tokens in the others.
            pruned: how many the others are.
        """

        def layer(n: Tensor) -> Tensor:
            return n * self.linear + 2 * n * n * self.attn_dim

        return (self.depth - pruned) * layer(prompt) + pruned * layer(left) + self.head

    def decode(self, prompt: Tensor, left: Tensor, pruned: int, generated: Tensor) -> Tensor:
        """MACs of the passes after that: one for every generated token but the last. Arguments as in `prefill`."""
        passes = (generated - 1).clamp(min=0)
        behind = (self.depth - pruned) * prompt + pruned * left
        context = passes * behind + self.depth * (passes * (passes + 1) // 2)
        return passes * (self.depth * self.linear + self.head) + 2 * context * self.attn_dim
