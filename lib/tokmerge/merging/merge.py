"""Token merging: average the pairs that a policy chose (ToMe, Bolya et al., 2210.09461, section 3), and copy back."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokmerge.merging import compiled
from tokmerge.merging.matching import BLOCK, Context, Merges, Policy, Sides, compares, matching_features, widen
from tokmerge.merging.packed import Layout, Packed, host
from tokmerge.merging.policies import SimilarPairs


def step(
    tokens: Packed, policy: Policy | None, *, layer: int, depth: int, protected: int, qkv: Tensor,
    read_out: Callable[[], Tensor] | None = None,
) -> Packed:  # fmt: skip
    """What a policy makes of the tokens (residual stream) after one layer's attention; arguments as of `Context`."""
    if policy is None or not policy.active(layer) or tokens.layout.longest <= protected:
        return tokens
    metric = matching_features(policy.feature, tokens.x, qkv[:, 1]) if compares(policy) else tokens.x
    context = Context(layer, depth, protected, metric, tokens.sizes, tokens.layout, qkv, tokens.place, read_out)
    return _merge_pairs(tokens, policy, context) or apply(tokens, policy.select(context))


def _merge_pairs(tokens: Packed, policy: Any, context: Context) -> Packed | None:
    """What `apply` makes of the policy's merges; None where these are no similar pairs or no loop takes them."""
    usual = getattr(type(policy), "select", None) is SimilarPairs.select
    if not usual or tokens.place is not None or not compiled.serves(tokens.x):
        return None
    sides = Sides.of(context, size_aware=policy.size_aware)
    n_images, n, _ = sides.a.shape
    if not 0 < n_images * n * sides.b.shape[2] <= BLOCK:
        return None
    x, sizes, lengths, row = compiled.merge_pairs(
        sides.scores(), tokens.x, tokens.full_sizes, tokens.lengths, context.protected, *policy.bounds(context)
    )
    if x.shape == tokens.x.shape:
        return tokens
    after = Packed(x, Layout(lengths), sizes)
    return after if tokens.source is None else _settle(tokens, after, row)


def apply(tokens: Packed, merges: Merges) -> Packed:
    """Merge: weighted mean of values, sum of sizes, order of the survivors kept; dropped rows leave nothing.

    Sums are made in float32 at least, whatever the values are.

    Args:
        tokens: the batch; its source map is updated if it has one.
        merges: which rows merge into which, and which are dropped.
    """
    src, dst, lost, dropped, weights, keep_norm = merges
    if len(src) == 0 and (dropped is None or len(dropped) == 0):
        return tokens
    x, place, (gone, into) = tokens.x, tokens.place, (host(src), host(dst))
    numpy = isinstance(gone, np.ndarray)
    alive = np.ones(len(x), bool) if numpy else torch.ones(len(x), dtype=torch.bool, device=x.device)
    alive[gone] = False
    if dropped is not None:
        alive[host(dropped)] = False
    kept: Any = np.flatnonzero(alive) if numpy else torch.as_tensor(alive).nonzero()[:, 0]
    # Where every row is afterwards; only rows that receive others change.
    row = alive.cumsum(0) - 1

    def shares(weight: Tensor) -> tuple[Any, Any, Any]:
        """(T,) weights added up in rows that receive; what share of that is a receiving row's own, and a sent one's."""
        own = host(weight)
        if numpy:
            total = own + np.bincount(into, own[gone], len(own)).astype(own.dtype)
        else:
            total = own.index_add(0, into, own[gone])
        parts = own[into] / total[into], own[gone] / total[into]
        return total, *(torch.as_tensor(part)[:, None] for part in parts)

    rows, to = torch.as_tensor(kept), torch.as_tensor(row[into])
    total, *by_size = shares(tokens.full_sizes)
    new_sizes = torch.as_tensor(total[kept])

    def average(values: Tensor, own_share: Tensor, sent_share: Tensor) -> Tensor:
        """Weighted means of (T, ...) values in the rows that are kept."""
        out = widen(values.index_select(0, rows))
        out.index_copy_(0, to, widen(values.index_select(0, dst)) * own_share)
        return out.index_add_(0, to, widen(values.index_select(0, src)) * sent_share)

    merged = average(x, *(by_size if weights is None else shares(weights)[1:]))
    place = None if place is None else average(place, *by_size)
    if keep_norm:
        norms = widen(x).norm(dim=1)
        target = norms.scatter_reduce(0, dst, norms[src], "amax")[rows]
        received = torch.zeros(len(rows), dtype=torch.bool, device=x.device).index_fill_(0, to, True)
        scale = torch.where(received, target / merged.norm(dim=1).clamp_min(1e-12), 1.0)
        merged = merged * scale[:, None]

    after = Packed(merged.to(x.dtype), Layout(tokens.lengths - lost), new_sizes, None, place)
    if tokens.source is None:
        return after
    where = torch.as_tensor(row)
    where[src] = to
    if dropped is not None:
        where[dropped] = -1
    return _settle(tokens, after, where)


def _settle(tokens: Packed, after: Packed, where: Tensor) -> Packed:
    """What is left of tokens with a source map, with detail if they had it; each is in row ``where`` (T,), or -1."""
    assert tokens.source is not None
    moved = where[tokens.source.clamp(min=0) + tokens.layout.offsets[:, None]]
    source = torch.where((tokens.source < 0) | (moved < 0), -1, moved - after.layout.offsets[:, None])
    after = replace(after, source=source)
    if tokens.detail is None:
        return after
    return replace(after, detail=unmerge_tokens(tokens, tokens.source) - unmerge_tokens(after, source))


def unmerge_tokens(packed: Packed, source: Tensor) -> Tensor:
    """Copy every token to the places it stands for: source map (B, N) -> (B, N, D); zeros where one was dropped.

    With the tokens' detail, where they have it: then no merge since it began has changed what is given here.
    """
    grid = packed.x[source.clamp(min=0) + packed.layout.offsets[:, None]].masked_fill((source < 0)[..., None], 0.0)
    return grid if packed.detail is None else grid + packed.detail
