"""Merging in timm's VisionTransformer and Eva (EVA, EVA-02, DINOv3, RoPE-ViT): all that touches their internals."""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import Eva
from torch import Tensor, nn
from torch.nn import functional as F

from tokmerge.merging.matching import Policy
from tokmerge.merging.packed import Packed, attend
from tokmerge.models.classifier import MergedClassifier
from tokmerge.models.cost import ViTCost, linear_macs
from tokmerge.models.rotary import Rotary


class MergedViT(MergedClassifier):
    """A timm VisionTransformer that merges tokens as a policy says. Made by `patch`; attributes as of its base."""

    def __init__(self, model: Any, policy: Policy | None, precision: str, split_layer: int | None) -> None:
        self.has_class_token, self.classifies = model.cls_token is not None, model.num_classes > 1
        super().__init__(model, policy, precision, split_layer, len(model.blocks), model.num_prefix_tokens)
        self.embed_dim, self.n_patches = model.embed_dim, model.patch_embed.num_patches

    @property
    def blocks(self) -> Any:
        return self.model.blocks

    def passed_over(self) -> list[nn.Module]:
        blocks = self.blocks
        attentions = [block.attn for block in blocks]
        return [*super().passed_over(), blocks, *blocks, *attentions, *(attn.attn_drop for attn in attentions)]

    def embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        model = self.model
        return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images)))), self.grid(images)

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of the patches of (B, C, H, W) images."""
        embed = self.model.patch_embed
        return embed.dynamic_feat_size(images.shape[2:]) if self.model.dynamic_img_size else embed.grid_size

    def last_norm(self, x: Tensor) -> Tensor:
        return self.model.norm(x)

    @property
    def head(self) -> tuple[Any, ...]:
        return self.model.global_pool, self.model.head, self.model.attn_pool

    @property
    def reads_one_token(self) -> bool:
        return self.model.global_pool == "token"

    def forward_head(self, packed: Packed) -> Tensor:
        model, layout, first = self.model, packed.layout, self.protected
        if model.global_pool == "token":
            return model.forward_head(self.leading(packed, first))
        # An Eva's attention pooling reads all tokens.
        everything = isinstance(model, Eva) and model.global_pool == "map"
        skip = 0 if everything or getattr(model, "pool_include_prefix", False) else first
        if model.global_pool == "map":
            sizes = layout.pad(packed.full_sizes)[:, skip:]
            x = model.attn_pool(layout.pad(packed.x)[:, skip:], attn_mask=sizes.log().to(packed.x.dtype)[:, None, None])
        elif model.global_pool == "avg":
            x = self.average(packed, skip)
        else:
            x = layout.pad(packed.x).masked_fill(~layout.valid[..., None], float("-inf"))[:, skip:]
            x = x.amax(1) if len(x) else packed.x
            x = x if model.global_pool == "max" else 0.5 * (x + self.average(packed, skip))
        return model.head(model.head_drop(model.fc_norm(x)))

    def measure_cost(self, image_shape: tuple[int, ...]) -> ViTCost:
        model, layers = self.model, [(block.attn, block.mlp) for block in self.blocks]
        head = linear_macs(model.head) + linear_macs(getattr(model, "head_dist", nn.Identity()))
        pool, pool_per_token = model.attn_pool, 0
        if pool is not None:
            pool_per_token = linear_macs(pool.kv) + 2 * pool.latent_len * pool.num_heads * pool.head_dim
            head += sum(linear_macs(part) for part in pool.children() if part is not pool.kv) * pool.latent_len
        return ViTCost.of_layers(
            model.patch_embed, image_shape, layers, layers[0][0].num_heads, embed_dim=model.embed_dim,
            protected=self.protected, pool_per_token=pool_per_token, head=head,
        )  # fmt: skip

    def check_images(self, images: Tensor) -> None:
        model = self.model
        if images.shape[1] != model.in_chans:
            raise ValueError(f"images have {images.shape[1]} channels, the model takes {model.in_chans}")
        wanted = tuple(model.patch_embed.img_size)
        if not model.dynamic_img_size and tuple(images.shape[2:]) != wanted:
            raise ValueError(f"images are {tuple(images.shape[2:])} pixels, the model takes {wanted}: resize them")

    def attention(self, layer: int, block: Any, tokens: Packed) -> tuple[Tensor, Tensor]:
        """timm's Attention on packed rows."""
        attn, x = block.attn, block.norm1(tokens.x)
        qkv = attn.qkv(x).view(-1, 3, attn.num_heads, attn.head_dim)
        if not (isinstance(attn.q_norm, nn.Identity) and isinstance(attn.k_norm, nn.Identity)):
            q, k, v = qkv.unbind(1)
            qkv = torch.stack([attn.q_norm(q), attn.k_norm(k), v], dim=1)
        return block.drop_path1(block.ls1(self.project(attn, x, qkv, tokens))), qkv

    def project(self, attn: Any, x: Tensor, qkv: Tensor, tokens: Packed) -> Tensor:
        """What follows queries, keys and values in an attention module."""
        out = attn.norm(attend(qkv, tokens.layout, tokens.sizes))
        if attn.gate is not None:
            out = out * attn.gate(x).sigmoid()
        return attn.proj_drop(attn.proj(out))

    def mlp(self, block: Any, x: Tensor) -> Tensor:
        return block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


class MergedEva(MergedViT):
    """A timm Eva that merges tokens; a merged token's rotary position is the mean over its patches."""

    def __init__(self, model: Eva, policy: Policy | None, precision: str, split_layer: int | None) -> None:
        self.wants_places = model.rope is not None
        super().__init__(model, policy, precision, split_layer)
        self._rotary: list[Rotary] = []

    def embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        model, grid = self.model, self.grid(images)
        x, table = model._pos_embed(model.patch_embed(images))
        if table is not None:
            # A table for every block, or one for all; with values for every head, or for all of them.
            parts = table.transpose(1, 2) if model.rope_mixed else table[None, :, None]
            self._rotary = [Rotary.of(part.chunk(2, -1)[0], part.chunk(2, -1)[1], grid) for part in parts]
        return model.norm_pre(x), grid

    def attention(self, layer: int, block: Any, tokens: Packed) -> tuple[Tensor, Tensor]:
        """timm's EvaAttention and AttentionRope on packed rows."""
        attn, x = block.attn, block.norm1(tokens.x)
        parts: Sequence[Tensor]
        if attn.qkv is None:
            parts = [project(x).view(len(x), -1, attn.head_dim) for project in (attn.q_proj, attn.k_proj, attn.v_proj)]
        else:
            bias = attn.qkv.bias
            if getattr(attn, "q_bias", None) is not None:
                bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
            parts = F.linear(x, attn.qkv.weight, bias).view(len(x), 3, attn.num_heads, attn.head_dim).unbind(1)
        q, k, v = attn.q_norm(parts[0]), attn.k_norm(parts[1]), parts[2]
        if self._rotary:
            rotary = self._rotary[layer if self.model.rope_mixed else 0]
            embedding = torch.cat(rotary(tokens, self.protected), dim=-1)
            q, k = (apply_rot_embed_cat(part, embedding, half=attn.rotate_half).type_as(v) for part in (q, k))
        k, v = (part.repeat_interleave(attn.num_heads // part.shape[1], 1) for part in (k, v))
        qkv = torch.stack([q, k, v], dim=1)
        out = self.project(attn, x, qkv, tokens)
        return block.drop_path1(out if block.gamma_1 is None else block.gamma_1 * out), qkv

    def mlp(self, block: Any, x: Tensor) -> Tensor:
        out = block.mlp(block.norm2(x))
        return block.drop_path2(out if block.gamma_2 is None else block.gamma_2 * out)
