"""Thresholds that only let neighbours merge: a merged token then stands for one region of the image.

Equal things at two places look the same. Merged into one token they are remembered, where they were is
not; a question may ask just that.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

from torch import Tensor

from tokmerge.merge import Context, Merges, match
from tokmerge.policies import at, bipartite_macs, check_feature, check_length, per_layer


@dataclass(frozen=True)
class LocalThreshold:
    """`tokmerge.policies.Threshold` among tokens that are near each other in the patch grid.

    Each a takes its best b among those within reach; a merged token's place is the mean over its patches.

    Args:
        thresholds: one cosine threshold for every block, or one per block; 1 or more switches a block off.
        reach: most rows and most columns between a and b, for every block or one number per block.
        feature: what similarity is measured on: "tokens" or "keys".

    >>> LocalThreshold([0.9, 1.0], reach=3).active(1)
    False
    """

    thresholds: float | Sequence[float]
    reach: float | Sequence[float]
    feature: str = "tokens"

    def __post_init__(self) -> None:
        object.__setattr__(self, "thresholds", per_layer("LocalThreshold", "thresholds", self.thresholds, Real))
        object.__setattr__(self, "reach", per_layer("LocalThreshold", "reach", self.reach, Real))
        check_feature("LocalThreshold", self.feature)

    def check(self, depth: int) -> None:
        check_length("LocalThreshold", "thresholds", self.thresholds, depth)
        check_length("LocalThreshold", "reach values", self.reach, depth)

    def active(self, layer: int) -> bool:
        return at(self.thresholds, layer) < 1.0

    def select(self, context: Context) -> Merges:
        matches = match(context, at(self.reach, context.layer))
        return matches.merges(matches.similarity > at(self.thresholds, context.layer))

    def match_macs(self, n: Tensor, d: int) -> Tensor:
        # Two differences for the distance of a pair.
        return bipartite_macs(n, d + 2)
