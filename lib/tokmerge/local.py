"""Thresholds that only let neighbours merge: a merged token then stands for one region of the image.

Equal things at two places look the same. Merged into one token they are remembered, where they were is
not; a question may ask just that.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

from torch import Tensor

from tokmerge.merge import Context, Merges, match
from tokmerge.policies import at, bipartite_macs, check_feature, check_length, per_layer


@dataclass(frozen=True)
class LocalThreshold:
    """`tokmerge.policies.Threshold` among the tokens of a window of the patch grid.

    The grid is cut into square windows, from its first row and column on; a merged token's place is the mean over its
    patches. Tokens alternate between A and B window by window.

    Args:
        thresholds: one cosine threshold for every block, or one per block; 1 or more switches a block off.
        window: side of the windows in patches, for every block or one per block.
        feature: what similarity is measured on: "tokens" or "keys".

    >>> LocalThreshold([0.9, 1.0], window=3).active(1)
    False
    """

    thresholds: float | Sequence[float]
    window: int | Sequence[int]
    feature: str = "tokens"

    def __post_init__(self) -> None:
        object.__setattr__(self, "thresholds", per_layer("LocalThreshold", "thresholds", self.thresholds, Real))
        object.__setattr__(self, "window", per_layer("LocalThreshold", "window", self.window, Integral))
        if not all(self.window if isinstance(self.window, tuple) else [self.window]):
            raise ValueError(f"LocalThreshold: window is {self.window}, but a window has a side of 1 or more patches")
        check_feature("LocalThreshold", self.feature)

    def check(self, depth: int) -> None:
        check_length("LocalThreshold", "thresholds", self.thresholds, depth)
        check_length("LocalThreshold", "windows", self.window, depth)

    def active(self, layer: int) -> bool:
        return at(self.thresholds, layer) < 1.0

    def select(self, context: Context) -> Merges:
        if context.place is None:
            raise ValueError("the policy needs the places of tokens in the patch grid, which are not known here")
        rows, columns = (context.place // at(self.window, context.layer)).unbind(1)
        matches = match(context, rows * (1 + columns.max()) + columns)
        return matches.merges(matches.similarity > at(self.thresholds, context.layer))

    def match_macs(self, n: Tensor, d: int) -> Tensor:
        # Two comparisons tell whether a pair is of one window.
        return bipartite_macs(n, d + 2)
