"""Every method's own search space, so that all of them can be searched with the same budget.

A schedule over the depth makes a method stronger than one number for all blocks; comparing searched thresholds with
anything but searched peers would not be fair. Counts are searched as shares of what the tokens present could lose to
a bipartite match, half of them: no method may lose more.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import tokmerge
from tokmerge.peers import (
    AdaMerge,
    AttentionPruning,
    CappedThreshold,
    RelativeThreshold,
    StaticRates,
    ToFu,
)
from tokmerge.policies import PiToMe, Policy, TopR
from tokmerge.spaces import LOWEST_COSINE, Configuration, Space, threshold_space


def families(
    depth: int,
    n_tokens: int,
    statistics: tuple[Sequence[float], Sequence[float]],
    parameters: int,
) -> dict[str, Space]:
    """Search spaces with the same number of parameters each, by the method's name.

    Args:
        depth: number of blocks.
        n_tokens: tokens that may merge.
        statistics: for AdaMerge (`tokmerge.rates.similarity_statistics`).
        parameters: values interpolated over the depth; methods with two profiles get half of them for each.

    Raises:
        ValueError: an odd number of parameters, or fewer than 4.
    """
    if parameters % 2 or parameters < 4:
        raise ValueError(f"parameters is {parameters}: an even number from 4 is needed")
    half, whole = parameters // 2, {"share": (0.0, 1.0)}

    def schedule(method: Callable[..., Policy], times: float = 1.0) -> Space:
        def build(share: Sequence[float]) -> Configuration:
            return Configuration(method(tuple(round(times * r) for r in counts(share, n_tokens))))

        return Space(depth, whole, build, parameters, settled={"method": str(method((1,) * depth))})

    def static(prune: Sequence[float], merge: Sequence[float]) -> Configuration:
        left, pruned, merged = n_tokens, [], []
        for first, second in zip(prune, merge, strict=True):
            pruned.append(removed(first, left))
            merged.append(removed(second, left - pruned[-1]))
            left -= pruned[-1] + merged[-1]
        return Configuration(StaticRates(pruned, merged))

    def capped(tau: Sequence[float], cap: Sequence[float]) -> Configuration:
        return Configuration(CappedThreshold(tuple(tau), counts(cap, n_tokens)))

    def relative(z: Sequence[float]) -> Configuration:
        return Configuration(RelativeThreshold(tuple(z)))

    def adamerge(r: Sequence[int]) -> Policy:
        return AdaMerge(r, *statistics)

    return {
        "threshold": threshold_space("cosine", depth, knots=parameters),
        "capped threshold": Space(depth, {"tau": (LOWEST_COSINE, 1.0), "cap": (0.0, 1.0)}, capped, half),
        "relative threshold": Space(depth, {"z": (-3.0, 3.0)}, relative, parameters),
        "ToMe": schedule(TopR),
        "ToMe on tokens": schedule(partial(TopR, feature="tokens")),
        "PiToMe": schedule(PiToMe),
        "ToFu": schedule(ToFu),
        # The share of r that an average image loses is one half.
        "AdaMerge": schedule(adamerge, 2.0),
        "DiffRate": Space(depth, {"prune": (0.0, 1.0), "merge": (0.0, 1.0)}, static, half),
        "attention pruning": schedule(AttentionPruning),
    }


def sent_space(space: Space, split_layer: int, precisions: Sequence[str]) -> Space:
    """A space joined with the precision of the values that are sent.

    Args:
        space: of the policy.
        split_layer: blocks that run before the tokens are sent.
        precisions: of `tokmerge.wire.PRECISIONS`, coarser and coarser; one parameter, rounded down, chooses.
    """

    def build(coarseness: float, **rest: Any) -> Configuration:
        chosen = precisions[min(int(coarseness), len(precisions) - 1)]
        return replace(space.build(**rest), precision=chosen, split_layer=split_layer)

    settled = {**space.settled, "split_layer": split_layer, "precisions": list(precisions)}
    scalars = {**space.scalars, "coarseness": (0.0, float(len(precisions)))}
    return replace(space, build=build, settled=settled, scalars=scalars)


def rebuild(row: Mapping[str, Any]) -> Configuration:
    """The configuration that `Configuration.row` gave this row.

    Args:
        row: policy, its own fields, precision, split_layer if set.

    Raises:
        ValueError: no such policy.
    """
    fields = dict(row)
    name, sent = (
        fields.pop("policy"),
        {"precision": fields.pop("precision"), "split_layer": fields.pop("split_layer", None)},
    )
    if name == "None":
        return Configuration(None, **sent)
    kind = getattr(tokmerge, name, None)
    if kind is None:
        raise ValueError(f"unknown policy {name!r}")
    return Configuration(kind(**fields), **sent)


def counts(shares: Sequence[float], n_tokens: int) -> tuple[int, ...]:
    """Tokens to lose at every block: a share of what those still present could lose to a bipartite match.

    Args:
        shares: between 0 and 1, one per block.
        n_tokens: before the first block.

    >>> counts([1.0, 0.5, 0.0], 8)
    (4, 1, 0)
    """
    found = []
    for share in shares:
        found.append(removed(share, n_tokens))
        n_tokens -= found[-1]
    return tuple(found)


def removed(share: float, n_tokens: int) -> int:
    """A share of the half of n tokens.

    >>> removed(0.5, 9)
    2
    """
    return round(share * (n_tokens // 2))
