"""Packed batches: images with different token counts, one after the other in one (T, D) tensor.

Adaptive merging leaves every image with its own N. Linear layers and norms run on the T = sum(N) rows
as they are, without padding; only attention and matching need to know which row belongs to which image.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

# Up to this many tokens two batched products are at least as fast as the fused kernel on a CPU.
PLAIN_PRODUCTS_MAX_TOKENS = 256


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
        place: (T, 2) row and column in the patch grid, of a merged token the mean over its patches; None
            where the grid is not known.
    """

    x: Tensor
    layout: Layout
    sizes: Tensor | None = None
    source: Tensor | None = None
    place: Tensor | None = None

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
    if qkv.is_cuda or (layout.uniform and sizes is None):
        return attend_padded(qkv, layout, sizes)
    return attend_each(qkv, layout, sizes)


def attend_padded(qkv: Tensor, layout: Layout, sizes: Tensor | None) -> Tensor:
    """`attend` in one call on the padded batch; padding keys are masked out exactly."""
    q, k, v = layout.pad(qkv).permute(2, 0, 3, 1, 4)
    bias = None if sizes is None else layout.pad(sizes.log().to(qkv.dtype))
    if not layout.uniform:
        bias = q.new_zeros(layout.valid.shape) if bias is None else bias
        bias = bias.masked_fill(~layout.valid, float("-inf"))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=None if bias is None else bias[:, None, None, :])
    out = out.transpose(1, 2).flatten(2)
    return out.flatten(0, 1) if layout.uniform else out[layout.valid]


def attend_each(qkv: Tensor, layout: Layout, sizes: Tensor | None) -> Tensor:
    """`attend` image by image: no row is copied and none is padded."""
    counts, scale = layout.counts, qkv.shape[-1] ** -0.5
    bias = qkv.new_zeros(len(qkv)) if sizes is None else sizes.log().to(qkv.dtype)
    queries, keys, values = (part.split(counts, dim=1) for part in qkv.permute(1, 2, 0, 3))
    outs = []
    for q, k, v, key_bias in zip(queries, keys, values, bias.split(counts), strict=True):
        if len(key_bias) <= PLAIN_PRODUCTS_MAX_TOKENS:
            out = torch.bmm(torch.baddbmm(key_bias, q, k.mT, alpha=scale).softmax(-1), v)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=key_bias[None])
        outs.append(out.transpose(0, 1))
    return torch.cat(outs).flatten(1)


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
