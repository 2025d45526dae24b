"""Search spaces: a point is a few numbers between bounds, and stands for a configuration that can be evaluated."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from tokmerge.merging.matching import Policy
from tokmerge.merging.policies import Threshold
from tokmerge.models.configuration import Configuration

# How far below 1 cosine thresholds of images are searched: there, every layer merges nearly all it can.
FARTHEST = 0.6


@dataclass(frozen=True)
class Space:
    """Parameters to search over, and the configuration that a choice of them stands for.

    Args:
        depth: number of blocks.
        profiles: values that vary over the depth, by name, with the lowest and the highest.
        build: takes every profile as a list of ``depth`` values and every scalar, by name, and gives the configuration.
        knots: None for one parameter per block; else this many per profile, interpolated linearly over the depth.
        settled: what else tells this space from others.
        scalars: values that do not vary over the depth, by name, with the lowest and the highest.

    Raises:
        ValueError: a number of knots outside 2 to depth.

    >>> space = threshold_space(depth=3, knots=2)
    >>> space.configuration({"root_00": 0.0, "root_01": 1.0}).policy
    Threshold(thresholds=(1.0, 0.85, 0.4), feature='tokens', size_aware=False)
    """

    depth: int
    profiles: Mapping[str, tuple[float, float]]
    build: Callable[..., Configuration]
    knots: int | None = None
    settled: Mapping[str, Any] = field(default_factory=dict)
    scalars: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.knots is not None and not 2 <= self.knots <= self.depth:
            raise ValueError(f"{self.knots} knots over {self.depth} blocks: use 2 to {self.depth}, or None")

    @property
    def bounds(self) -> dict[str, tuple[float, float]]:
        """Lowest and highest value of each parameter."""
        n = self.knots or self.depth
        over_depth = {f"{name}_{index:02d}": limits for name, limits in self.profiles.items() for index in range(n)}
        return {**over_depth, **self.scalars}

    @property
    def about(self) -> dict[str, Any]:
        """What tells this space from another: bounds, depth, knots, and what is settled."""
        return {"bounds": self.bounds, "depth": self.depth, "knots": self.knots, **self.settled}

    def configuration(self, parameters: Mapping[str, float]) -> Configuration:
        """The configuration that these parameters stand for."""
        n = self.knots or self.depth
        places = np.linspace(0, self.depth - 1, n)
        values = {name: [float(parameters[f"{name}_{index:02d}"]) for index in range(n)] for name in self.profiles}
        over_depth = {name: np.interp(range(self.depth), places, part).tolist() for name, part in values.items()}
        return self.build(**over_depth, **{name: float(parameters[name]) for name in self.scalars})

    def curve(self, n: int) -> list[dict[str, float]]:
        """n choices with all parameters equal, evenly spaced inside the bounds: the uniform-threshold curve."""
        steps = [(index + 1) / (n + 1) for index in range(n)]
        return [{name: low + (high - low) * step for name, (low, high) in self.bounds.items()} for step in steps]

    def sobol(self, n: int, seed: int) -> list[dict[str, float]]:
        """n space-filling choices: Sobol points, scrambled with the seed."""
        engine = torch.quasirandom.SobolEngine(len(self.bounds), scramble=True, seed=seed)
        return self.scale(engine.draw(n, dtype=torch.double).numpy()) if n else []

    def scale(self, unit: np.ndarray) -> list[dict[str, float]]:
        """Points of the unit cube as parameters: (n, parameters) -> n choices."""
        limits = self.bounds.items()
        return [{name: low + (high - low) * float(x) for (name, (low, high)), x in zip(limits, row, strict=True)}
                for row in unit]  # fmt: skip


def policy_space(
    depth: int, profiles: Mapping[str, tuple[float, float]], policy: Callable[..., Policy], knots: int | None,
    configure: Callable[[Policy], Configuration] = Configuration, **rest: Any,
) -> Space:  # fmt: skip
    """A `Space` of what ``configure`` makes of policies; ``policy`` takes what ``Space.build`` takes."""
    return Space(depth, profiles, lambda **values: configure(policy(**values)), knots, **rest)


def threshold_space(depth: int, knots: int | None = None, feature: str = "tokens") -> Space:
    """The thresholds of all blocks, by the square root of how far they are below 1, so that costs spread evenly.

    Args:
        depth, knots: as in `Space`.
        feature: what the thresholds are compared with.
    """
    settled = {"farthest": FARTHEST} | ({} if feature == "tokens" else {"feature": feature})
    limits = {"root": (0.0, 1.0)}
    return policy_space(depth, limits, lambda root: Threshold(cosines(root), feature), knots, settled=settled)


def cosines(roots: Sequence[float], farthest: float = FARTHEST) -> tuple[float, ...]:
    """Thresholds by the square root of how far they are below 1.

    >>> cosines([0.0, 0.5, 1.0])
    (1.0, 0.85, 0.4)
    """
    return tuple(1 - farthest * root * root for root in roots)
