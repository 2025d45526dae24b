"""Every method's own search space, so that all of them can be searched with the same budget.

A schedule over the depth makes a method stronger than one number for all blocks; comparing searched thresholds with
anything but searched peers would not be fair.
"""

from collections.abc import Callable, Sequence

from tokmerge.peers import (
    AdaMerge,
    AttentionPruning,
    CappedThreshold,
    RandomMerging,
    RandomPruning,
    RelativeThreshold,
    StaticRates,
    ToFu,
)
from tokmerge.policies import Calibration, PiToMe, Policy, TopR
from tokmerge.spaces import Configuration, Space, threshold_space

# Of an even spread over the depth: a schedule may remove this many times as much at one block.
STEEPEST = 3.0


def families(
    depth: int,
    n_tokens: int,
    calibration: Calibration,
    statistics: tuple[Sequence[float], Sequence[float]],
    parameters: int,
) -> dict[str, Space]:
    """Search spaces with the same number of parameters each, by the method's name.

    Args:
        depth: number of blocks.
        n_tokens: tokens that may merge.
        calibration: distribution of similarities at each block (`tokmerge.evaluate.calibrate`).
        statistics: for AdaMerge (`tokmerge.rates.similarity_statistics`).
        parameters: values interpolated over the depth; methods with two profiles get half of them for each.

    Raises:
        ValueError: an odd number of parameters, or fewer than 4.
    """
    if parameters % 2 or parameters < 4:
        raise ValueError(f"parameters is {parameters}: an even number from 4 is needed")
    most = STEEPEST * n_tokens / depth

    def schedule(method: Callable[..., Policy], highest: float = most) -> Space:
        def build(r: Sequence[float]) -> Configuration:
            return Configuration(method(counts(r)))

        return Space(depth, {"r": (0.0, highest)}, build, parameters, settled={"method": method.__name__})

    def static(prune: Sequence[float], merge: Sequence[float]) -> Configuration:
        return Configuration(StaticRates(counts(prune), counts(merge)))

    def capped(u: Sequence[float], cap: Sequence[float]) -> Configuration:
        return Configuration(CappedThreshold(calibration.thresholds(u), counts(cap)))

    def relative(z: Sequence[float]) -> Configuration:
        return Configuration(RelativeThreshold(tuple(z)))

    def adamerge(r: Sequence[int]) -> Policy:
        return AdaMerge(r, *statistics)

    half, even = parameters // 2, (0.0, most)
    return {
        "threshold": threshold_space("calibrated", depth, calibration, parameters),
        "capped threshold": Space(depth, {"u": (0.0, 1.0), "cap": even}, capped, half),
        "relative threshold": Space(depth, {"z": (-3.0, 3.0)}, relative, parameters, rising=False),
        "ToMe": schedule(TopR),
        "PiToMe": schedule(PiToMe),
        "ToFu": schedule(ToFu),
        # The share of r that an average image loses is one half.
        "AdaMerge": schedule(adamerge, 2 * most),
        "DiffRate": Space(depth, {"prune": even, "merge": even}, static, half),
        "attention pruning": schedule(AttentionPruning),
        "random merging": schedule(RandomMerging),
        "random pruning": schedule(RandomPruning),
    }


def counts(values: Sequence[float]) -> tuple[int, ...]:
    """Rounded to whole tokens.

    >>> counts([0.2, 3.7])
    (0, 4)
    """
    return tuple(round(value) for value in values)
