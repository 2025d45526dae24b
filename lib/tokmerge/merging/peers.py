"""Methods of other papers, written anew on this engine, and random floors.

Where a method has an r, it is the number of tokens removed at every block, or a sequence with one number per block.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np
import torch
from torch import Tensor

from tokmerge.merging.matching import Context, Merges, best_among, blocks, largest, match, ranked
from tokmerge.merging.policies import FixedR, LayerPolicy, TopR, at, moments, per_layer


@dataclass(frozen=True)
class LastLayerPolicy(LayerPolicy):
    """What policies of towers share that keep tokens by class attention in the last layer that is run.

    Every other token merges into the kept one with the most similar key.
    """

    feature, needs = "keys", ("class token",)
    layer: int

    def check(self, depth: int) -> None:
        if self.layer != depth - 1:
            raise ValueError(f"{type(self).__name__}: layer is {self.layer}, the last of {depth} layers is {depth - 1}")

    def active(self, layer: int) -> bool:
        return layer == self.layer

    def merge_others(self, context: Context, stay: Tensor, targets: Tensor, weights: Tensor | None) -> Merges:
        """Unprotected tokens that do not ``stay``, (B, U) bool, go to the most similar of the ``targets``."""
        layout, first = context.layout, context.protected
        valid, metric = layout.valid[:, first:], context.padded_metric[:, first:]
        rows = layout.offsets[:, None] + first + torch.arange(valid.shape[1], device=valid.device)
        go = valid & ~stay
        dst = rows.gather(1, best_among(metric, metric, targets))
        return Merges(rows[go], dst[go], go.sum(1), weights=weights)

    def match_macs(self, n: Tensor, d: int) -> Tensor:
        # Which stay is known only afterwards: as if each were compared with every other.
        return n * n * d


@dataclass(frozen=True)
class OutlierMerging(LastLayerPolicy):
    """Keep tokens whose class attention is above Q3 + spread (Q3 - Q1) of their image; the most attended one always.

    Every other token merges into the kept one with the most similar key, averaged by class attention. PruMerge's idea
    (Shang et al., 2403.15388), so that the number follows each image; with samples that of PruMerge+.

    Args:
        layer: where it works: the tower's last layer that is run.
        spread: how far out an outlier is; 1.5 is the usual rule, less keeps more.
        samples: about so many tokens per outlier are kept besides, evenly over the grid (PruMerge+ has 3).
    """

    spread: float = 1.5
    samples: int = 0

    def select(self, context: Context) -> Merges:
        layout, first = context.layout, context.protected
        valid = layout.valid[:, first:]
        attention = context.class_attention
        padded = layout.pad(attention)[:, first:]
        most = ranked(padded, valid, descending=True)[:, :1]
        padded = padded.masked_fill(~valid, float("nan"))
        q1, q3 = padded.nanquantile(torch.tensor([0.25, 0.75], device=padded.device, dtype=padded.dtype), 1)
        stay = (padded >= (q3 + self.spread * (q3 - q1))[:, None]).scatter(1, most, True)
        if self.samples:
            step = (valid.sum(1) // stay.sum(1) // self.samples).clamp(min=1)
            stay |= valid & (torch.arange(valid.shape[1], device=valid.device) % step[:, None] == 0)
        return self.merge_others(context, stay, stay, attention.clamp_min(1e-12))


@dataclass(frozen=True)
class DominantMerging(LastLayerPolicy):
    """VisionZip (Yang et al., 2412.04467): the most attended tokens stay as they are, the others become a few.

    Of the others, evenly spaced ones are targets; every further one merges into the target with the most similar key,
    and a target becomes the plain mean of its own.

    Args:
        layer: where it works: the tower's last layer that is run.
        dominant: tokens of highest class attention.
        contextual: targets among the others.
    """

    dominant: int = 54
    contextual: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dominant < 0 or self.contextual < 1:
            raise ValueError(f"{self}: dominant is at least 0 and contextual at least 1")

    def select(self, context: Context) -> Merges:
        layout, first = context.layout, context.protected
        valid = layout.valid[:, first:]
        order = ranked(layout.pad(context.class_attention)[:, first:], valid, descending=True)
        stay = torch.zeros_like(valid).scatter(1, order[:, : self.dominant], True) & valid
        rest = valid & ~stay
        number, left = rest.cumsum(1) - 1, rest.sum(1, keepdim=True)
        step = (left // self.contextual).clamp(min=1)
        targets = rest & (number % step == 0) & (number // step < self.contextual)
        sizes = context.metric.new_ones(len(context.metric))
        return self.merge_others(context, stay | targets, targets, sizes)


@dataclass(frozen=True)
class ToFu(TopR):
    """ToMe's pairs, but a merged token keeps the largest norm among those it was made of (Kim et al., 2312.01026).

    That is the method's average, MLERP, in all blocks; it prunes instead in those that are far from linear.
    """

    def select(self, context: Context) -> Merges:
        return super().select(context)._replace(keep_norm=True)


@dataclass(frozen=True)
class AdaMerge(FixedR):
    """As many merges as the image's redundancy asks for, away from salient tokens (2605.27465, in our reading).

    r_l = floor(r sigmoid(alpha z_l)), z_l the z-score of the image's mean best-match similarity against the layer's
    statistics. A token's salience is its column of the affinities max(cos(m_i, m_j), 0), summed over the image's
    tokens, over the largest such sum. Pairs with the highest similarity x (1 - salience of a) merge, averaged with
    weight size x salience. Only the method's abstract is known here: what that leaves open is our choice.

    Args:
        r: most tokens removed.
        means: mean over images of their mean best-match similarity, one per block
            (`tokmerge.evaluation.calibrate.similarity_statistics`).
        deviations: its standard deviation, one per block.
        alpha: how strongly r follows the z-score.
    """

    means: Sequence[float] = per_layer(Real, "means")
    deviations: Sequence[float] = per_layer(Real, "deviations")
    alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.deviations, tuple) or not all(value > 0 for value in self.deviations):
            raise ValueError(f"AdaMerge: deviations are {self.deviations}: one positive number per block is needed")

    def select(self, context: Context) -> Merges:
        matches, layer = match(context), context.layer
        z = (moments(matches.similarity)[0] - self.means[layer]) / self.deviations[layer]
        r = (at(self.r, layer) * (self.alpha * z).sigmoid()).floor().long()
        # The class token and its like never merge; what they are worth does not matter.
        salience = _centrality(context).clamp(1e-6, 1.0)
        salience_a = salience[:, context.protected :: 2]
        merges = matches._replace(similarity=matches.similarity * (1 - salience_a)).take(most=r)
        weights = salience[context.layout.valid]
        return merges._replace(weights=weights if context.sizes is None else context.sizes * weights)

    def match_macs(self, n: Tensor, d: int) -> Tensor:
        # The affinities hold the similarities of all pairs.
        return n * n * d


def _centrality(context: Context) -> Tensor:
    """(B, longest) sum of each token's positive cosines with its image's unprotected ones, over the largest sum."""
    metric, sums = context.padded_metric.clone(), []
    metric[:, : context.protected] = 0
    for start, stop in blocks(metric.shape[1], metric.shape[0] * metric.shape[1]):
        sums.append((metric[:, start:stop] @ metric.transpose(1, 2)).clamp_(min=0).sum(2))
    found = torch.cat(sums, dim=1)
    return found / found.amax(1, keepdim=True).clamp_min(1e-12)


class Unmatched(LayerPolicy):
    """What policies that compare no tokens share."""

    compares = False

    def match_macs(self, n: Tensor, d: int) -> Tensor:
        return torch.zeros_like(n)


@dataclass(frozen=True)
class WindowPooling(Unmatched):
    """The tokens of a window of the patch grid become their mean, whatever they show: content-blind pooling.

    The grid is cut into windows from its first row and column on; a pooled token's place is the mean over its patches.

    Args:
        rows, columns: of a window, in patches, for every block or one number per block; 1 and 1 pool nothing.

    >>> WindowPooling([1, 2], 1).active(0), WindowPooling([1, 2], 1).active(1)
    (False, True)
    """

    needs = ("places",)
    rows: int | Sequence[int] = per_layer(Integral, "rows")
    columns: int | Sequence[int] = per_layer(Integral, "columns")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, side in (("rows", self.rows), ("columns", self.columns)):
            if not all(side if isinstance(side, tuple) else [side]):
                raise ValueError(f"WindowPooling: {name} are {side}, but a window has 1 or more")

    def active(self, layer: int) -> bool:
        return at(self.rows, layer) * at(self.columns, layer) > 1

    def select(self, context: Context) -> Merges:
        layout, places = context.layout, context.places
        free = (layout.position >= context.protected).nonzero()[:, 0]
        row, column = (places[free] // places.new_tensor(
            [at(self.rows, context.layer), at(self.columns, context.layer)])).long().unbind(1)  # fmt: skip
        height, width = (int(part.max()) + 1 if len(part) else 1 for part in (row, column))
        window = (layout.image[free] * height + row) * width + column
        # Every window's first token stays.
        first = torch.full((len(layout.lengths) * height * width,), len(layout.image), device=free.device)
        first = first.scatter_reduce(0, window, free, "amin")[window]
        gone = first != free
        lost = torch.zeros_like(layout.lengths).index_add_(0, layout.image[free], gone.long())
        return Merges(free[gone], first[gone], lost)


@dataclass(frozen=True)
class AttentionPruning(Unmatched, FixedR):
    """The tokens that the class token attends to least fuse into one (EViT, Liang et al., 2202.07800).

    The fused token is the attention-weighted mean of r + 1 tokens and stands where the most attended of them stood.
    """

    needs = ("class token",)

    def select(self, context: Context) -> Merges:
        rows, r, used = _lowest(context, int(at(self.r, context.layer)))
        # Where an image has no token left to fuse, nothing is used.
        last = rows.gather(1, r.clamp(max=rows.shape[1] - 1)[:, None]).expand_as(rows)
        weights = context.class_attention.clamp_min(1e-12)
        return Merges(rows[used], last[used], r, weights=weights)


@dataclass(frozen=True)
class StaticRates(LayerPolicy):
    """Prune, then merge, in numbers fixed for all images (DiffRate, Chen et al., 2305.17997, without its training).

    At every block the tokens that the class token attends to least are dropped, and the next least attended merge,
    each into its most similar one among those that stay, by size-weighted means. One always stays. Tokens are compared
    themselves: of the features the method may be read with, it is the one that loses least.

    Args:
        prune, merge: tokens dropped and merged at every block, or one number per block.
    """

    needs = ("class token",)
    prune: int | Sequence[int] = per_layer(Integral, "prune values")
    merge: int | Sequence[int] = per_layer(Integral, "merge values")

    def active(self, layer: int) -> bool:
        return at(self.prune, layer) + at(self.merge, layer) > 0

    def select(self, context: Context) -> Merges:
        layer, first = context.layer, context.protected
        prune, merge = int(at(self.prune, layer)), int(at(self.merge, layer))
        rows, lost, going = _lowest(context, prune + merge)
        place = torch.arange(rows.shape[1], device=rows.device)
        dropped, merging = going & (place < prune), going & (place >= prune)
        src = rows[:, prune : prune + merge]
        if src.shape[1] == 0:
            return Merges(rows[merging], rows[merging], lost, dropped=rows[dropped])
        staying = context.layout.valid[:, first:].gather(1, order := rows - context.layout.offsets[:, None] - first)
        staying = staying & ~going
        metric = context.padded_metric[:, first:].gather(1, order[..., None].expand(-1, -1, context.metric.shape[1]))
        best = best_among(metric[:, prune : prune + merge], metric, staying)
        used = merging[:, prune : prune + merge]
        return Merges(src[used], rows.gather(1, best)[used], lost, dropped=rows[dropped])

    def match_macs(self, n: Tensor, d: int) -> Tensor:
        left = (n - n.new_tensor(self.prune)).clamp(min=1).minimum(n)
        merged = torch.minimum((left - 1).clamp(min=0), n.new_tensor(self.merge))
        return merged * (left - merged) * d


@dataclass(frozen=True)
class RandomMerging(Unmatched, FixedR):
    """The floor: r tokens of set A merge into any token of set B.

    The draw depends on seed, layer and the token's place only, so an image gets the same in any batch.
    """

    seed: int = 0

    def select(self, context: Context) -> Merges:
        layout, first = context.layout, context.protected
        n = layout.lengths - first
        n_a, n_b = n - n // 2, n // 2
        places = torch.arange(max(n_a.tolist(), default=0), device=n.device)
        score, partner = _noise(context, self.seed, len(places), 2)
        possible = (places < n_a[:, None]) & (n_b > 0)[:, None]
        chosen = largest(score.masked_fill(~possible, float("-inf")), int(at(self.r, context.layer)))
        rows = layout.offsets[:, None] + first
        b = (partner * n_b[:, None]).long()
        return Merges((rows + 2 * places)[chosen], (rows + 2 * b + 1)[chosen], chosen.sum(1))


@dataclass(frozen=True)
class RandomPruning(Unmatched, FixedR):
    """The floor of pruning: any r tokens are dropped; one always stays. Drawn as in `RandomMerging`."""

    averages = False
    seed: int = 0

    def select(self, context: Context) -> Merges:
        (score,) = _noise(context, self.seed, context.layout.longest - context.protected, 1)
        rows, r, used = _lowest(context, int(at(self.r, context.layer)), -score)
        nothing = rows.new_empty(0)
        return Merges(nothing, nothing, r, dropped=rows[used])


def _lowest(context: Context, r: int, scores: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens that may go, from the lowest of their (B, U) scores, or of class attention, to the highest.

    Gives their (B, U) packed rows; how many go, (B,), at most r and never all; which, (B, U) bool.
    """
    layout, first = context.layout, context.protected
    scores = layout.pad(context.class_attention)[:, first:] if scores is None else scores
    order = ranked(scores, layout.valid[:, first:])
    n = (layout.lengths - first - 1).clamp(min=0, max=r)
    used = torch.arange(order.shape[1], device=n.device) < n[:, None]
    return layout.offsets[:, None] + first + order, n, used


def _noise(context: Context, seed: int, n: int, draws: int) -> list[Tensor]:
    """Uniform numbers in [0, 1) of every place, (B, n) each; the same whatever n is."""
    batch = len(context.layout.lengths)
    streams = [np.random.default_rng((seed, context.layer, draw)).random(n) for draw in range(draws)]
    return [torch.tensor(stream, device=context.metric.device).expand(batch, -1) for stream in streams]
