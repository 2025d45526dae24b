"""Peer methods as merge policies, written anew from their papers' definitions on the same engine.

ToMe is `tokmerge.TopR`, PiToMe `tokmerge.PiToMe` and one threshold for all layers `tokmerge.Threshold`; the others are
here, with two relatives of the threshold that a search may choose. All share attention, averaging, cost and bytes.
Scores that a method takes from attention cost nothing extra: the products are part of the attention that was run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from tokmerge.merge import Context, Merges, match
from tokmerge.policies import (
    FixedR,
    TopR,
    at,
    bipartite_macs,
    check_length,
    largest,
    moments,
    per_layer,
)


@dataclass(frozen=True)
class ToFu(TopR):
    """ToMe's pairs, but a merged token keeps the largest norm among those it was made of (Kim et al., 2312.01026).

    Args:
        r: tokens removed at every block, or a sequence with one number per block.
    """

    def select(self, context: Context) -> Merges:
        return super().select(context)._replace(keep_norm=True)


@dataclass(frozen=True)
class CappedThreshold:
    """Pairs above the layer's threshold, but at most a number of them: `Threshold` and `TopR` are its two ends.

    Args:
        thresholds: one cosine threshold for every block, or one per block.
        caps: most tokens an image may lose at every block, or one number per block.
    """

    feature: ClassVar[str] = "tokens"
    thresholds: float | Sequence[float]
    caps: int | Sequence[int]

    def __post_init__(self) -> None:
        object.__setattr__(self, "thresholds", per_layer("CappedThreshold", "thresholds", self.thresholds, Real))
        object.__setattr__(self, "caps", per_layer("CappedThreshold", "caps", self.caps, Integral))

    def check(self, depth: int) -> None:
        check_length("CappedThreshold", "thresholds", self.thresholds, depth)
        check_length("CappedThreshold", "caps", self.caps, depth)

    def active(self, layer: int) -> bool:
        return at(self.thresholds, layer) < 1.0 and at(self.caps, layer) > 0

    def select(self, context: Context) -> Merges:
        matches = match(context)
        above = matches.similarity > at(self.thresholds, context.layer)
        return matches.merges(above & largest(matches.similarity, int(at(self.caps, context.layer))))

    def match_macs(self, n: Tensor, d: int) -> Tensor:
        return bipartite_macs(n, d)


@dataclass(frozen=True)
class RelativeThreshold:
    """Pairs whose similarity is z standard deviations above the mean of their own image and layer.

    Args:
        z: for every block, or one per block; infinity switches a block off.
    """

    feature: ClassVar[str] = "tokens"
    z: float | Sequence[float]

    def __post_init__(self) -> None:
        object.__setattr__(self, "z", per_layer("RelativeThreshold", "z", self.z, Real))

    def check(self, depth: int) -> None:
        check_length("RelativeThreshold", "z values", self.z, depth)

    def active(self, layer: int) -> bool:
        return at(self.z, layer) < float("inf")

    def select(self, context: Context) -> Merges:
        matches = match(context)
        mean, deviation = moments(matches.similarity)
        return matches.merges(matches.similarity > mean + at(self.z, context.layer) * deviation)

    def match_macs(self, n: Tensor, d: int) -> Tensor:
        return bipartite_macs(n, d)


@dataclass(frozen=True)
class AdaMerge(FixedR):
    """As many merges as the image's redundancy asks for, away from salient tokens (2605.27465, in our reading).

    r_l = floor(r sigmoid(alpha z_l)), z_l the z-score of the image's mean best-match similarity against the layer's
    statistics. A token's salience is the class token's attention to it over the largest of its image. Pairs with the
    highest similarity x (1 - salience of a) merge, averaged with weight size x salience.

    Args:
        r: most tokens removed at every block, or a sequence with one number per block.
        means: mean over images of their mean best-match similarity, one per block
            (`tokmerge.rates.similarity_statistics`).
        deviations: its standard deviation, one per block.
        alpha: how strongly r follows the z-score.
    """

    means: Sequence[float]
    deviations: Sequence[float]
    alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("means", "deviations"):
            object.__setattr__(self, name, per_layer("AdaMerge", name, getattr(self, name), Real))
        if not isinstance(self.deviations, tuple) or not all(value > 0 for value in self.deviations):
            raise ValueError(f"AdaMerge: deviations are {self.deviations}: one positive number per block is needed")

    def check(self, depth: int) -> None:
        super().check(depth)
        check_length("AdaMerge", "means", self.means, depth)
        check_length("AdaMerge", "deviations", self.deviations, depth)

    def select(self, context: Context) -> Merges:
        matches, layer = match(context), context.layer
        similarity = matches.similarity
        z = (moments(similarity)[0] - self.means[layer]) / self.deviations[layer]
        r = (at(self.r, layer) * (self.alpha * z).sigmoid()).floor().long()
        attention = context.class_attention
        padded = context.layout.pad(attention).masked_fill(~context.layout.valid, 0.0)
        peak = padded[:, context.protected :].amax(1)[context.layout.image]
        # The class token and its like never merge; what they are worth does not matter.
        salience = (attention / peak).clamp(1e-6, 1.0)
        # Places beyond an image's end hold any token: their similarity keeps them out.
        salience_a = salience.take(matches.src.clamp(max=len(salience) - 1))
        merges = matches.merges(largest(similarity * (1 - salience_a), r))
        sizes = salience.new_ones(len(salience)) if context.sizes is None else context.sizes
        return merges._replace(weights=sizes * salience)

    def match_macs(self, n: Tensor, d: int) -> Tensor:
        return bipartite_macs(n, d)


@dataclass(frozen=True)
class AttentionPruning(FixedR):
    """The tokens that the class token attends to least fuse into one (EViT, Liang et al., 2202.07800).

    The fused token is the attention-weighted mean of r + 1 tokens and stands where the most attended of them stood.

    Args:
        r: tokens removed at every block, or a sequence with one number per block.
    """

    def select(self, context: Context) -> Merges:
        rows, r, used = _lowest(context, _attended(context), int(at(self.r, context.layer)))
        # Where an image has no token left to fuse, nothing is used.
        last = rows.gather(1, r.clamp(max=rows.shape[1] - 1)[:, None]).expand_as(rows)
        weights = context.class_attention.clamp_min(1e-12)
        return Merges(rows[used], last[used], r, weights=weights)

    def match_macs(self, n: Tensor, d: int) -> Tensor:
        return torch.zeros_like(n)


@dataclass(frozen=True)
class StaticRates:
    """Prune, then merge, in numbers fixed for all images (DiffRate, Chen et al., 2305.17997, without its training).

    At every block the tokens that the class token attends to least are dropped, and the next least attended merge,
    each into its most similar one among those that stay.

    Args:
        prune: tokens dropped at every block, or one number per block. One token always stays.
        merge: tokens merged at every block, or one number per block. One token always stays.
    """

    feature: ClassVar[str] = "keys"
    prune: int | Sequence[int]
    merge: int | Sequence[int]

    def __post_init__(self) -> None:
        for name in ("prune", "merge"):
            object.__setattr__(self, name, per_layer("StaticRates", name, getattr(self, name), Integral))

    def check(self, depth: int) -> None:
        check_length("StaticRates", "prune values", self.prune, depth)
        check_length("StaticRates", "merge values", self.merge, depth)

    def active(self, layer: int) -> bool:
        return at(self.prune, layer) + at(self.merge, layer) > 0

    def select(self, context: Context) -> Merges:
        layer, first = context.layer, context.protected
        prune, merge = int(at(self.prune, layer)), int(at(self.merge, layer))
        rows, lost, going = _lowest(context, _attended(context), prune + merge)
        place = torch.arange(rows.shape[1], device=rows.device)
        dropped, merging = going & (place < prune), going & (place >= prune)
        src = rows[:, prune : prune + merge]
        if src.shape[1] == 0:
            return Merges(rows[merging], rows[merging], lost, dropped=rows[dropped])
        staying = context.layout.valid[:, first:].gather(1, order := rows - context.layout.offsets[:, None] - first)
        staying = staying & ~going
        metric = context.padded_metric[:, first:].gather(1, order[..., None].expand(-1, -1, context.metric.shape[1]))
        scores = metric[:, prune : prune + merge] @ metric.transpose(1, 2)
        best = scores.masked_fill(~staying[:, None, :], float("-inf")).argmax(2)
        used = merging[:, prune : prune + merge]
        return Merges(src[used], rows.gather(1, best)[used], lost, dropped=rows[dropped])

    def match_macs(self, n: Tensor, d: int) -> Tensor:
        left = (n - n.new_tensor(self.prune)).clamp(min=1).minimum(n)
        merged = torch.minimum((left - 1).clamp(min=0), n.new_tensor(self.merge))
        return merged * (left - merged) * d


@dataclass(frozen=True)
class RandomMerging(FixedR):
    """The floor: r tokens of set A merge into any token of set B.

    The draw depends on seed, layer and the token's place only, so an image gets the same in any batch.

    Args:
        r: tokens removed at every block, or a sequence with one number per block.
        seed: of the draw.
    """

    seed: int = 0

    def select(self, context: Context) -> Merges:
        layout, first = context.layout, context.protected
        n = layout.lengths - first
        n_a, n_b = n - n // 2, n // 2
        places = torch.arange(int(n_a.max()), device=n.device)
        score, partner = _noise(context, self.seed, len(places), 2)
        possible = (places < n_a[:, None]) & (n_b > 0)[:, None]
        chosen = largest(score.masked_fill(~possible, float("-inf")), int(at(self.r, context.layer)))
        rows = layout.offsets[:, None] + first
        b = (partner * n_b[:, None]).long()
        return Merges((rows + 2 * places)[chosen], (rows + 2 * b + 1)[chosen], chosen.sum(1))

    def match_macs(self, n: Tensor, d: int) -> Tensor:
        return torch.zeros_like(n)


@dataclass(frozen=True)
class RandomPruning(FixedR):
    """The floor of pruning: any r tokens are dropped; one always stays. Drawn as in `RandomMerging`.

    Args:
        r: tokens removed at every block, or a sequence with one number per block.
        seed: of the draw.
    """

    seed: int = 0

    def select(self, context: Context) -> Merges:
        (score,) = _noise(context, self.seed, context.layout.longest - context.protected, 1)
        rows, r, used = _lowest(context, -score, int(at(self.r, context.layer)))
        nothing = rows.new_empty(0)
        return Merges(nothing, nothing, r, dropped=rows[used])

    def match_macs(self, n: Tensor, d: int) -> Tensor:
        return torch.zeros_like(n)


def _attended(context: Context) -> Tensor:
    """(B, U) the class token's attention to the tokens that may go, padded."""
    return context.layout.pad(context.class_attention)[:, context.protected :]


def _lowest(context: Context, scores: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens that may go, from the lowest of their (B, U) scores to the highest.

    Returns:
        (B, U) their packed rows; (B,) how many go, at most r, and one always stays; (B, U) bool: those that go.
    """
    layout, first = context.layout, context.protected
    order = scores.masked_fill(~layout.valid[:, first:], float("inf")).argsort(dim=1, stable=True)
    n = (layout.lengths - first - 1).clamp(min=0, max=r)
    used = torch.arange(order.shape[1], device=n.device) < n[:, None]
    return layout.offsets[:, None] + first + order, n, used


def _noise(context: Context, seed: int, n: int, draws: int) -> list[Tensor]:
    """Uniform numbers in [0, 1) of every place, (B, n) each; the same whatever n is."""
    batch = len(context.layout.lengths)
    streams = [np.random.default_rng((seed, context.layer, draw)).random(n) for draw in range(draws)]
    return [torch.tensor(stream, device=context.metric.device).expand(batch, -1) for stream in streams]
