"""Packed batches: images with different token counts, one after the other in one (T, D) tensor.

Adaptive merging leaves every image with its own N. Linear layers and norms run on the T = sum(N) rows
as they are, without padding; only attention and matching need to know which row belongs to which image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def host(values: Tensor) -> Any:
    """A CPU tensor as the numpy array of the same memory, others as they are.

    For small index arithmetic, written in what arrays and tensors share: one image's takes numpy a quarter of the time.
    """
    return values.detach().numpy() if values.device.type == "cpu" else values


@dataclass(frozen=True)
class Layout:
    """Which rows belong to which image."""

    lengths: Tensor  #: (B,) int64, tokens of each image, on the tokens' device

    @cached_property
    def counts(self) -> list[int]:
        """Lengths as Python ints (one device synchronisation)."""
        return self.lengths.tolist()

    @cached_property
    def longest(self) -> int:
        """The largest token count."""
        return max(self.counts, default=1)

    @cached_property
    def uniform(self) -> bool:
        """All images have the same token count: padding is a reshape."""
        return min(self.counts, default=1) == self.longest

    @cached_property
    def offsets(self) -> Tensor:
        """(B,) first row of each image."""
        return self.lengths.cumsum(0) - self.lengths

    @cached_property
    def image(self) -> Tensor:
        """(T,) image that each row belongs to."""
        images = torch.arange(len(self.lengths), device=self.lengths.device)
        return images.repeat_interleave(self.lengths, output_size=sum(self.counts))

    @cached_property
    def position(self) -> Tensor:
        """(T,) place of each row within its image, from 0."""
        return torch.arange(len(self.image), device=self.lengths.device) - self.offsets[self.image]

    @cached_property
    def valid(self) -> Tensor:
        """(B, longest) bool: which padded positions hold a token."""
        return torch.arange(self.longest, device=self.lengths.device) < self.lengths[:, None]

    @cached_property
    def _rows(self) -> Tensor:
        """(B * longest,) packed row behind each padded position; any row where there is none."""
        positions = torch.arange(self.longest, device=self.lengths.device) + self.offsets[:, None]
        return positions.clamp_(max=sum(self.counts) - 1).flatten()

    def rows(self, images: Tensor) -> Tensor:
        """The rows of some images (B',), in that order.

        >>> Layout(torch.tensor([2, 1, 3])).rows(torch.tensor([2, 0]))
        tensor([3, 4, 5, 0, 1])
        """
        lengths = self.lengths[images]
        shift = (self.offsets[images] - (lengths.cumsum(0) - lengths)).repeat_interleave(lengths)
        return torch.arange(len(shift), device=shift.device) + shift

    def pad(self, rows: Tensor) -> Tensor:
        """(T, ...) -> (B, longest, ...); zeros where `valid` is False, so that no image meets another's values."""
        shape = (len(self.counts), self.longest, *rows.shape[1:])
        if self.uniform:
            return rows.reshape(shape)
        padded = rows.index_select(0, self._rows).view(shape)
        padded[~self.valid] = 0
        return padded


@dataclass(frozen=True)
class Packed:
    """The tokens of a batch."""

    x: Tensor  #: (T, D) tokens, image after image
    layout: Layout  #: which rows belong to which image
    sizes: Tensor | None = None  #: (T,) patches each token stands for; None while nothing has merged (all ones)
    #: (B, N) int64: which of its image's tokens each original one is now part of, -1 if dropped; None unless asked for
    source: Tensor | None = None
    #: (T, 2) row and column in the patch grid, of a merged token the mean over its patches; None where not known
    place: Tensor | None = None
    #: (B, N, D) what each original token has beside the value of the one it is part of; None unless asked for
    detail: Tensor | None = None

    @property
    def lengths(self) -> Tensor:
        """(B,) tokens of each image."""
        return self.layout.lengths

    @property
    def full_sizes(self) -> Tensor:
        """(T,) patches each token stands for, ones where nothing has merged."""
        return torch.ones(len(self.x), device=self.x.device) if self.sizes is None else self.sizes

    def split(self) -> list[Tensor]:
        """One (N, D) tensor per image."""
        return list(self.x.split(self.layout.counts))

    def with_x(self, x: Tensor) -> "Packed":
        """The same tokens with other values."""
        return Packed(x, self.layout, self.sizes, self.source, self.place, self.detail)

    def images(self, index: Tensor) -> "Packed":
        """Some images (B',), in that order, each as often as it occurs."""
        rows, source = self.layout.rows(index), None if self.source is None else self.source[index]
        return self._with_rows(rows, Layout(self.lengths[index]), source)

    def keep(self, kept: Tensor) -> "Packed":
        """The tokens where (T,) bool ``kept`` is True; of the others the source map says that they were dropped.

        >>> left = pack(torch.arange(6.0).view(2, 3, 1), source=True).keep(torch.tensor([1, 0, 1, 1, 1, 1]) > 0)
        >>> left.x.flatten().tolist(), left.source.tolist()
        ([0.0, 2.0, 3.0, 4.0, 5.0], [[0, -1, 1], [0, 1, 2]])
        """
        lengths, source = torch.zeros_like(self.lengths).index_add_(0, self.layout.image, kept.long()), self.source
        layout = Layout(lengths)
        if source is not None:
            row = source.clamp(min=0) + self.layout.offsets[:, None]
            place = (kept.long().cumsum(0) - 1)[row] - layout.offsets[:, None]
            source = torch.where((source >= 0) & kept[row], place, -1)
        return self._with_rows(kept, layout, source)

    def drop_leading(self, n: int) -> "Packed":
        """All but the first n tokens of every image; the source map then counts without them.

        >>> left = pack(torch.arange(6.0).view(2, 3, 1)).drop_leading(1)
        >>> left.x.flatten().tolist(), left.lengths.tolist()
        ([1.0, 2.0, 4.0, 5.0], [2, 2])
        """
        if n == 0:
            return self
        kept = torch.ones(len(self.x), dtype=torch.bool, device=self.x.device)
        kept[self.layout.offsets[:, None] + torch.arange(n, device=kept.device)] = False
        source = None if self.source is None else torch.where(self.source < 0, -1, self.source - n)[:, n:]
        return self._with_rows(kept, Layout(self.lengths - n), source)

    def _with_rows(self, rows: Tensor, layout: Layout, source: Tensor | None) -> "Packed":
        sizes, place = (None if part is None else part[rows] for part in (self.sizes, self.place))
        return Packed(self.x[rows], layout, sizes, source, place)

    def to(self, device: torch.device | str) -> "Packed":
        """The same tokens on another device."""
        tensors = (self.sizes, self.source, self.place, self.detail)
        parts = (None if part is None else part.to(device) for part in tensors)
        return Packed(self.x.to(device), Layout(self.lengths.to(device)), *parts)


def pack(x: Tensor, source: bool = False) -> Packed:
    """(B, N, D) tokens of an unmerged batch as a packed one, with a source map or without.

    >>> pack(torch.zeros(2, 3, 4)).lengths
    tensor([3, 3])
    """
    batch, n, _ = x.shape
    each = torch.arange(n, device=x.device).repeat(batch, 1) if source else None
    return Packed(x.flatten(0, 1), Layout(torch.full((batch,), n, device=x.device)), source=each)


def join(parts: Sequence[Packed]) -> Packed:
    """Packed batches one after the other; sizes of one where only others have sizes, source maps where all have one.

    >>> join([pack(torch.zeros(1, 3, 4)), pack(torch.zeros(2, 2, 4))]).lengths
    tensor([3, 2, 2])
    """
    sized = any(part.sizes is not None for part in parts)
    sizes = torch.cat([part.full_sizes for part in parts]) if sized else None
    sources = [part.source for part in parts if part.source is not None]
    source = torch.cat(sources) if len(sources) == len(parts) else None
    lengths = torch.cat([part.lengths for part in parts])
    return Packed(torch.cat([part.x for part in parts]), Layout(lengths), sizes, source)


def attend(qkv: Tensor, layout: Layout, sizes: Tensor | None) -> Tensor:
    """Proportional attention inside each image: softmax_j(q_i.k_j / sqrt(d) + log s_j) v_j.

    (T, 3, H, d) queries, keys and values become (T, H * d), independent of what else is in the batch. Sizes s are (T,),
    None for all ones.
    """
    if not len(qkv):
        return qkv[:, 0].flatten(1)
    if layout.uniform or (qkv.is_cuda and qkv.dtype not in (torch.float16, torch.bfloat16)):
        return attend_padded(qkv, layout, sizes)
    return (attend_varlen if qkv.is_cuda else attend_each)(qkv, layout, sizes)


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
    """`attend` image by image, without copies or padding: on a CPU to the bit what `attend_padded` gives each alone."""
    bias = qkv.new_zeros(len(qkv)) if sizes is None else sizes.log().to(qkv.dtype)
    parts = [part[None].split(layout.counts, dim=2) for part in qkv.permute(1, 2, 0, 3)]
    parts.append(bias[None, None, None].split(layout.counts, dim=3))
    outs = [F.scaled_dot_product_attention(*each) for each in zip(*parts, strict=True)]
    return torch.cat([out[0].transpose(0, 1) for out in outs]).flatten(1)


def append_size_coordinate(q: Tensor, k: Tensor, v: Tensor, sizes: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Fold the log-size term into the dot product, so that any attention kernel computes it unmasked.

    q' = [q, sqrt(d)], k' = [k, log s] give q'.k' / sqrt(d) = q.k / sqrt(d) + log s: (T, H, d) each become (T, H, d'),
    to be attended with scale d ** -0.5. d' is the next multiple of 8 above d, as fused kernels want it; zeros fill it.
    """
    if sizes is None:
        return q, k, v
    d = q.shape[-1]
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
