"""An operating point: all that distinguishes one evaluation from another, as a value, as JSON and as a table's row."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import Tensor

from tokmerge.merging.matching import Policy
from tokmerge.merging.notation import policy_from_json, policy_to_json


@dataclass(frozen=True)
class Pruning:
    """Keep the visual tokens with most attention from the last prompt token, mean over heads, in one layer.

    Raises:
        ValueError: a share outside (0, 1], or no layer to read it from.
    """

    layer: int  #: layers that read all tokens; the last of them says which stay
    keep: float  #: share of the visual tokens that stays, at least one

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1 or self.layer < 1:
            raise ValueError(f"{self}: keep is a share above 0 and layer at least 1")

    def left(self, visual: Tensor) -> Tensor:
        """(B,) visual tokens left of so many."""
        return (visual * self.keep).round().long().clamp(min=1).minimum(visual)


@dataclass(frozen=True)
class Configuration:
    """An operating point of a vision transformer."""

    policy: Policy | None  #: what merges; None for nothing
    precision: str = "float16"  #: of the token values in the payload
    split_layer: int | None = None  #: blocks that run before the tokens are sent; None for all

    def row(self) -> dict[str, Any]:
        """Columns of a table: the policy's name for the eye, and all of it as JSON for `from_row`."""
        return {"policy": type(self.policy).__name__, "configuration": json.dumps(to_json(self))}


@dataclass(frozen=True)
class LlavaConfiguration(Configuration):
    """An operating point of a LLaVA; attributes as of `tokmerge.models.llava.patch`.

    >>> from_row(LlavaConfiguration(None, positions="first").row()).positions
    'first'
    """

    output_policy: Policy | None = None
    positions: str = "consecutive"
    weights: str = "one"
    cut: str = "cheaper"
    pruning: Pruning | None = None


def to_json(configuration: Configuration) -> dict[str, Any]:
    """An operating point as plain values.

    Raises:
        ValueError: it has a policy of one's own, which has no name here.
    """
    plain = dict(vars(configuration))
    for name in {"policy", "output_policy"} & set(plain):
        plain[name] = policy_to_json(plain[name])
    if plain.get("pruning") is not None:
        plain["pruning"] = asdict(plain["pruning"])
    return plain


def from_json(plain: Mapping[str, Any]) -> Configuration:
    """The operating point that `to_json` wrote.

    Raises:
        ValueError: a policy or an option of a name not known here.
    """
    kind, values = LlavaConfiguration if "positions" in plain else Configuration, dict(plain)
    if unknown := set(plain) - {part.name for part in fields(kind)}:
        raise ValueError(f"an operating point with {', '.join(sorted(unknown))}: this version does not know that")
    for name in {"policy", "output_policy"} & set(plain):
        values[name] = policy_from_json(plain[name])
    if values.get("pruning") is not None:
        values["pruning"] = Pruning(**values["pruning"])
    return kind(**values)


def from_row(row: Mapping[str, Any]) -> Configuration:
    """The operating point of a table's row, see `Configuration.row`."""
    return from_json(json.loads(row["configuration"]))
