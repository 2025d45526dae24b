"""Thresholds with a further condition: only neighbours, at most so many, relative to the image's own similarities."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

from torch import Tensor

from tokmerge.merging.matching import Context, Merges, bipartite_macs, match
from tokmerge.merging.policies import LayerPolicy, ThresholdPolicy, at, largest, moments, per_layer


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
        if context.place is None:
            raise ValueError("the policy needs the places of tokens in the patch grid, which are not known here")
        rows, columns = (context.place // at(self.window, context.layer)).unbind(1)
        matches = match(context, rows * (1 + columns.max()) + columns)
        return matches.merges(matches.similarity > at(self.thresholds, context.layer))

    def match_macs(self, n: Tensor, d: int) -> Tensor:
        # Two comparisons tell whether a pair is of one window.
        return bipartite_macs(n, d + 2)


@dataclass(frozen=True)
class CappedThreshold(ThresholdPolicy):
    """Pairs above the layer's threshold, but at most a number of them: `Threshold` and `TopR` are its two ends.

    Args:
        thresholds: one cosine threshold for every block, or one per block.
        caps: most tokens an image may lose at every block, or one number per block.
    """

    caps: int | Sequence[int] = per_layer(Integral, "caps")

    def active(self, layer: int) -> bool:
        return super().active(layer) and at(self.caps, layer) > 0

    def select(self, context: Context) -> Merges:
        matches = match(context)
        above = matches.similarity > at(self.thresholds, context.layer)
        return matches.merges(above & largest(matches.similarity, int(at(self.caps, context.layer))))


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
        return matches.merges(matches.similarity > mean + at(self.z, context.layer) * deviation)
