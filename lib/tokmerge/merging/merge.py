"""Token merging: average the pairs that a policy chose (ToMe, Bolya et al., 2210.09461, section 3), and copy back."""

import torch
from torch import Tensor

from tokmerge.merging.matching import Context, Merges, Policy, matching_features
from tokmerge.merging.packed import Layout, Packed


def step(tokens: Packed, policy: Policy | None, *, layer: int, depth: int, protected: int, qkv: Tensor) -> Packed:
    """What a policy makes of the tokens (residual stream) after one layer's attention; arguments as of `Context`."""
    if policy is None or not policy.active(layer):
        return tokens
    metric = matching_features(policy.feature, tokens.x, qkv[:, 1])
    context = Context(layer, depth, protected, metric, tokens.sizes, tokens.layout, qkv, tokens.place)
    return apply(tokens, policy.select(context))


def apply(tokens: Packed, merges: Merges) -> Packed:
    """Merge: weighted mean of values, sum of sizes, order of the survivors kept; dropped rows leave nothing.

    Args:
        tokens: the batch; its source map is updated if it has one.
        merges: which rows merge into which, and which are dropped.
    """
    src, dst, lost, dropped, weights, keep_norm = merges
    if len(src) == 0 and (dropped is None or len(dropped) == 0):
        return tokens
    x, sizes = tokens.x, tokens.full_sizes
    alive = torch.ones(len(x), dtype=torch.bool, device=x.device)
    alive[src] = False
    if dropped is not None:
        alive[dropped] = False
    kept = alive.nonzero().squeeze(1)

    def add_up(part: Tensor) -> Tensor:
        return part.index_add(0, dst, part.index_select(0, src)).index_select(0, kept)

    new_sizes, place = add_up(sizes), tokens.place
    mass = new_sizes if weights is None else add_up(weights)
    total = x * (sizes if weights is None else weights)[:, None].to(x.dtype)
    total.index_add_(0, dst, total.index_select(0, src))
    merged = total.index_select(0, kept) / mass[:, None].to(x.dtype)
    if place is not None:
        place = add_up(place * sizes[:, None].to(place.dtype)) / new_sizes[:, None].to(place.dtype)
    if keep_norm:
        norms = x.norm(dim=1)
        target = norms.scatter_reduce(0, dst, norms[src], "amax")[kept]
        received = torch.zeros_like(alive).index_fill_(0, dst, True)[kept]
        scale = torch.where(received, target / merged.norm(dim=1).clamp_min(1e-12), 1.0)
        merged = merged * scale[:, None]

    layout, source = Layout(tokens.lengths - lost), tokens.source
    if source is not None:
        target_row = torch.arange(len(x), device=x.device)
        target_row[src] = dst
        rows = target_row[source + tokens.layout.offsets[:, None]]
        moved = (alive.cumsum(0) - 1)[rows] - layout.offsets[:, None]
        source = torch.where((source < 0) | ~alive[rows], -1, moved)
    return Packed(merged, layout, new_sizes, source, place)


def unmerge_tokens(packed: Packed, source: Tensor) -> Tensor:
    """Copy every token to the places it stands for: source map (B, N) -> (B, N, D); zeros where one was dropped."""
    grid = packed.x[source.clamp(min=0) + packed.layout.offsets[:, None]]
    return grid.masked_fill((source < 0)[..., None], 0.0)
