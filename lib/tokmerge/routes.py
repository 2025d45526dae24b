"""How an image gets from the camera into an answer: every choice there is, in one value, and as JSON."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tokmerge import llava
from tokmerge.language import Pruning
from tokmerge.llava import MergedLlava
from tokmerge.local import LocalThreshold
from tokmerge.outliers import OutlierMerging
from tokmerge.peers import AttentionPruning, RandomMerging, RandomPruning
from tokmerge.policies import PiToMe, Policy, Threshold, TopR
from tokmerge.spaces import Configuration

KINDS: dict[str, Any] = {
    kind.__name__: kind
    for kind in (
        AttentionPruning,
        LocalThreshold,
        OutlierMerging,
        PiToMe,
        Pruning,
        RandomMerging,
        RandomPruning,
        Threshold,
        TopR,
    )
}


@dataclass(frozen=True)
class Route(Configuration):
    """A configuration of `tokmerge.llava.patch`; attributes as there.

    >>> Route(Threshold((0.9, 1.0)), positions="first").row()["policy"]
    'Threshold'
    """

    output_policy: Policy | None = None
    positions: str = "consecutive"
    weights: str = "one"
    cut: str = "cheaper"
    pruning: Pruning | None = None

    def row(self) -> dict[str, Any]:
        """The route as columns of a table."""
        output = self.output_policy and f"{self.output_policy}"
        pruning = self.pruning and f"{self.pruning}"
        chosen = {"positions": self.positions, "weights": self.weights, "cut": self.cut}
        return {**super().row(), **chosen, "output_policy": output, "pruning": pruning}


def take(model: Any, configuration: Configuration) -> MergedLlava:
    """The model with a configuration's policies attached."""
    if not isinstance(configuration, Route):
        configuration = Route(configuration.policy, configuration.precision)
    values = {name: getattr(configuration, name) for name in configuration.__dataclass_fields__}
    # A LLaVA is cut where its tower or its projector ends.
    del values["split_layer"]
    return llava.patch(model, values.pop("policy"), **values)


def to_json(route: Route) -> dict[str, Any]:
    """A route as plain values, for a JSON file.

    >>> from_json(to_json(Route(TopR((2, 3)), weights="size"))) == Route(TopR((2, 3)), weights="size")
    True
    """
    plain: dict[str, Any] = {}
    for name in route.__dataclass_fields__:
        value = getattr(route, name)
        kind = type(value).__name__
        plain[name] = {"kind": kind, **asdict(value)} if kind in KINDS else value
    return plain


def from_json(plain: Mapping[str, Any]) -> Route:
    """The route that `to_json` wrote.

    Raises:
        ValueError: a policy or an option of a name not known here.
    """
    values = dict(plain)
    unknown = [name for name in values if name not in Route.__dataclass_fields__]
    for name in ("policy", "output_policy", "pruning"):
        if values.get(name) is not None:
            arguments = dict(values[name])
            kind = arguments.pop("kind", None)
            if kind in KINDS:
                values[name] = KINDS[kind](**arguments)
            else:
                unknown.append(str(kind))
    if unknown:
        raise ValueError(f"a route with {', '.join(unknown)}: this version does not know that")
    return Route(**values)
