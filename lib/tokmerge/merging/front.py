"""Policy files: a small, versioned, validated document that holds the policies worth using.

A front is a set of operating points of one model, none better than another in accuracy, compute and
bytes at once. `Front.pick` turns a requirement into a policy that `tokmerge.patch` runs.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokmerge.io import store
from tokmerge.merging.matching import Policy
from tokmerge.merging.notation import policy_from_json, policy_to_json

FRONT_VERSION = 5
MEASURED = ("score", "macs_ratio", "bytes_ratio")


@dataclass(frozen=True)
class Point:
    """One operating point, measured on the front's data."""

    policy: Policy  #: what merges
    score: float  #: accuracy, or what else its answers are scored by, in [0, 1]
    macs_ratio: float  #: multiply-accumulates, merged / unmerged
    bytes_ratio: float  #: payload bytes, merged / unmerged


@dataclass(frozen=True)
class Front:
    """Operating points of one model."""

    model: str  #: name of the model the policies were found for
    dataset: str  #: data they were measured on, split included
    unmerged_score: float  #: the model's accuracy on that data without merging
    points: tuple[Point, ...]  #: the operating points
    weights: str | None = None  #: `tokmerge.models.merged.digest_weights` of the model; None if it is not known

    def within(self, max_drop: float) -> tuple[Point, ...]:
        """The points that lose no more of it than that against the unmerged model.

        >>> from tokmerge.merging.policies import TopR
        >>> Front("vit", "toy", 0.9, (Point(TopR(1), 0.895, 0.5, 0.2), Point(TopR(2), 0.7, 0.2, 0.1))).within(0.005)
        (Point(policy=TopR(r=1, feature='keys', size_aware=False), score=0.895, macs_ratio=0.5, bytes_ratio=0.2),)
        """
        # Slack for rounding: 0.9 - 0.895 is a hair above 0.005 in binary.
        return tuple(point for point in self.points if self.unmerged_score - point.score <= max_drop + 1e-9)

    def pick(
        self, max_drop: float | None = None, max_macs: float | None = None, max_bytes: float | None = None
    ) -> Policy:
        """The policy of the best point that meets every bound given.

        With ``max_drop`` the best is the one with fewest MACs, without it the most accurate one.

        Args:
            max_drop: largest allowed loss of score against the unmerged model (0.005: half a point).
            max_macs: largest allowed MACs ratio, merged / unmerged.
            max_bytes: largest allowed bytes ratio, merged / unmerged.

        Raises:
            ValueError: no point meets the bounds; the message says which values can be reached.
        """
        fitting = [
            point
            for point in (self.points if max_drop is None else self.within(max_drop))
            if (max_macs is None or point.macs_ratio <= max_macs)
            and (max_bytes is None or point.bytes_ratio <= max_bytes)
        ]
        if not fitting:
            least_drop = self.unmerged_score - max(point.score for point in self.points)
            raise ValueError(
                f"no point of the front ({self.model} on {self.dataset}) has max_drop={max_drop}, "
                f"max_macs={max_macs}, max_bytes={max_bytes} together; taken one by one it reaches a drop of "
                f"{least_drop:.4f}, MACs {min(point.macs_ratio for point in self.points):.3f}, "
                f"bytes {min(point.bytes_ratio for point in self.points):.3f}"
            )
        if max_drop is None:
            return min(fitting, key=lambda point: (-point.score, point.macs_ratio, point.bytes_ratio)).policy
        return min(fitting, key=lambda point: (point.macs_ratio, point.bytes_ratio, -point.score)).policy


def build_front(
    rows: Iterable[Mapping[str, Any]], model: str, dataset: str, unmerged_score: float, weights: str | None = None
) -> Front:
    """A front from rows with a policy, score, macs_ratio and bytes_ratio; what else they hold is left out."""
    points = [Point(row["policy"], **{name: float(row[name]) for name in MEASURED}) for row in rows]
    return Front(model, dataset, float(unmerged_score), tuple(points), weights)


def save_front(front: Front, path: str | Path) -> None:
    """Write a policy file; ValueError if a point has a policy of one's own, which has no name here."""
    points = [{**vars(point), "policy": policy_to_json(point.policy)} for point in front.points]
    store.save_json({"version": FRONT_VERSION, **vars(front), "points": points}, path)


def load_front(path: str | Path, weights: str | None = None) -> Front:
    """Read and check a policy file.

    Args:
        path: of the file.
        weights: digest of the model that is to use it; None: whatever model it was found for.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not a valid policy file, or of another model; the message names file and entry.
    """
    content = store.load_json(path)
    if content.get("version") != FRONT_VERSION:
        raise ValueError(f"{path}: version {content.get('version')!r}, this package reads version {FRONT_VERSION}")

    def number(holder: dict[str, Any], key: str, where: str = "") -> float:
        value = holder.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{path}: {where}{key} is {value!r}, not a number")
        return float(value)

    entries, points, counts = content.get("points"), [], set()
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: points must be a non-empty list")
    for index, entry in enumerate(entries):
        where = f"points[{index}]."
        plain = entry.get("policy") if isinstance(entry, dict) else None
        if not isinstance(plain, dict):
            raise ValueError(f"{path}: {where}policy must be an object with a kind and its values")
        try:
            json.dumps(plain, allow_nan=False)
            policy = policy_from_json(plain)
        except ValueError as error:
            raise ValueError(f"{path}: {where}policy: {error}") from error
        assert policy is not None
        counts |= {len(value) for value in plain.values() if isinstance(value, list)}
        points.append(Point(policy, *(number(entry, name, where) for name in MEASURED)))
    if len(counts) > 1 or 0 in counts:
        raise ValueError(f"{path}: all points need the same number of values per policy, one for each block")
    for key in ("model", "dataset"):
        if not isinstance(content.get(key), str):
            raise ValueError(f"{path}: {key} is {content.get(key)!r}, not a string")
    found = content.get("weights")
    if weights is not None and found not in (None, weights):
        raise ValueError(f"{path}: found for {content['model']} with weights {found}, this model's are {weights}")
    return Front(content["model"], content["dataset"], number(content, "unmerged_score"), tuple(points), found)
