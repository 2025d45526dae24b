"""Policies that choose by thresholds and by numbers of tokens, and what all policies with values per layer share.

A policy is a small frozen object that does what `tokmerge.merging.matching.Policy` says; attention, averaging, packing
and cost are the engine's.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from tokmerge.merging.matching import FEATURES, Context, Merges, best_among, bipartite_macs, blocks, match, ranked


def per_layer(number: type, plural: str) -> Any:
    """A field of `LayerPolicy`: one number for every layer or a sequence with one per layer; ``plural`` names many."""
    return field(metadata={"per_layer": (number, plural)})


def check_length(kind: str, plural: str, values: object, depth: int) -> None:
    """Raise ValueError if there is not one value per block."""
    if isinstance(values, tuple) and len(values) != depth:
        raise ValueError(f"{kind}: {len(values)} {plural} for a model of {depth} blocks: give one per block")


def at(values: object, layer: int) -> float:
    """The value of one layer."""
    return values[layer] if isinstance(values, tuple) else values  # type: ignore[return-value]


@dataclass(frozen=True)
class LayerPolicy:
    """What policies with `per_layer` fields share: the checks of their values, and the cost of one bipartite match."""

    # Not annotated: fields, with their place among the arguments, only where a subclass lets them be chosen.
    feature = "tokens"
    size_aware = False
    needs: ClassVar[Sequence[str]] = ()
    compares: ClassVar[bool] = True
    averages: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, (number, _) in self._per_layer().items():
            values = getattr(self, name)
            values = values.tolist() if hasattr(values, "tolist") else values  # numpy's and torch's
            if isinstance(values, Sequence) and not isinstance(values, str):
                values = tuple(self._checked(f"{name}[{layer}]", value, number) for layer, value in enumerate(values))
            else:
                values = self._checked(name, values, number)
            object.__setattr__(self, name, values)
        if self.feature not in FEATURES:
            kind = type(self).__name__
            raise ValueError(f"{kind}: unknown feature {self.feature!r}: use one of {', '.join(FEATURES)}")

    def _per_layer(self) -> dict[str, tuple[type, str]]:
        return {part.name: part.metadata["per_layer"] for part in fields(self) if "per_layer" in part.metadata}

    def _checked(self, where: str, value: Any, number: type) -> Any:
        if isinstance(value, bool) or not isinstance(value, number) or math.isnan(value):  # type: ignore[arg-type]
            what = "an integer" if number is Integral else "a number"
            raise TypeError(f"{type(self).__name__}: {where} is {value!r}, not {what}")
        if number is Integral and value < 0:  # type: ignore[operator]
            raise ValueError(f"{type(self).__name__}: {where} is {value}, but cannot be negative")
        return int(value) if number is Integral else float(value)  # type: ignore[arg-type, call-overload]

    def check(self, depth: int) -> None:
        for name, (_, plural) in self._per_layer().items():
            check_length(type(self).__name__, plural, getattr(self, name), depth)

    def match_macs(self, n: Tensor, d: int) -> Tensor:
        return bipartite_macs(n, d + 3 * self.size_aware)


@dataclass(frozen=True)
class ThresholdPolicy(LayerPolicy):
    """What policies with a cosine threshold share."""

    OFF: ClassVar[float] = 1.0  # switches a block off: no cosine is larger
    thresholds: float | Sequence[float] = per_layer(Real, "thresholds")

    def _checked(self, where: str, value: Any, number: type) -> float:
        checked = super()._checked(where, value, number)
        lowest = -math.inf if self.size_aware else -1.0
        if where.startswith("thresholds") and not lowest <= checked <= 1:
            kind = type(self).__name__
            raise ValueError(f"{kind}: {where} is {value}, but a cosine lies between -1 and 1 (1, {kind}.OFF, is off)")
        return checked

    def active(self, layer: int) -> bool:
        return at(self.thresholds, layer) < 1.0


class SimilarPairs(LayerPolicy, ABC):
    """What policies share that merge the most similar pairs of neighbours, wherever they are."""

    @abstractmethod
    def bounds(self, context: Context) -> tuple[float | Tensor, int | Tensor | None]:
        """Arguments of `Matches.take`."""

    def select(self, context: Context) -> Merges:
        return match(context, size_aware=self.size_aware).take(*self.bounds(context))


@dataclass(frozen=True)
class Threshold(SimilarPairs, ThresholdPolicy):
    """Token a merges into its best match b where their cosine similarity exceeds the layer's threshold.

    Adaptive: every image keeps as many tokens as it needs. A threshold of 1 (`Threshold.OFF`) switches its layer off.

    Args:
        thresholds: one cosine threshold for every block, or one per block: a sequence, an array or a tensor.
        feature: what similarity is measured on: ``"tokens"`` or ``"keys"``.
        size_aware: similarity allows for how many patches the two tokens stand for, see `matching.match`; thresholds
            may then be any number up to 1.

    Raises:
        TypeError: a threshold is not a number.
        ValueError: a threshold is no cosine, or there is no such feature.

    >>> Threshold([0.9, 1.0]).active(1)
    False
    """

    feature: str = "tokens"
    size_aware: bool = False

    def bounds(self, context: Context) -> tuple[float, None]:
        return at(self.thresholds, context.layer), None


@dataclass(frozen=True)
class FixedR(LayerPolicy):
    """What policies that remove the same number of tokens from every image share."""

    # Peers match keys, as their papers say.
    feature = "keys"
    r: int | Sequence[int] = per_layer(Integral, "r values")

    def active(self, layer: int) -> bool:
        return at(self.r, layer) > 0


@dataclass(frozen=True)
class TopR(SimilarPairs, FixedR):
    """The r most similar pairs merge, the same number in every image (ToMe, Bolya et al., 2210.09461).

    Args:
        r: tokens removed at every block, or a sequence with one number per block; at most half of the unprotected
            tokens an image has, rounded down.
        feature: what similarity is measured on; the method's own is the keys.
        size_aware: as of `Threshold`; not part of the method.

    >>> TopR([8, 0]).active(1)
    False
    """

    feature: str = "keys"
    size_aware: bool = False

    def bounds(self, context: Context) -> tuple[float, int | Tensor]:
        layout, r = context.layout, int(at(self.r, context.layer))
        if layout.uniform:
            return -math.inf, min(r, (layout.longest - context.protected) // 2)
        return -math.inf, ((layout.lengths - context.protected) // 2).clamp(max=r)[:, None]


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
    alternate between A and B, and each a merges into its most similar b. As published for DeiT, a first part of the
    blocks protects none: all tokens alternate in order of energy, and the r most similar pairs merge.

    Args:
        r: tokens removed at every block, or one number per block; at most half of the unprotected tokens an image has.
        unprotected: share of the blocks, from the first on, that protect no token; the published code has one half.
    """

    unprotected: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.unprotected <= 1:
            raise ValueError(f"PiToMe: unprotected is {self.unprotected}, but a share lies between 0 and 1")

    def select(self, context: Context) -> Merges:
        layout, first = context.layout, context.protected
        metric, valid = context.padded_metric[:, first:], layout.valid[:, first:]
        n = valid.sum(1)
        margin = 0.75 * (1 - context.layer / context.depth)
        energy = torch.cat([
            # What is no pair counts for nothing; a token and itself are none.
            F.elu(metric[:, start:stop] @ metric.transpose(1, 2) - margin)
            .masked_fill_(~valid[:, None, :], 0.0).diagonal_scatter(metric.new_zeros(len(n), stop - start), start, 1, 2)
            .sum(2)
            for start, stop in blocks(valid.shape[1], valid.numel())
        ], dim=1)  # fmt: skip
        order = ranked(energy / (n - 1).clamp(min=1)[:, None], valid, descending=True)

        r = (n // 2).clamp(max=int(at(self.r, context.layer)))
        if context.layer < self.unprotected * context.depth:
            return match(context, order=order).take(most=r[:, None])
        widest = max(r.tolist(), default=0)
        used = torch.arange(widest, device=r.device) < r[:, None]
        a, b = order[:, : 2 * widest : 2], order[:, 1 : 2 * widest : 2]
        of_a, of_b = (metric.gather(1, part[..., None].expand(-1, -1, metric.shape[2])) for part in (a, b))
        best = best_among(of_a, of_b, used)
        rows = layout.offsets[:, None] + first
        return Merges((rows + a)[used], (rows + b.gather(1, best))[used], r)

    def match_macs(self, n: Tensor, d: int) -> Tensor:
        return n * n * d
