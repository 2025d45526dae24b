"""Token merging: match similar tokens of one image, then average the chosen pairs.

A policy (`tokmerge.policies`) only says which tokens merge into which; everything else is shared and is here.
Bipartite matching and size-weighted averaging follow ToMe (Bolya et al., 2210.09461, section 3),
written anew for packed batches.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from tokmerge.packed import Layout, Packed


class Merges(NamedTuple):
    """M merges of a batch: row ``src[i]`` disappears into row ``dst[i]``.

    Attributes:
        src: (M,) packed rows, each at most once, none of them a dst.
        dst: (M,) packed rows of the same image.
        lost: (B,) int64, merges of each image.
    """

    src: Tensor
    dst: Tensor
    lost: Tensor


class Matches(NamedTuple):
    """Every token of set A with its best match in set B, padded over the batch.

    Attributes:
        similarity: (B, A) cosine with the best match; -inf where there is no such token or no match.
        src: (B, A) packed row of each token in A.
        dst: (B, A) packed row of its best match.
    """

    similarity: Tensor
    src: Tensor
    dst: Tensor

    def merges(self, chosen: Tensor) -> Merges:
        """The merges of the chosen (B, A) bool entries."""
        entries = chosen.flatten().nonzero().squeeze(1)
        return Merges(self.src.take(entries), self.dst.take(entries), chosen.sum(1))


@dataclass(frozen=True)
class Context:
    """What a policy sees at one layer.

    Attributes:
        layer: block index l, from 0.
        depth: number of blocks L.
        protected: leading tokens that never merge (CLS, registers, distillation).
        metric: (T, d) matching features, unit length: mean over heads of the keys.
        sizes: (T,) patches each token stands for; None for all ones.
        layout: which rows belong to which image.
    """

    layer: int
    depth: int
    protected: int
    metric: Tensor
    sizes: Tensor | None
    layout: Layout

    @cached_property
    def padded_metric(self) -> Tensor:
        """(B, longest, d)."""
        return self.layout.pad(self.metric)


def match(context: Context) -> Matches:
    """Alternate the unprotected tokens between A and B; each a in A takes its most similar b in B."""
    layout, first = context.layout, context.protected
    metric = context.padded_metric
    scores = metric[:, first::2] @ metric[:, first + 1 :: 2].transpose(1, 2)
    n_a, n_b = scores.shape[1:]
    rows_a = layout.offsets[:, None] + torch.arange(n_a, device=metric.device) * 2 + first
    if n_b == 0:
        return Matches(scores.new_full(rows_a.shape, float("-inf")), rows_a, rows_a)
    if not layout.uniform:
        scores.masked_fill_(~layout.valid[:, None, first + 1 :: 2], float("-inf"))
    similarity, best = scores.max(dim=-1)
    if not layout.uniform:
        similarity = similarity.masked_fill(~layout.valid[:, first::2], float("-inf"))
    return Matches(similarity, rows_a, layout.offsets[:, None] + best * 2 + (first + 1))


def apply(tokens: Packed, merges: Merges) -> Packed:
    """Merge: size-weighted mean of values, sum of sizes, order of the survivors kept.

    Args:
        tokens: the batch; its source map is updated if it has one.
        merges: which rows merge into which.
    """
    src, dst, lost = merges
    if len(src) == 0:
        return tokens
    x, layout = tokens.x, tokens.layout
    sizes = tokens.sizes if tokens.sizes is not None else torch.ones(len(x), device=x.device)
    alive = torch.ones(len(x), dtype=torch.bool, device=x.device)
    alive[src] = False
    kept = alive.nonzero().squeeze(1)

    total = x * sizes[:, None].to(x.dtype)
    total.index_add_(0, dst, total.index_select(0, src))
    sizes = sizes.index_add(0, dst, sizes.index_select(0, src)).index_select(0, kept)
    merged = total.index_select(0, kept) / sizes[:, None].to(x.dtype)

    new_layout = Layout(layout.lengths - lost)
    source = tokens.source
    if source is not None:
        target = torch.arange(len(x), device=x.device)
        target[src] = dst
        new_row = alive.cumsum(0) - 1
        old_rows = source + layout.offsets[:, None]
        moved = new_row[target[old_rows]] - new_layout.offsets[:, None]
        source = torch.where(source < 0, source, moved)
    return Packed(merged, new_layout, sizes, source)


def unmerge(packed: Packed, source: Tensor) -> Tensor:
    """Copy every token back to the places it stands for.

    Args:
        packed: (T, D) tokens.
        source: (B, N) source map.

    Returns:
        (B, N, D); zeros where a token was dropped.
    """
    grid = packed.x[source.clamp(min=0) + packed.layout.offsets[:, None]]
    return grid.masked_fill((source < 0)[..., None], 0.0)
