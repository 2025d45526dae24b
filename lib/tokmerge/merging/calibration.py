"""What policies meet on their way: one observer, and the distribution of similarity that thresholds are read from."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokmerge.merging.matching import Context, Merges, Policy, match, needed_by


@dataclass(frozen=True)
class Observed:
    """A policy that is watched: every layer goes through a hook."""

    policy: Policy | None  #: what merges; None for nothing
    #: from what the policy sees of a layer, and a function that gives the policy's merges, to the merges that are made
    hook: Callable[[Context, Callable[[], Merges]], Merges]
    metric: str = "tokens"  #: what similarity is measured on where there is no policy

    @property
    def feature(self) -> str:
        return self.metric if self.policy is None else self.policy.feature

    @property
    def needs(self) -> Sequence[str]:
        return () if self.policy is None else needed_by(self.policy)

    def check(self, depth: int) -> None:
        if self.policy is not None:
            self.policy.check(depth)

    def active(self, layer: int) -> bool:
        return True

    def select(self, context: Context) -> Merges:
        def choose() -> Merges:
            if self.policy is not None and self.policy.active(context.layer):
                return self.policy.select(context)
            nothing = context.layout.lengths.new_empty(0)
            return Merges(nothing, nothing, torch.zeros_like(context.layout.lengths))

        return self.hook(context, choose)

    def match_macs(self, n: Tensor, d: int) -> Tensor:
        return torch.zeros_like(n) if self.policy is None else self.policy.match_macs(n, d)


def observe(run: Callable[[Policy], Any], keep: Callable[[Context], Tensor], policy: Policy | None = None,
            metric: str = "tokens") -> list[Tensor]:  # fmt: skip
    """What every layer shows while a model runs: per layer, what was kept of all batches, one after the other.

    Args:
        run: runs a model with the policy it is given.
        keep: what to keep of one layer of one batch.
        policy, metric: as of `Observed`.
    """
    kept: dict[int, list[Tensor]] = defaultdict(list)

    def hook(context: Context, choose: Callable[[], Merges]) -> Merges:
        kept[context.layer].append(keep(context).cpu())
        return choose()

    run(Observed(policy, hook, metric))
    return [torch.cat(kept[layer]) for layer in sorted(kept)]


def best_similarities(context: Context) -> Tensor:
    """(M,) similarity of every token of set A with its best match."""
    similarity = match(context).similarity
    return similarity[similarity.isfinite()]


@dataclass(frozen=True)
class Calibration:
    """Each layer's distribution of best-match similarity in the unmerged model.

    Raw cosines are badly scaled: most of a layer's mass sits within a few hundredths. A share u in [0, 1] of
    tokens to merge is a better coordinate; this maps it to the layer's cosine threshold.
    """

    quantiles: np.ndarray  #: (L, Q) similarity at evenly spaced probabilities from 0 to 1

    @classmethod
    def of(cls, run: Callable[[Policy], Any], metric: str = "tokens") -> "Calibration":
        """The distribution that ``run`` meets, see `observe`."""
        grid, met = np.linspace(0, 1, 1001), observe(run, best_similarities, metric=metric)
        return cls(np.stack([np.quantile(layer.double(), grid) for layer in met]))

    def thresholds(self, u: Sequence[float]) -> tuple[float, ...]:
        """Cosine thresholds that let a share u_l of layer l's set A merge.

        Args:
            u: one share per layer; 0: nothing merges (threshold 1), 1: everything in A merges (threshold -1).

        Raises:
            ValueError: another number of shares, or one outside [0, 1].

        >>> Calibration(np.array([[0.0, 0.5, 1.0]])).thresholds([0.25])
        (0.75,)
        """
        if len(u) != len(self.quantiles):
            raise ValueError(f"{len(u)} shares for a calibration of {len(self.quantiles)} layers")
        taus, grid = [], np.linspace(0, 1, self.quantiles.shape[1])
        for layer, (share, row) in enumerate(zip(u, self.quantiles, strict=True)):
            if not 0.0 <= share <= 1.0:
                raise ValueError(f"u[{layer}] is {share}, not a share between 0 and 1")
            tau = float(np.interp(1 - share, grid, row).clip(-1, 1))
            taus.append(1.0 if share == 0 else -1.0 if share == 1 else tau)
        return tuple(taus)
