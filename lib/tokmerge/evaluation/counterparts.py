"""What adaptivity buys: the same cost without it.

A policy that gives every image its own number of tokens is set against the same matching with the same numbers for all,
and against pooling that does not look, at equal MACs; both are found from counts alone, without looking at accuracy.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from tokmerge.merging.matching import Policy
from tokmerge.merging.policies import TopR
from tokmerge.models.cost import ViTCost


def scaled_counts(tokens: Tensor, factors: Iterable[float]) -> list[tuple[int, ...]]:
    """Numbers to lose at every block: so many times those that images lost there on average, each once.

    Args:
        tokens: (n, L + 1) counts of n images.
        factors: how many times.

    >>> scaled_counts(torch.tensor([[9, 6, 5], [9, 7, 4]]), [1.0, 2.0])
    [(2, 2), (5, 4)]
    """
    lost = -tokens.double().mean(0).diff().numpy()
    # Rounded in sum, so that no block's rest is lost.
    sums = [np.concatenate([[0], (factor * lost).cumsum()]).round().astype(int) for factor in factors]
    return list(dict.fromkeys(tuple(int(count) for count in np.diff(gone)) for gone in sums))


def same_counts(
    tokens: Tensor, macs: float, cost: ViTCost, fixed: Callable[[tuple[int, ...]], Policy] = TopR
) -> Policy:
    """The policy that takes the same number of tokens off every image, at the mean MACs of one that does not.

    Every block loses what images lost there on average; a common factor then makes up for what a mean of counts costs
    less than the mean of their costs, as attention grows with the square.

    Args:
        tokens: (n, L + 1) counts of n images under the adaptive policy.
        macs: their mean multiply-accumulates.
        cost: of the model.
        fixed: takes the numbers to lose.

    Returns:
        Of the policies whose numbers are so many times the mean ones, the one nearest in MACs.
    """
    start = round(tokens[:, 0].double().mean().item())
    policies = [fixed(r) for r in scaled_counts(tokens, np.linspace(0.7, 1.1, 401))]
    left = [torch.tensor([[start, *(start - np.cumsum(policy.r))]]) for policy in policies]  # type: ignore[attr-defined]
    return nearest(policies, left, macs, cost)


def nearest(policies: Sequence[Policy], counts: Sequence[Tensor], macs: float, cost: ViTCost) -> Policy:
    """Of policies that give every image the same counts, (1, L + 1) each, the one whose MACs are nearest."""
    distances = [abs(cost.total(n, policy).item() - macs) for policy, n in zip(policies, counts, strict=True)]
    return policies[int(np.argmin(distances))]
