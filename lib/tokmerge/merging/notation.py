"""How a policy is written down: plain values for JSON, checked when they are read."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from tokmerge.merging import peers, policies, thresholds
from tokmerge.merging.matching import Policy

# Every policy there is, by the name it is written down with.
_KINDS: tuple[Any, ...] = (
    policies.PiToMe, policies.Threshold, policies.TopR, thresholds.CappedThreshold, thresholds.ConfidenceThreshold,
    thresholds.LocalThreshold, thresholds.LocalTopR, thresholds.RelativeThreshold, peers.AdaMerge,
    peers.AttentionPruning, peers.DominantMerging, peers.OutlierMerging, peers.RandomMerging, peers.RandomPruning,
    peers.StaticRates, peers.ToFu, peers.WindowPooling,
)  # fmt: skip
POLICIES = {kind.__name__: kind for kind in _KINDS}


def policy_to_json(policy: Policy | None) -> dict[str, Any] | None:
    """A policy as plain values; None for nothing that merges.

    >>> policy_to_json(policies.Threshold([0.9, 1.0]))
    {'kind': 'Threshold', 'thresholds': [0.9, 1.0], 'feature': 'tokens', 'size_aware': False}
    """
    if policy is None:
        return None
    name = type(policy).__name__
    if name not in POLICIES:
        raise ValueError(f"a {name} cannot be written down: it is none of {', '.join(POLICIES)}")
    values = {part.name: getattr(policy, part.name) for part in fields(policy)}  # type: ignore[arg-type]
    return {"kind": name, **{key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}}


def policy_from_json(plain: Mapping[str, Any] | None) -> Policy | None:
    """The policy that `policy_to_json` wrote.

    Raises:
        ValueError: no such policy, or values that do not fit it.

    >>> policy_from_json({"kind": "TopR", "r": [2, 3]})
    TopR(r=(2, 3), feature='keys', size_aware=False)
    """
    if plain is None:
        return None
    arguments = dict(plain)
    kind = arguments.pop("kind", None)
    if kind not in POLICIES:
        raise ValueError(f"unknown policy {kind!r}: use one of {', '.join(POLICIES)}")
    try:
        return POLICIES[kind](**arguments)
    except TypeError as error:
        raise ValueError(str(error)) from error
