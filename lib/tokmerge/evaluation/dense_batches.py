"""What the engine's time is measured against: dense batches of equal counts, on a timm VisionTransformer.

The *limit* runs plain blocks at given counts and chooses nothing. *ToMe*'s merging (Bolya et al., 2210.09461, section
3) is written as its paper has it: every image loses the same r tokens at every block, so that a batch stays one tensor.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def dense_limit(model: Any, counts: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """Images to scores with so many tokens entering each block, and after the last: those beyond are cut off."""

    def run(images: Tensor) -> Tensor:
        x = _embed(model, images)
        for block, left in zip(model.blocks, counts[1:], strict=True):
            x = x + block.drop_path1(block.ls1(block.attn(block.norm1(x))))
            x = x[:, :left]
            x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return model.forward_head(model.norm(x))

    return run


def dense_tome(model: Any, r: int) -> Callable[[Tensor], Tensor]:
    """Images to scores with r tokens merged at every block, and attention in proportion to their sizes."""

    def run(images: Tensor) -> Tensor:
        x, sizes = _embed(model, images), None
        for block in model.blocks:
            out, keys = _attention(block.attn, block.norm1(x), sizes)
            x, sizes = _merge(x + block.drop_path1(block.ls1(out)), sizes, keys.mean(1), r, model.num_prefix_tokens)
            x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return model.forward_head(model.norm(x))

    return run


def _embed(model: Any, images: Tensor) -> Tensor:
    return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))


def _attention(attn: Any, x: Tensor, sizes: Tensor | None) -> tuple[Tensor, Tensor]:
    """What an attention module adds, (B, N, D), and its keys, (B, H, N, d)."""
    q, k, v = attn.qkv(x).unflatten(2, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)
    q, k = attn.q_norm(q), attn.k_norm(k)
    bias = None if sizes is None else sizes.log()[:, None, None, :, 0]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return attn.proj_drop(attn.proj(attn.norm(out.transpose(1, 2).flatten(2)))), k


def _merge(x: Tensor, sizes: Tensor | None, metric: Tensor, r: int, first: int) -> tuple[Tensor, Tensor]:
    """(B, N, D) tokens and (B, N, 1) sizes after the r most similar pairs of unprotected tokens have merged."""
    sizes = torch.ones_like(x[..., :1]) if sizes is None else sizes
    metric = F.normalize(metric[:, first:], dim=-1)
    best, partner = (metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)).max(-1)
    order = best.argsort(dim=-1, descending=True)[..., None]
    go, stay = order[:, :r], order[:, r:].sort(dim=1).values
    partner = partner[..., None].gather(1, go)
    total = torch.cat([x * sizes, sizes], dim=-1)
    a, b = total[:, first::2], total[:, first + 1 :: 2]
    width = total.shape[2]
    b = b.scatter_add(1, partner.expand(-1, -1, width), a.gather(1, go.expand(-1, -1, width)))
    total = torch.cat([total[:, :first], a.gather(1, stay.expand(-1, -1, width)), b], dim=1)
    return total[..., :-1] / total[..., -1:], total[..., -1:]
