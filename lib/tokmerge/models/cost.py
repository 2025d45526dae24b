"""Inference cost: multiply-accumulates (MACs) per image, counted from the real token counts.

What the literature calls GFLOPs of a ViT are giga-MACs (DeiT-S: 4.6); torch's flop counter reports two per MAC.
Matrix products are counted wherever they are, elementwise work (norms, softmax, activations, additions) is not,
except for merging's own normalisation and averaging, which a fair comparison must not hide.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tokmerge.merging.matching import Policy, averages, compares, needed_by


def linear_macs(module: nn.Module) -> int:
    """MACs per token of every linear layer inside ``module``.

    Raises:
        TypeError: it holds a matrix in another form (quantised, convolution, a bare parameter), which is not counted.

    >>> linear_macs(nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)))
    64
    """
    total = 0
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear):
            total += part.in_features * part.out_features
            continue
        own = [*part.parameters(recurse=False), *part.buffers(recurse=False)]
        if any(tensor.ndim > 1 for tensor in own) or type(part).__module__.startswith("torch.ao."):
            raise TypeError(
                f"the cost of {name or 'the module'}, a {type(part).__name__}, is not known: only that of Linear"
            )
    return total


def module_macs(module: nn.Module, *shape: int) -> int:
    """MACs of one forward of ``module`` on an input of that shape, counted by torch on the meta device."""
    # Without the hooks, which are the user's: nothing runs here that anybody waits for.
    hooks = {
        id(value): type(value)() for part in module.modules() for name, value in vars(part).items() if "hooks" in name
    }
    ghost = copy.deepcopy(module, hooks).to("meta").float().eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ghost(torch.empty(shape, device="meta"))
    return counter.get_total_flops() // 2


@dataclass(frozen=True)
class ViTCost:
    """What a vision transformer costs, block by block."""

    embed: int  #: MACs of the patch embedding, per image
    attn_linear: tuple[int, ...]  #: MACs per token of each block's attention projections
    mlp_linear: tuple[int, ...]  #: MACs per token of each block's MLP
    attn_dim: int  #: heads x head_dim
    head_dim: int  #: width of the matching feature
    embed_dim: int  #: width D of the tokens
    protected: int  #: leading tokens that never merge
    pool_per_token: int = 0  #: MACs per token of the pooling (attention pooling only)
    head: int = 0  #: MACs per image of what follows the tokens (pooling's fixed part, classifier)

    @classmethod
    def of_layers(
        cls, embedding: nn.Module, image_shape: tuple[int, ...], layers: Sequence[tuple[Any, nn.Module]], heads: int,
        **rest: int,
    ) -> "ViTCost":  # fmt: skip
        """Read the cost off an embedding of (C, H, W) images and every layer's attention and MLP."""
        head_dim = layers[0][0].head_dim
        return cls(
            embed=module_macs(embedding, 1, *image_shape),
            attn_linear=tuple(linear_macs(attention) for attention, _ in layers),
            mlp_linear=tuple(linear_macs(mlp) for _, mlp in layers),
            attn_dim=heads * head_dim,
            head_dim=head_dim,
            **rest,
        )

    def blocks(self, tokens: Tensor, policy: Policy | None = None) -> Tensor:
        """MACs of each block, merging overhead included: (B, L + 1) tokens entering each and after the last -> (B, L).

        The policy is what merged them; None for no merging.
        """
        before, after = tokens[:, :-1], tokens[:, 1:]
        attention = before * tokens.new_tensor(self.attn_linear) + 2 * before * before * self.attn_dim
        macs = attention + after * tokens.new_tensor(self.mlp_linear)
        if policy is None:
            return macs
        active = torch.tensor([policy.active(layer) for layer in range(macs.shape[1])], device=macs.device)
        # The metric's normalisation, for keys after their mean over heads; the weighted sum and division of tokens.
        width, mean = (self.embed_dim, 0) if policy.feature == "tokens" else (self.head_dim, self.attn_dim)
        metric = before * (2 * width + mean) if compares(policy) else 0
        if "confidence" in needed_by(policy):
            # The head, as often as it is asked.
            asks = torch.arange(macs.shape[1], device=macs.device) >= getattr(policy, "first", 0)
            metric = metric + asks * ((before - self.protected) * self.pool_per_token + self.head)
        average = (before != after) * (before + after) * self.embed_dim if averages(policy) else 0
        return macs + active * (policy.match_macs(before - self.protected, width) + metric + average)

    def pooling(self, tokens: Tensor) -> Tensor:
        """MACs of what follows the blocks: (B, L + 1) tokens -> (B,) int64."""
        return (tokens[:, -1] - self.protected) * self.pool_per_token + self.head

    def total(self, tokens: Tensor, policy: Policy | None = None) -> Tensor:
        """MACs of each image, patch embedding and head included: (B, L + 1) -> (B,) int64."""
        return self.embed + self.blocks(tokens, policy).sum(1) + self.pooling(tokens)


@dataclass(frozen=True)
class LanguageCost:
    """What the language model costs."""

    linear: int  #: MACs per token of one layer
    attn_dim: int  #: heads x head_dim
    head: int  #: MACs of one token's scores over the vocabulary
    depth: int  #: number of layers, all alike

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

        (B,) tokens in the first layers and (B,) left in the others, which are ``pruned`` many.
        """
        n = torch.stack([prompt, left])
        first, last = n * self.linear + 2 * n * n * self.attn_dim
        return (self.depth - pruned) * first + pruned * last + self.head

    def decode(self, prompt: Tensor, left: Tensor, pruned: int, generated: Tensor) -> Tensor:
        """MACs of the passes after that: one for every generated token but the last. Arguments as in `prefill`."""
        passes = (generated - 1).clamp(min=0)
        behind = (self.depth - pruned) * prompt + pruned * left
        context = passes * behind + self.depth * (passes * (passes + 1) // 2)
        return passes * (self.depth * self.linear + self.head) + 2 * context * self.attn_dim
