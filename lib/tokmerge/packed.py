"""Packed batches: images with different token counts, one after the other in one (T, D) tensor.

Adaptive merging leaves every image with its own N. Linear layers and norms run on the T = sum(N) rows
as they are, without padding; only attention and matching need to know which row belongs to which image.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# Below this many values per image (tokens x attn_dim), a few padded attention calls beat a loop of exact
# per-image calls on a CPU: those are then too short to pay for themselves.
PADDED_ATTENTION_MAX_VALUES = 32_768
# Images that share a padded attention call on a CPU.
BLOCK_IMAGES = 8
# Up to this many tokens two batched products beat the fused kernel on a CPU: its blocks are then mostly empty.
PLAIN_PRODUCTS_MAX_TOKENS = 144


class Blocks(NamedTuple):
    """A ragged batch as a few padded blocks, one after the other in P rows.

    Attributes:
        shapes: images and padded token count of each block.
        rows: (P,) packed row behind each padded one (the image's last where there is none).
        valid: (P,) bool, which padded rows hold a token.
        positions: (T,) padded row of each packed one.
    """

    shapes: list[tuple[int, int]]
    rows: Tensor
    valid: Tensor
    positions: Tensor


@dataclass(frozen=True)
class Layout:
    """Which rows belong to which image.

    Attributes:
        lengths: (B,) int64, tokens of each image, on the tokens' device.
    """

    lengths: Tensor

    @cached_property
    def counts(self) -> list[int]:
        """Lengths as Python ints (one device synchronisation)."""
        return self.lengths.tolist()

    @cached_property
    def longest(self) -> int:
        """The largest token count."""
        return max(self.counts)

    @cached_property
    def uniform(self) -> bool:
        """All images have the same token count: padding is a reshape."""
        return min(self.counts) == self.longest

    @cached_property
    def offsets(self) -> Tensor:
        """(B,) first row of each image."""
        return self.lengths.cumsum(0) - self.lengths

    @cached_property
    def image(self) -> Tensor:
        """(T,) image that each row belongs to."""
        return torch.arange(len(self.lengths), device=self.lengths.device).repeat_interleave(
            self.lengths, output_size=sum(self.counts)
        )

    @cached_property
    def valid(self) -> Tensor:
        """(B, longest) bool: which padded positions hold a token."""
        return torch.arange(self.longest, device=self.lengths.device) < self.lengths[:, None]

    @cached_property
    def _rows(self) -> Tensor:
        """(B * longest,) packed row behind each padded position (any row where there is none)."""
        positions = torch.arange(self.longest, device=self.lengths.device) + self.offsets[:, None]
        return positions.clamp_(max=sum(self.counts) - 1).flatten()

    @cached_property
    def blocks(self) -> "Blocks":
        """The images sorted by length and padded in groups of `BLOCK_IMAGES`: little padding, few calls."""
        device = self.lengths.device
        order = sorted(range(len(self.counts)), key=self.counts.__getitem__)
        groups = [order[i : i + BLOCK_IMAGES] for i in range(0, len(order), BLOCK_IMAGES)]
        shapes = [(len(group), self.counts[group[-1]]) for group in groups]
        image = torch.tensor(order, device=device)
        widths = torch.tensor([tokens for images, tokens in shapes for _ in range(images)], device=device)
        starts = widths.cumsum(0) - widths
        total = sum(images * tokens for images, tokens in shapes)
        slot = torch.arange(len(order), device=device).repeat_interleave(widths, output_size=total)
        within = torch.arange(total, device=device) - starts[slot]
        last = (self.lengths[image] - 1)[slot]
        rows = self.offsets[image][slot] + within.minimum(last)
        shift = torch.empty_like(starts)
        shift[image] = starts - self.offsets[image]
        positions = torch.arange(sum(self.counts), device=device) + shift[self.image]
        return Blocks(shapes, rows, within <= last, positions)

    def pad(self, rows: Tensor) -> Tensor:
        """(T, ...) -> (B, longest, ...); positions where `valid` is False hold arbitrary rows."""
        shape = (len(self.counts), self.longest, *rows.shape[1:])
        return (rows if self.uniform else rows.index_select(0, self._rows)).reshape(shape)


@dataclass(frozen=True)
class Packed:
    """The tokens of a batch.

    Attributes:
        x: (T, D) tokens, image after image.
        layout: which rows belong to which image.
        sizes: (T,) patches each token stands for; None while nothing has merged (all ones).
        source: (B, N) int64: which of its image's tokens each original token is now part of, -1 if it
            was dropped; None unless asked for.
    """

    x: Tensor
    layout: Layout
    sizes: Tensor | None = None
    source: Tensor | None = None

    @property
    def lengths(self) -> Tensor:
        """(B,) tokens of each image."""
        return self.layout.lengths

    def split(self) -> list[Tensor]:
        """One (N, D) tensor per image."""
        return list(self.x.split(self.layout.counts))

    def with_x(self, x: Tensor) -> "Packed":
        """The same tokens with other values."""
        return replace(self, x=x)


def pack(x: Tensor) -> Packed:
    """(B, N, D) tokens of an unmerged batch as a packed one.

    >>> pack(torch.zeros(2, 3, 4)).lengths
    tensor([3, 3])
    """
    batch, tokens, _ = x.shape
    return Packed(x.flatten(0, 1), Layout(torch.full((batch,), tokens, device=x.device)))


def attend(qkv: Tensor, layout: Layout, sizes: Tensor | None) -> Tensor:
    """Proportional attention inside each image: softmax_j(q_i.k_j / sqrt(d) + log s_j) v_j.

    Args:
        qkv: (T, 3, H, d) queries, keys and values.
        layout: which rows belong to which image.
        sizes: (T,) token sizes s; None for all ones.

    Returns:
        (T, H * d), independent of what else is in the batch.
    """
    if qkv.is_cuda and qkv.dtype in (torch.float16, torch.bfloat16) and not (layout.uniform and sizes is None):
        return attend_varlen(qkv, layout, sizes)
    if layout.uniform or qkv.is_cuda or layout.longest * qkv[0, 0].numel() <= PADDED_ATTENTION_MAX_VALUES:
        return attend_padded(qkv, layout, sizes)
    return attend_each(qkv, layout, sizes)


def attend_padded(qkv: Tensor, layout: Layout, sizes: Tensor | None) -> Tensor:
    """`attend` in a few padded calls, images of similar length together; padding keys are masked out exactly."""
    if layout.uniform:
        bias = None if sizes is None else layout.pad(sizes.log().to(qkv.dtype))
        return _attend_block(layout.pad(qkv), bias).flatten(0, 1)
    blocks = layout.blocks
    padded = qkv.index_select(0, blocks.rows)
    bias = qkv.new_zeros(len(blocks.rows)) if sizes is None else sizes.log().to(qkv.dtype).index_select(0, blocks.rows)
    bias = bias.masked_fill_(~blocks.valid, float("-inf"))
    outs, first = [], 0
    for images, tokens in blocks.shapes:
        part = slice(first, first + images * tokens)
        block = padded[part].view(images, tokens, *qkv.shape[1:])
        outs.append(_attend_block(block, bias[part].view(images, tokens)).flatten(0, 1))
        first += images * tokens
    return torch.cat(outs).index_select(0, blocks.positions)


def _attend_block(qkv: Tensor, bias: Tensor | None) -> Tensor:
    """Attention of (B, N, 3, H, d) with a (B, N) bias on the keys: (B, N, H * d)."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    if bias is None:
        out = F.scaled_dot_product_attention(q, k, v)
    elif qkv.is_cuda or qkv.shape[1] > PLAIN_PRODUCTS_MAX_TOKENS:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[:, None, None, :])
    else:
        out = _plain_products(q, k, v, bias[:, None, None, :])
    return out.transpose(1, 2).flatten(2)


def _plain_products(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """scaled_dot_product_attention of (B, H, N, d) with a (B, 1, 1, N) bias, as two batched products."""
    batch, heads, n, d = q.shape
    bias = bias.expand(batch, heads, 1, n).reshape(batch * heads, 1, n)
    scores = torch.baddbmm(bias, q.reshape(-1, n, d), k.reshape(-1, n, d).transpose(1, 2), alpha=d**-0.5)
    return torch.bmm(scores.softmax(-1), v.reshape(-1, n, d)).view(batch, heads, n, d)


def attend_each(qkv: Tensor, layout: Layout, sizes: Tensor | None) -> Tensor:
    """`attend` image by image: no row is copied and none is padded."""
    bias = None if sizes is None else sizes.log().to(qkv.dtype)
    parts, first = [], 0
    for count in layout.counts:
        rows = slice(first, first + count)
        q, k, v = qkv[rows].permute(1, 2, 0, 3).unsqueeze(1)
        mask = None if bias is None else bias[None, None, None, rows]
        parts.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1).flatten(1))
        first += count
    return torch.cat(parts)


def append_size_coordinate(q: Tensor, k: Tensor, v: Tensor, sizes: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Fold the log-size term into the dot product, so that any attention kernel computes it unmasked.

    q' = [q, sqrt(d)], k' = [k, log s] give q'.k' / sqrt(d) = q.k / sqrt(d) + log s. The head is padded
    with zeros to a multiple of 8, as fused kernels want it.

    Args:
        q, k, v: (T, H, d).
        sizes: (T,) token sizes; None for all ones.

    Returns:
        q, k, v of shape (T, H, d') with d' the next multiple of 8 above d; attend with scale d ** -0.5.
    """
    d = q.shape[-1]
    if sizes is None:
        return q, k, v
    width = -(-(d + 1) // 8) * 8
    q, k, v = (F.pad(part, (0, width - d)) for part in (q, k, v))
    q[..., d] = d**0.5
    k[..., d] = sizes.log().to(k.dtype)[:, None]
    return q, k, v


def attend_varlen(qkv: Tensor, layout: Layout, sizes: Tensor | None) -> Tensor:
    """`attend` with the variable-length flash kernel (CUDA, 16-bit): no padding, no mask, no loop."""
    from torch.nn.attention.varlen import varlen_attn

    d = qkv.shape[-1]
    ends = F.pad(layout.lengths.cumsum(0), (1, 0)).to(torch.int32)
    q, k, v = qkv.unbind(1)
    q, k, v = append_size_coordinate(q, k, v, sizes)
    # num_splits=1: the same bits for an image whatever else is in the batch.
    out = varlen_attn(q, k, v, ends, ends, layout.longest, layout.longest, scale=d**-0.5, num_splits=1)
    assert isinstance(out, Tensor)
    return out[..., :d].flatten(1)
