"""Token merging: match similar tokens of one image, then average the chosen pairs.

A policy (`tokmerge.policies`) only says which tokens merge into which; everything else is shared and is here.
Bipartite matching and size-weighted averaging follow ToMe (Bolya et al., 2210.09461, section 3),
written anew for packed batches.
"""

from dataclasses import dataclass
from functools import cached_property, reduce
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tokmerge.packed import Layout, Packed

if TYPE_CHECKING:
    from tokmerge.policies import Policy

FEATURES = ("tokens", "keys")


class Merges(NamedTuple):
    """M merges of a batch: row ``src[i]`` disappears into row ``dst[i]``.

    Attributes:
        src: (M,) packed rows, each at most once, none of them a dst.
        dst: (M,) packed rows of the same image.
        lost: (B,) int64, rows that disappear from each image.
        dropped: rows that disappear without a trace, neither src nor dst; None for none.
        weights: (T,) positive weights of the rows in the average; None for their sizes.
        keep_norm: give every average the largest norm among those it was made of.
    """

    src: Tensor
    dst: Tensor
    lost: Tensor
    dropped: Tensor | None = None
    weights: Tensor | None = None
    keep_norm: bool = False


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
        metric: (T, d) matching features of unit length (see `features`).
        sizes: (T,) patches each token stands for; None for all ones.
        layout: which rows belong to which image.
        qkv: (T, 3, H, d) queries, keys and values of the layer; None where there are none.
        place: (T, 2) row and column of each token in the patch grid; None where it is not known.
    """

    layer: int
    depth: int
    protected: int
    metric: Tensor
    sizes: Tensor | None
    layout: Layout
    qkv: Tensor | None = None
    place: Tensor | None = None

    @cached_property
    def padded_metric(self) -> Tensor:
        """(B, longest, d)."""
        return self.layout.pad(self.metric)

    @cached_property
    def class_attention(self) -> Tensor:
        """(T,) what each image's class token (its first) attends to, mean over heads: sums to 1 over an image.

        Raises:
            ValueError: the model has no class token, or attention is not known here.
        """
        if self.qkv is None or self.protected == 0:
            raise ValueError("the policy needs the attention of a class token, and this model has none to give")
        layout, (queries, keys) = self.layout, self.qkv[:, :2].unbind(1)
        scores = (queries[layout.offsets][layout.image] * keys).sum(-1) * keys.shape[-1] ** -0.5
        if self.sizes is not None:
            scores = scores + self.sizes.log().to(scores.dtype)[:, None]
        padded = layout.pad(scores).masked_fill(~layout.valid[..., None], float("-inf"))
        return padded.softmax(1).mean(-1)[layout.valid]


def features(kind: str, x: Tensor, keys: Tensor) -> Tensor:
    """Matching features: what two tokens must be alike in to merge.

    Args:
        kind: one of `FEATURES`. ``"tokens"``: the tokens themselves, which is what merging averages. ``"keys"``: their
            keys' mean over heads, as ToMe has it.
        x: (T, D) residual stream after attention.
        keys: (T, H, d).

    Returns:
        (T, D) or (T, d), of unit length.
    """
    # The mean over heads, up to its length, which normalising removes.
    return F.normalize(x if kind == "tokens" else reduce(torch.add, keys.unbind(1)), dim=-1)


def match(context: Context, group: Tensor | None = None) -> Matches:
    """Alternate the unprotected tokens between A and B; each a in A takes its most similar b in B.

    Args:
        context: the layer's.
        group: (T,) numbers; tokens alternate within those of one number, and only match each other. None: all do.
    """
    layout, first = context.layout, context.protected
    metric = context.padded_metric[:, first:]
    order = torch.arange(metric.shape[1], device=metric.device)[None]
    valid = None if layout.uniform else layout.valid[:, first:]
    if group is not None:
        numbers = layout.pad(group)[:, first:].double()
        # Padding comes last, so what is valid stays where it was.
        numbers = numbers if valid is None else numbers.masked_fill(~valid, float("inf"))
        numbers, order = numbers.sort(dim=1, stable=True)
        metric = metric.gather(1, order[..., None].expand_as(metric))
    rows = layout.offsets[:, None] + (order + first)
    scores = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
    if scores.shape[2] == 0:
        return Matches(scores.new_full(scores.shape[:2], float("-inf")), rows[:, ::2], rows[:, ::2])
    if valid is not None:
        scores.masked_fill_(~valid[:, None, 1::2], float("-inf"))
    if group is not None:
        scores = scores.masked_fill(numbers[:, ::2, None] != numbers[:, None, 1::2], float("-inf"))
    similarity, best = scores.max(dim=-1)
    if valid is not None:
        similarity = similarity.masked_fill(~valid[:, ::2], float("-inf"))
    return Matches(similarity, rows[:, ::2], rows[:, 1::2].gather(1, best))


def step(tokens: Packed, policy: "Policy | None", *, layer: int, depth: int, protected: int, qkv: Tensor) -> Packed:
    """What a policy makes of the tokens after one layer's attention.

    Args:
        tokens: the batch, residual stream after attention.
        policy: what merges; None for nothing.
        layer, depth, protected, qkv: as in `Context`.
    """
    if policy is None or not policy.active(layer):
        return tokens
    context = Context(
        layer=layer,
        depth=depth,
        protected=protected,
        metric=features(policy.feature, tokens.x, qkv[:, 1]),
        sizes=tokens.sizes,
        layout=tokens.layout,
        qkv=qkv,
        place=tokens.place,
    )
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
    x, layout = tokens.x, tokens.layout
    sizes = tokens.sizes if tokens.sizes is not None else torch.ones(len(x), device=x.device)
    alive = torch.ones(len(x), dtype=torch.bool, device=x.device)
    alive[src] = False
    if dropped is not None:
        alive[dropped] = False
    kept = alive.nonzero().squeeze(1)

    weights = sizes if weights is None else weights
    total = x * weights[:, None].to(x.dtype)
    total.index_add_(0, dst, total.index_select(0, src))
    sizes, mass = (part.index_add(0, dst, part.index_select(0, src)).index_select(0, kept) for part in (sizes, weights))
    merged = total.index_select(0, kept) / mass[:, None].to(x.dtype)
    place = tokens.place
    if place is not None:
        before = torch.ones(len(x), device=x.device) if tokens.sizes is None else tokens.sizes
        heavy = place * before[:, None].to(place.dtype)
        heavy = heavy.index_add(0, dst, heavy.index_select(0, src)).index_select(0, kept)
        place = heavy / sizes[:, None].to(place.dtype)
    if keep_norm:
        norms = x.norm(dim=1)
        target = norms.scatter_reduce(0, dst, norms[src], "amax")[kept]
        received = torch.zeros_like(alive).index_fill_(0, dst, True)[kept]
        scale = torch.where(received, target / merged.norm(dim=1).clamp_min(1e-12), 1.0)
        merged = merged * scale[:, None]

    new_layout = Layout(layout.lengths - lost)
    source = tokens.source
    if source is not None:
        target_row = torch.arange(len(x), device=x.device)
        target_row[src] = dst
        rows = target_row[source + layout.offsets[:, None]]
        moved = (alive.cumsum(0) - 1)[rows] - new_layout.offsets[:, None]
        source = torch.where((source < 0) | ~alive[rows], -1, moved)
    return Packed(merged, new_layout, sizes, source, place)


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
