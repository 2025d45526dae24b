"""Who competes: every method's own search space, so that all can be searched with the same budget, or its grid.

A schedule over the depth makes a method stronger than one number for all blocks; comparing searched thresholds with
anything but searched peers would not be fair. For images, counts are searched by the square root of the share of what
the tokens present could lose to a bipartite match, half of them (no method may lose more), and thresholds by the square
root of how far they are below 1: so equally spread points spread over the cost. For questions, all share the engine,
the positions and weights of merged tokens in the language model, and the payload.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from tokmerge.evaluation.calibrate import thresholds_for_rates
from tokmerge.merging import peers
from tokmerge.merging.matching import Policy
from tokmerge.merging.policies import PiToMe, Threshold, TopR
from tokmerge.merging.thresholds import CappedThreshold, ConfidenceThreshold, LocalThreshold, RelativeThreshold
from tokmerge.models.configuration import Configuration, LlavaConfiguration
from tokmerge.models.language_model import Pruning
from tokmerge.search.baselines import pooling
from tokmerge.search.space import FARTHEST, Space, cosines, policy_space, threshold_space

SHARE = (0.0, 1.0)
# How far below 1 thresholds of images go where sizes are allowed for.
FARTHEST_SIZE_AWARE = 1.5
# Of an even spread over the depth: a schedule may remove this many times as much at one layer.
STEEPEST = 3.0


def image_spaces(
    depth: int, n_tokens: int, statistics: tuple[Sequence[float], Sequence[float]], parameters: int,
    run: Callable[[Policy], Any],
) -> dict[str, Space]:  # fmt: skip
    """Search spaces with the same number of parameters each, by the method's name.

    Args:
        depth: number of blocks.
        n_tokens: tokens that may merge.
        statistics: for AdaMerge (`tokmerge.evaluation.calibrate.similarity_statistics`).
        parameters: values interpolated over the depth; methods with two profiles get half of them for each.
        run: runs the model on calibration images with the policy it is given; what the calibrated threshold searches
            are the numbers of tokens that these lose in the mean (`tokmerge.evaluation.calibrate`).

    Raises:
        ValueError: an odd number of parameters, or fewer than 4.
    """
    if parameters % 2 or parameters < 4:
        raise ValueError(f"parameters is {parameters}: an even number from 4 is needed")

    def schedule(method: Callable[..., Policy], times: float = 1.0) -> Space:
        def policy(root: Sequence[float]) -> Policy:
            return method(tuple(round(times * r) for r in counts(root, n_tokens)))

        settled = {"method": str(method((1,) * depth))}
        return policy_space(depth, {"root": SHARE}, policy, parameters, settled=settled)

    def static(prune: Sequence[float], merge: Sequence[float]) -> Policy:
        roots = [root for both in zip(prune, merge, strict=True) for root in both]
        lost = counts(roots, n_tokens)
        return peers.StaticRates(lost[::2], lost[1::2])

    def size_aware(root: Sequence[float]) -> Policy:
        return Threshold(cosines(root, FARTHEST_SIZE_AWARE), size_aware=True)

    def confident(root: Sequence[float], unsure: float, sure: float) -> Policy:
        below = cosines(root, FARTHEST_SIZE_AWARE)
        return ConfidenceThreshold(below, unsure, sure, depth // 3, size_aware=True)

    def capped(root: Sequence[float], cap: Sequence[float]) -> Policy:
        return CappedThreshold(cosines(root), counts(cap, n_tokens))

    def calibrated(root: Sequence[float]) -> Policy:
        return thresholds_for_rates(run, counts(root, n_tokens), "tokens", size_aware=True)

    half, below, doubt = parameters // 2, {"root": SHARE}, {"unsure": (0.0, 1.0), "sure": (1.0, 2.0)}
    return {
        "threshold": threshold_space(depth, parameters),
        "size-aware threshold": policy_space(
            depth, below, size_aware, parameters, settled={"size-aware": FARTHEST_SIZE_AWARE}
        ),
        "calibrated threshold": policy_space(depth, below, calibrated, parameters, settled={"calibrated": "tokens"}),
        "confidence threshold": policy_space(
            depth, below, confident, parameters - 2, settled={"confidence": FARTHEST_SIZE_AWARE}, scalars=doubt
        ),
        "capped threshold": policy_space(depth, {**below, "cap": SHARE}, capped, half, settled={"farthest": FARTHEST}),
        "relative threshold": policy_space(depth, {"z": (-3.0, 3.0)}, RelativeThreshold, parameters),
        "ToMe": schedule(TopR),
        "ToMe on tokens": schedule(partial(TopR, feature="tokens")),
        "size-aware ToMe": schedule(partial(TopR, feature="tokens", size_aware=True)),
        "PiToMe": schedule(partial(PiToMe, unprotected=0.5)),
        "ToFu": schedule(peers.ToFu),
        # The share of r that an average image loses is one half.
        "AdaMerge": schedule(lambda r: peers.AdaMerge(r, *statistics), 2.0),
        "DiffRate": policy_space(depth, {"prune": SHARE, "merge": SHARE}, static, half),
        "attention pruning": schedule(peers.AttentionPruning),
    }


def sent_space(space: Space, splits: Sequence[int], precisions: Sequence[str]) -> Space:
    """A space joined with where the model is cut and with the precision of the values that are sent.

    Args:
        space: of the policy.
        splits: blocks that run before the tokens are sent; of several one parameter, rounded down, chooses.
        precisions: of `tokmerge.wire.PRECISIONS`, coarser and coarser; one parameter, rounded down, chooses.
    """

    def build(coarseness: float, cut: float = 0.0, **rest: Any) -> Configuration:
        sent = {"precision": _chosen(precisions, coarseness), "split_layer": _chosen(splits, cut)}
        return replace(space.build(**rest), **sent)

    scalars = {**space.scalars, "coarseness": (0.0, float(len(precisions)))}
    where: dict[str, Any] = {"split_layer": splits[0]}
    if len(splits) > 1:
        where, scalars["cut"] = {"splits": list(splits)}, (0.0, float(len(splits)))
    settled = {**space.settled, **where, "precisions": list(precisions)}
    return replace(space, build=build, settled=settled, scalars=scalars)


def _chosen(options: Sequence[Any], value: float) -> Any:
    return options[min(int(value), len(options) - 1)]


def counts(roots: Sequence[float], n_tokens: int) -> tuple[int, ...]:
    """Tokens to lose at every block: a share of what those still present could lose to a bipartite match.

    Args:
        roots: of these shares, one per block.
        n_tokens: before the first block.

    >>> counts([1.0, 0.7, 0.0], 8)
    (4, 1, 0)
    """
    found = []
    for root in roots:
        found.append(round(root * root * (n_tokens // 2)))
        n_tokens -= found[-1]
    return tuple(found)


def question_cosines(roots: Sequence[float]) -> tuple[float, ...]:
    """Thresholds of questions, by the cube root of how far down from 1 to -1: half of the range is above 0.75.

    >>> question_cosines([0.0, 0.5, 1.0])
    (1.0, 0.75, -1.0)
    """
    return tuple(1 - 2 * root**3 for root in roots)


def question_spaces(depth: int, n_tokens: int, parameters: int, **options: Any) -> dict[str, Space]:
    """Search spaces with the same number of parameters each, by the method's name.

    Args:
        depth: layers of the tower that are run.
        n_tokens: visual tokens of an unmerged image, a square grid.
        parameters: values interpolated over the depth; the local threshold gives up one of them for its window.
        **options: positions and weights of every configuration.

    Raises:
        ValueError: fewer than 3 parameters.
    """
    if parameters < 3:
        raise ValueError(f"parameters is {parameters}: at least 3 are needed")
    configure = partial(LlavaConfiguration, **options)

    def schedule(method: Callable[..., Policy]) -> Space:
        def policy(r: Sequence[float]) -> Policy:
            return method(tuple(round(value) for value in r))

        most, settled = STEEPEST * n_tokens / depth, {"method": str(method((1,) * depth)), **options}
        return policy_space(depth, {"r": (0.0, most)}, policy, parameters, configure, settled=settled)

    def threshold(root: Sequence[float]) -> Policy:
        return Threshold(question_cosines(root))

    def local(root: Sequence[float], window: float) -> Policy:
        return LocalThreshold(question_cosines(root), round(window))

    # Every integer from 2 to half the grid gets an equal part of the range.
    below, near = {"root": SHARE}, {"window": (1.5, n_tokens**0.5 // 2 + 0.5)}
    return {
        "threshold": policy_space(depth, below, threshold, parameters, configure, settled=options),
        "local threshold": policy_space(depth, below, local, parameters - 1, configure, settled=options, scalars=near),
        "ToMe": schedule(TopR),
        "ToMe on tokens": schedule(partial(TopR, feature="tokens")),
        "PiToMe": schedule(partial(PiToMe, unprotected=0.5)),
    }


def question_grids(
    depth: int, text_depth: int, n_tokens: int, n: int, **options: Any
) -> dict[str, list[LlavaConfiguration]]:
    """Methods with one number to choose, n configurations each (FastV: n for each of two layers), by the method's name.

    Args:
        depth, text_depth: layers of the tower that are run, and of the language model.
        n_tokens: visual tokens of an unmerged image.
        n: how many configurations.
        **options: positions and weights of every configuration, but of FastV's, which merges nothing.
    """
    shares = np.linspace(0.9, 0.05, n)
    # Removed at every layer so that such a share is left; removed at the last layer only.
    each = sorted({max(1, round(n_tokens * (1 - share) / depth)) for share in shares})
    late = [(*(0 for _ in range(depth - 1)), round(n_tokens * (1 - share))) for share in shares]
    after = sorted({min(layer, text_depth - 1) for layer in (1, 2)})
    # The usual rule, 1.5, among them; VisionZip's ratio of dominant to contextual tokens, 54 to 10.
    spreads = [1.5, *map(float, np.linspace(-0.9, 3.0, n - 1))]
    budgets = [(round(0.84 * share * n_tokens), max(1, round(0.16 * share * n_tokens))) for share in shares]
    policies: dict[str, list[Policy]] = {
        "one threshold": [Threshold(float(tau)) for tau in np.linspace(0.995, 0.8, n)],
        "ToMe constant": [TopR(r) for r in each],
        "attention pruning": [peers.AttentionPruning(r) for r in each],
        "attention, last layer": [peers.AttentionPruning(r) for r in late],
        "PruMerge": [peers.OutlierMerging(depth - 1, spread) for spread in spreads],
        "PruMerge+": [peers.OutlierMerging(depth - 1, spread, samples=3) for spread in spreads],
        "VisionZip": [peers.DominantMerging(depth - 1, *few) for few in budgets],
        "window pooling": pooling(depth, n),
        "random pruning": [peers.RandomPruning(r) for r in each],
    }
    grids = {name: [LlavaConfiguration(policy, **options) for policy in some] for name, some in policies.items()}
    prunings = [Pruning(layer, float(share)) for layer in after for share in shares]
    return grids | {"FastV": [LlavaConfiguration(None, pruning=pruning) for pruning in prunings]}
