"""Merge policies: which tokens merge into which, at each layer.

A policy is a small frozen object with an attribute and four methods; attention, averaging, packing and cost are shared:

    feature                 what similarity is measured on, one of `tokmerge.merge.FEATURES`
    check(depth)            raise if it does not fit a model of that depth
    active(layer)           False: the layer is left exactly as it is
    select(context)         the merges of this layer, for the whole batch
    match_macs(n, d)        what choosing costs, from the number of tokens that may merge
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tokmerge.merge import FEATURES, Context, Matches, Merges, match


@runtime_checkable
class Policy(Protocol):
    """What the engine asks of a policy."""

    @property
    def feature(self) -> str:
        """What similarity is measured on, one of `tokmerge.merge.FEATURES`."""
        ...

    def check(self, depth: int) -> None:
        """Raise ValueError if the policy does not fit ``depth`` blocks."""
        ...

    def active(self, layer: int) -> bool:
        """False when nothing can merge at ``layer``."""
        ...

    def select(self, context: Context) -> Merges:
        """The merges of one layer."""
        ...

    def match_macs(self, n: Tensor, d: int) -> Tensor:
        """Multiply-accumulates of choosing among ``n`` (any shape) unprotected tokens with d-wide features."""
        ...


def per_layer(kind: str, name: str, values: object, number: type) -> tuple | Real:
    """A number, or one number per layer; TypeError / ValueError names the entry that is not."""
    what = "an integer" if number is Integral else "a number"

    def checked(value: object, where: str) -> Real:
        if isinstance(value, bool) or not isinstance(value, number) or math.isnan(value):  # type: ignore[arg-type]
            raise TypeError(f"{kind}: {name}{where} is {value!r}, not {what}")
        if number is Integral and value < 0:  # type: ignore[operator]
            raise ValueError(f"{kind}: {name}{where} is {value}, but cannot be negative")
        return value  # type: ignore[return-value]

    if isinstance(values, Sequence) and not isinstance(values, str):
        return tuple(checked(value, f"[{layer}]") for layer, value in enumerate(values))
    return checked(values, "")


def check_length(kind: str, name: str, values: object, depth: int) -> None:
    """Raise ValueError if there is not one value per block."""
    if isinstance(values, tuple) and len(values) != depth:
        raise ValueError(f"{kind}: {len(values)} {name} for a model of {depth} blocks: give one per block")


def check_feature(kind: str, feature: str) -> None:
    """Raise ValueError if there is no such matching feature."""
    if feature not in FEATURES:
        raise ValueError(f"{kind}: unknown feature {feature!r}: use one of {', '.join(FEATURES)}")


def at(values: object, layer: int) -> float:
    """The value of one layer."""
    return values[layer] if isinstance(values, tuple) else values  # type: ignore[return-value]


def bipartite_macs(n: Tensor, d: int) -> Tensor:
    """MACs of the similarities between sets A and B of n tokens."""
    a = n - n // 2
    return a * (n - a) * d


@dataclass(frozen=True)
class Threshold:
    """Token a merges into its best match b where their cosine similarity exceeds the layer's threshold.

    Adaptive: every image keeps as many tokens as it needs. A threshold of 1 or more switches its layer off.

    Args:
        thresholds: one cosine threshold for every block, or a sequence with one per block.
        feature: what similarity is measured on: ``"tokens"`` or ``"keys"``.

    Raises:
        TypeError: a threshold is not a number.
        ValueError: there is no such feature.

    >>> Threshold([0.9, 1.0]).active(1)
    False
    """

    thresholds: float | Sequence[float]
    feature: str = "tokens"

    def __post_init__(self) -> None:
        object.__setattr__(self, "thresholds", per_layer("Threshold", "thresholds", self.thresholds, Real))
        check_feature("Threshold", self.feature)

    def check(self, depth: int) -> None:
        check_length("Threshold", "thresholds", self.thresholds, depth)

    def active(self, layer: int) -> bool:
        return at(self.thresholds, layer) < 1.0

    def select(self, context: Context) -> Merges:
        matches = match(context)
        return matches.merges(matches.similarity > at(self.thresholds, context.layer))

    def match_macs(self, n: Tensor, d: int) -> Tensor:
        return bipartite_macs(n, d)


@dataclass(frozen=True)
class FixedR:
    """What policies that remove the same number of tokens from every image share: r, its checks, when it acts."""

    r: int | Sequence[int]
    # Peers match keys, as their papers say.
    feature: ClassVar[str] = "keys"

    def __post_init__(self) -> None:
        object.__setattr__(self, "r", per_layer(type(self).__name__, "r", self.r, Integral))

    def check(self, depth: int) -> None:
        check_length(type(self).__name__, "r values", self.r, depth)

    def active(self, layer: int) -> bool:
        return at(self.r, layer) > 0


@dataclass(frozen=True)
class TopR(FixedR):
    """The r most similar pairs merge, the same number in every image (ToMe, Bolya et al., 2210.09461).

    Args:
        r: tokens removed at every block, or a sequence with one number per block. Where fewer than r
            tokens can merge, all that can do.
        feature: what similarity is measured on; the method's own is the keys.

    >>> TopR([8, 0]).active(1)
    False
    """

    feature: str = "keys"  # type: ignore[misc]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_feature(type(self).__name__, self.feature)

    def select(self, context: Context) -> Merges:
        matches = match(context)
        return matches.merges(largest(matches.similarity, int(at(self.r, context.layer))))

    def match_macs(self, n: Tensor, d: int) -> Tensor:
        return bipartite_macs(n, d)


def largest(values: Tensor, r: int | Tensor) -> Tensor:
    """(B, A) bool: the r largest finite values of each row; of equal values the first. r: one for all, or (B, 1)."""
    order = values.argsort(dim=1, descending=True, stable=True)
    if isinstance(r, int):
        chosen = torch.zeros_like(values, dtype=torch.bool).scatter_(1, order[:, :r], True)
    else:
        first = torch.arange(values.shape[1], device=values.device) < r
        chosen = torch.zeros_like(values, dtype=torch.bool).scatter_(1, order, first)
    return chosen & values.isfinite()


def moments(similarity: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each row's finite values, (B, 1) each; 0 for a row without any."""
    finite = similarity.isfinite()
    count = finite.sum(1, keepdim=True).clamp(min=1)
    values = similarity.masked_fill(~finite, 0.0)
    mean = values.sum(1, keepdim=True) / count
    variance = ((values - mean).square() * finite).sum(1, keepdim=True) / count
    return mean, variance.sqrt()


@dataclass(frozen=True)
class PiToMe(FixedR):
    """Energy-based merging (Tran et al., 2405.16148): only tokens amid many similar ones may merge.

    The energy of token i is mean_j ELU(cos(m_i, m_j) - margin), margin = 0.75 (1 - l / L), over the other
    unprotected tokens j of its image. The 2r tokens of highest energy are candidates; in order of energy they
    alternate between A and B, and each a merges into its most similar b.

    Args:
        r: tokens removed at every block, or a sequence with one number per block. Where an image has
            fewer than 2r unprotected tokens, half of those it has.
    """

    def select(self, context: Context) -> Merges:
        layout, first = context.layout, context.protected
        metric = context.padded_metric[:, first:]
        valid = layout.valid[:, first:]
        n = valid.sum(1)
        scores = metric @ metric.transpose(1, 2)
        margin = 0.75 * (1 - context.layer / context.depth)
        pairs = valid[:, :, None] & valid[:, None, :] & ~torch.eye(valid.shape[1], dtype=torch.bool, device=n.device)
        energy = (F.elu(scores - margin) * pairs).sum(2) / (n - 1).clamp(min=1)[:, None]
        order = energy.masked_fill(~valid, float("-inf")).argsort(dim=1, descending=True, stable=True)

        r = (n // 2).clamp(max=int(at(self.r, context.layer)))
        widest = int(r.max())
        if widest == 0:
            nothing = order.new_empty(0)
            return Merges(nothing, nothing, r)
        used = torch.arange(widest, device=r.device) < r[:, None]
        a, b = order[:, : 2 * widest : 2], order[:, 1 : 2 * widest : 2]
        candidates = scores.gather(1, a[:, :, None].expand(-1, -1, scores.shape[2]))
        candidates = candidates.gather(2, b[:, None, :].expand(-1, widest, -1))
        similarity, best = candidates.masked_fill(~used[:, None, :], float("-inf")).max(dim=2)
        rows = layout.offsets[:, None] + first
        return Matches(similarity, rows + a, rows + b.gather(1, best)).merges(used)

    def match_macs(self, n: Tensor, d: int) -> Tensor:
        return n * n * d


@dataclass(frozen=True)
class Observe:
    """Merges nothing; keeps every best-match similarity it sees, for calibration.

    Attributes:
        feature: what similarity is measured on.
        seen: per layer, the (M,) similarities of each batch.
    """

    feature: str = "tokens"
    seen: dict[int, list[Tensor]] = field(default_factory=dict)

    def check(self, depth: int) -> None:
        pass

    def active(self, layer: int) -> bool:
        return True

    def select(self, context: Context) -> Merges:
        matches = match(context)
        similarity = matches.similarity
        self.seen.setdefault(context.layer, []).append(similarity[similarity.isfinite()].cpu())
        nothing = torch.zeros_like(similarity, dtype=torch.bool)
        return matches.merges(nothing)

    def match_macs(self, n: Tensor, d: int) -> Tensor:
        return bipartite_macs(n, d)

    def calibration(self) -> "Calibration":
        """The distribution of what was seen, at each layer."""
        grid = np.linspace(0, 1, 1001)
        rows = [np.quantile(torch.cat(self.seen[layer]).double(), grid) for layer in sorted(self.seen)]
        return Calibration(np.stack(rows))


@dataclass(frozen=True)
class Calibration:
    """Each layer's distribution of best-match similarity in the unmerged model.

    Raw cosines are badly scaled: most of a layer's mass sits within a few hundredths. A share u in [0, 1] of
    tokens to merge is a better coordinate; this maps it to the layer's cosine threshold.

    Attributes:
        quantiles: (L, Q) similarity at evenly spaced probabilities from 0 to 1.
    """

    quantiles: np.ndarray

    def thresholds(self, u: Sequence[float]) -> tuple[float, ...]:
        """Cosine thresholds that let a share u_l of layer l's set A merge.

        Args:
            u: one share per layer; 0: nothing merges (threshold 1), 1: everything in A merges (threshold -1).

        >>> Calibration(np.array([[0.0, 0.5, 1.0]])).thresholds([0.25])
        (0.75,)
        """
        if len(u) != len(self.quantiles):
            raise ValueError(f"{len(u)} shares for a calibration of {len(self.quantiles)} layers")
        for layer, share in enumerate(u):
            if not 0.0 <= share <= 1.0:
                raise ValueError(f"u[{layer}] is {share}, not a share between 0 and 1")
        grid = np.linspace(0, 1, self.quantiles.shape[1])
        inner = [float(np.interp(1 - share, grid, row)) for share, row in zip(u, self.quantiles, strict=True)]
        return tuple(1.0 if share == 0 else -1.0 if share == 1 else tau for share, tau in zip(u, inner, strict=True))
