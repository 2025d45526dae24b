"""Thresholds with a further condition: neighbours only, so many at most, relative to the image, by confidence."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

from torch import Tensor

from tokmerge.merging.matching import Context, Matches, Merges, bipartite_macs, match
from tokmerge.merging.policies import FixedR, LayerPolicy, SimilarPairs, ThresholdPolicy, at, moments, per_layer


@dataclass(frozen=True)
class LocalThreshold(ThresholdPolicy):
    """`tokmerge.merging.policies.Threshold` among the tokens of a window of the patch grid.

    Equal things at two places look the same. Merged into one token they are remembered, where they were is not; a
    question may ask just that. Here a merged token stands for one region. The grid is cut into square windows, from its
    first row and column on; a merged token's place is the mean over its patches. Tokens alternate window by window.

    Args:
        thresholds: one cosine threshold for every block, or one per block; 1 switches a block off.
        window: side of the windows in patches, for every block or one per block.
        feature: what similarity is measured on: "tokens" or "keys".

    >>> LocalThreshold([0.9, 1.0], window=3).active(1)
    False
    """

    needs = ("places",)
    window: int | Sequence[int] = per_layer(Integral, "windows")
    feature: str = "tokens"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(self.window if isinstance(self.window, tuple) else [self.window]):
            raise ValueError(f"LocalThreshold: window is {self.window}, but a window has a side of 1 or more patches")

    def select(self, context: Context) -> Merges:
        matches = _match_in_windows(context, int(at(self.window, context.layer)))
        return matches.take(at(self.thresholds, context.layer))

    def match_macs(self, n: Tensor, d: int) -> Tensor:
        # Two comparisons tell whether a pair is of one window.
        return bipartite_macs(n, d + 2)


@dataclass(frozen=True)
class LocalTopR(FixedR):
    """The r most similar pairs among those of `LocalThreshold`, the same number in every image.

    Args:
        r: tokens removed at every block, or a sequence with one number per block. Where fewer can merge, all do.
        window: side of the windows in patches.
        feature: what similarity is measured on: "tokens" or "keys".
    """

    needs = ("places",)
    window: int = 2
    feature: str = "tokens"

    def select(self, context: Context) -> Merges:
        return _match_in_windows(context, self.window).take(most=int(at(self.r, context.layer)))

    def match_macs(self, n: Tensor, d: int) -> Tensor:
        return bipartite_macs(n, d + 2)


def _match_in_windows(context: Context, window: int) -> Matches:
    """The best matches among the tokens of each window."""
    rows, columns = (context.places // window).unbind(1)
    return match(context, rows * (1 + columns.max()) + columns)


@dataclass(frozen=True)
class CappedThreshold(SimilarPairs, ThresholdPolicy):
    """Pairs above the layer's threshold, but at most a number of them: `Threshold` and `TopR` are its two ends.

    Args:
        thresholds: one cosine threshold for every block, or one per block.
        caps: most tokens an image may lose at every block, or one number per block.
    """

    caps: int | Sequence[int] = per_layer(Integral, "caps")

    def active(self, layer: int) -> bool:
        return super().active(layer) and at(self.caps, layer) > 0

    def bounds(self, context: Context) -> tuple[float, int]:
        return at(self.thresholds, context.layer), int(at(self.caps, context.layer))


@dataclass(frozen=True)
class ConfidenceThreshold(SimilarPairs, ThresholdPolicy):
    """Thresholds that fall as the model becomes sure of its answer: images that are hard to tell keep their tokens.

    Merging harms the few images of which the model is unsure; similarity of tokens does not know which they are. What
    the last norm and the head make of the tokens of a layer does (logit lens; of vision transformers, Vilas et al.,
    2310.18969). Where p is the difference of the two largest probabilities, pairs merge whose

        1 - similarity  <  (1 - threshold) (unsure + (sure - unsure) p)^2

    Args:
        thresholds: one for every block, or one per block.
        unsure, sure: the root of what the distance from 1 is multiplied by at p = 0 and at p = 1.
        first: blocks before this one take the thresholds as they are: nothing is known yet.
        feature, size_aware: as of `tokmerge.merging.policies.Threshold`.
    """

    needs = ("confidence",)
    unsure: float = 0.0
    sure: float = 1.0
    first: int = 0
    feature: str = "tokens"
    size_aware: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.unsure, self.sure, self.first) < 0:
            raise ValueError("ConfidenceThreshold: unsure, sure and first cannot be negative")

    def bounds(self, context: Context) -> tuple[float | Tensor, None]:
        distance = 1 - at(self.thresholds, context.layer)
        if context.layer < self.first:
            return 1 - distance, None
        factor = self.unsure + (self.sure - self.unsure) * context.confidence
        return 1 - distance * factor.square()[:, None], None


@dataclass(frozen=True)
class RelativeThreshold(LayerPolicy):
    """Pairs whose similarity is z standard deviations above the mean of their own image and layer.

    Args:
        z: for every block, or one per block; infinity switches a block off.
    """

    z: float | Sequence[float] = per_layer(Real, "z values")

    def active(self, layer: int) -> bool:
        return at(self.z, layer) < float("inf")

    def select(self, context: Context) -> Merges:
        matches = match(context)
        mean, deviation = moments(matches.similarity)
        return matches.take(mean + at(self.z, context.layer) * deviation)
