"""Who competes in visual question answering: a search space or a grid of routes for every method.

All share the engine, the positions and weights of merged tokens in the language model, and the payload.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tokmerge.language import Pruning
from tokmerge.local import LocalThreshold
from tokmerge.outliers import OutlierMerging
from tokmerge.peers import AttentionPruning, RandomPruning
from tokmerge.policies import PiToMe, Policy, Threshold, TopR
from tokmerge.routes import Route
from tokmerge.spaces import Space

# Of an even spread over the depth: a schedule may remove this many times as much at one layer.
STEEPEST = 3.0


def cosines(roots: Sequence[float]) -> tuple[float, ...]:
    """Thresholds as they are searched, by the cube root of how far down from 1 to -1: half of the range is above 0.75.

    >>> cosines([0.0, 0.5, 1.0])
    (1.0, 0.75, -1.0)
    """
    return tuple(1 - 2 * root**3 for root in roots)


def spaces(depth: int, n_tokens: int, parameters: int, **options: Any) -> dict[str, Space]:
    """Search spaces with the same number of parameters each, by the method's name.

    Args:
        depth: layers of the tower that are run.
        n_tokens: visual tokens of an unmerged image, a square grid.
        parameters: values interpolated over the depth; the local threshold gives up one of them for its window.
        **options: positions and weights of every route.

    Raises:
        ValueError: fewer than 3 parameters.
    """
    if parameters < 3:
        raise ValueError(f"parameters is {parameters}: at least 3 are needed")
    side, most = n_tokens**0.5, STEEPEST * n_tokens / depth

    def schedule(method: Callable[..., Policy]) -> Space:
        def build(r: Sequence[float]) -> Route:
            return Route(method(tuple(round(value) for value in r)), **options)

        return Space(depth, {"r": (0.0, most)}, build, parameters, settled={"method": method.__name__, **options})

    def threshold(root: Sequence[float]) -> Route:
        return Route(Threshold(cosines(root)), **options)

    def local(root: Sequence[float], window: float) -> Route:
        return Route(LocalThreshold(cosines(root), round(window)), **options)

    # Every integer from 2 to half the grid gets an equal part of the range.
    below, near = {"root": (0.0, 1.0)}, {"window": (1.5, side // 2 + 0.5)}
    return {
        "threshold": Space(depth, below, threshold, parameters, settled=options),
        "local threshold": Space(depth, below, local, parameters - 1, settled=options, scalars=near),
        "ToMe": schedule(TopR),
        "PiToMe": schedule(PiToMe),
    }


def grids(depth: int, text_depth: int, n_tokens: int, n: int, **options: Any) -> dict[str, list[Route]]:
    """Methods with one number to choose, n routes each (FastV: n for each of two layers), by the method's name.

    Args:
        depth: layers of the tower that are run.
        text_depth: layers of the language model.
        n_tokens: visual tokens of an unmerged image.
        n: how many routes.
        **options: positions and weights of every route, but of FastV's, which merges nothing.
    """
    shares = np.linspace(0.9, 0.05, n)
    # Removed at every layer so that such a share is left; removed at the last layer only.
    each = sorted({max(1, round(n_tokens * (1 - share) / depth)) for share in shares})
    late = [(*(0 for _ in range(depth - 1)), round(n_tokens * (1 - share))) for share in shares]
    after = sorted({min(layer, text_depth - 1) for layer in (1, 2)})
    routes: dict[str, list[Policy]] = {
        "one threshold": [Threshold(float(tau)) for tau in np.linspace(0.995, 0.8, n)],
        "ToMe constant": [TopR(r) for r in each],
        "attention pruning": [AttentionPruning(r) for r in each],
        "attention, last layer": [AttentionPruning(r) for r in late],
        "attention outliers": [OutlierMerging(depth - 1, float(spread)) for spread in np.linspace(-0.9, 3.0, n)],
        "random pruning": [RandomPruning(r) for r in each],
    }
    grid = {name: [Route(policy, **options) for policy in policies] for name, policies in routes.items()}
    grid["FastV"] = [Route(None, pruning=Pruning(layer, float(share))) for layer in after for share in shares]
    return grid
