"""Which trials are worth having, and how good a set of them is.

Three things are minimised: the accuracy axis (see `objective.AXES`), the ratio of MACs and the ratio of
bytes, merged / unmerged. The unmerged model stands at (0, 1, 1).
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from botorch.utils.multi_objective.box_decompositions.dominated import DominatedPartitioning
from botorch.utils.multi_objective.pareto import is_non_dominated

from tokmerge.evaluation.objective import COSTS
from tokmerge.search.trials import COMPLETED


def objectives(table: pd.DataFrame, axis: str) -> np.ndarray:
    """(n, 3) values to minimise: the accuracy axis and the two costs."""
    return table[[axis, *COSTS]].to_numpy(float)


def best(table: pd.DataFrame, axis: str) -> pd.DataFrame:
    """The completed trials that no other one beats in all three objectives, cheapest in MACs first.

    >>> rows = pd.DataFrame({"kl": [0.1, 0.2, 0.2], "macs_ratio": [0.5, 0.4, 0.6], "bytes_ratio": [0.3, 0.3, 0.3]})
    >>> best(rows, "kl").index.tolist()
    [1, 0]
    """
    rows = table[table.status == COMPLETED] if "status" in table else table
    chosen = is_non_dominated(-torch.tensor(objectives(rows, axis)))
    return rows[chosen.numpy()].sort_values(["macs_ratio", "bytes_ratio", axis])


def hypervolume(values: np.ndarray, reference: Sequence[float]) -> float:
    """Share of the box from 0 to the reference point (3,) that the points (n, 3), to minimise, dominate.

    The reference is the worst value worth having on each axis, (0, 0, 0) an ideal nobody reaches: 1 would be no loss
    at no cost. Points beyond the reference on any axis count for nothing.

    >>> round(hypervolume(np.array([[0.05, 0.5, 0.2], [0.2, 0.1, 0.1]]), (0.1, 1.0, 1.0)), 3)
    0.2
    """
    worst = torch.tensor(reference, dtype=torch.double)
    points = torch.tensor(np.asarray(values, float).reshape(-1, len(worst)))
    points = points[(points < worst).all(1)]
    if not len(points):
        return 0.0
    return float(DominatedPartitioning(-worst, -points).compute_hypervolume() / worst.prod())


def trace(values: np.ndarray, reference: Sequence[float]) -> np.ndarray:
    """The hypervolume after each evaluation: (n, 3) in order -> (n,)."""
    front = np.empty((0, len(reference)))
    volumes: list[float] = []
    for value in values:
        if (value < np.asarray(reference)).all() and not (front <= value).all(1).any():
            front = np.vstack([front[~(value <= front).all(1)], value])
            volumes.append(hypervolume(front, reference))
        else:
            volumes.append(volumes[-1] if volumes else 0.0)
    return np.array(volumes)
