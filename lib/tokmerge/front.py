"""Policy files: a small, versioned, validated document that holds the thresholds worth using.

A front is a set of operating points of one model, none better than another in accuracy, compute and
bytes at once. `Front.pick` turns a requirement into a policy that `tokmerge.patch` runs.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from tokmerge import store
from tokmerge.merge import FEATURES
from tokmerge.policies import Threshold

FRONT_VERSION = 2


@dataclass(frozen=True)
class Point:
    """One operating point, measured on the front's data.

    Attributes:
        thresholds: cosine threshold of each block.
        top1: accuracy, in [0, 1].
        macs_ratio: multiply-accumulates, merged / unmerged.
        bytes_ratio: payload bytes, merged / unmerged.
    """

    thresholds: tuple[float, ...]
    top1: float
    macs_ratio: float
    bytes_ratio: float


@dataclass(frozen=True)
class Front:
    """Operating points of one model.

    Attributes:
        model: name of the model the thresholds were found for.
        dataset: data they were measured on, split included.
        unmerged_top1: the model's accuracy on that data without merging.
        points: the operating points.
        feature: what the thresholds are compared with, one of `tokmerge.merge.FEATURES`.
    """

    model: str
    dataset: str
    unmerged_top1: float
    points: tuple[Point, ...]
    feature: str = "tokens"

    def within(self, max_drop: float) -> tuple[Point, ...]:
        """The points that lose no more top-1 than that against the unmerged model.

        >>> Front("vit", "toy", 0.9, (Point((0.9,), 0.895, 0.5, 0.2), Point((0.8,), 0.7, 0.2, 0.1))).within(0.005)
        (Point(thresholds=(0.9,), top1=0.895, macs_ratio=0.5, bytes_ratio=0.2),)
        """
        # Slack for rounding: 0.9 - 0.895 is a hair above 0.005 in binary.
        return tuple(point for point in self.points if self.unmerged_top1 - point.top1 <= max_drop + 1e-9)

    def pick(
        self, max_drop: float | None = None, max_macs: float | None = None, max_bytes: float | None = None
    ) -> Threshold:
        """The policy of the best point that meets every bound given.

        With ``max_drop`` the best is the one with fewest MACs, without it the most accurate one.

        Args:
            max_drop: largest allowed loss of accuracy against the unmerged model (0.005: half a point).
            max_macs: largest allowed MACs ratio, merged / unmerged.
            max_bytes: largest allowed bytes ratio, merged / unmerged.

        Raises:
            ValueError: no point meets the bounds; the message says which values can be reached.

        >>> front = Front("vit", "toy", 0.9, (Point((0.9,), 0.89, 0.5, 0.2), Point((0.8,), 0.7, 0.2, 0.1)))
        >>> front.pick(max_drop=0.02)
        Threshold(thresholds=(0.9,), feature='tokens')
        """
        fitting = [
            point
            for point in (self.points if max_drop is None else self.within(max_drop))
            if (max_macs is None or point.macs_ratio <= max_macs)
            and (max_bytes is None or point.bytes_ratio <= max_bytes)
        ]
        if not fitting:
            least_drop = self.unmerged_top1 - max(point.top1 for point in self.points)
            raise ValueError(
                f"no point of the front ({self.model} on {self.dataset}) has max_drop={max_drop}, "
                f"max_macs={max_macs}, max_bytes={max_bytes} together; taken one by one it reaches a drop of "
                f"{least_drop:.4f}, MACs {min(point.macs_ratio for point in self.points):.3f}, "
                f"bytes {min(point.bytes_ratio for point in self.points):.3f}"
            )
        if max_drop is None:
            best = min(fitting, key=lambda point: (-point.top1, point.macs_ratio, point.bytes_ratio))
        else:
            best = min(fitting, key=lambda point: (point.macs_ratio, point.bytes_ratio, -point.top1))
        return Threshold(best.thresholds, self.feature)


def build(table: pd.DataFrame, model: str, dataset: str, unmerged_top1: float) -> Front:
    """A front from a table with one row per point: thresholds (one per block), top1, macs_ratio, bytes_ratio.

    >>> row = {"thresholds": [0.9, 0.8], "top1": 0.9, "macs_ratio": 0.3, "bytes_ratio": 0.1}
    >>> build(pd.DataFrame([row]), "vit", "toy", 0.91).pick(max_drop=0.02)
    Threshold(thresholds=(0.9, 0.8), feature='tokens')
    """
    points = [
        Point(
            thresholds=tuple(float(tau) for tau in row["thresholds"]),
            **{name: float(row[name]) for name in ("top1", "macs_ratio", "bytes_ratio")},
        )
        for row in table.to_dict("records")
    ]
    return Front(model, dataset, float(unmerged_top1), tuple(points))


def save_front(front: Front, path: str | Path) -> None:
    """Write a policy file."""
    store.save_json({"version": FRONT_VERSION, **asdict(front)}, path)


def load_front(path: str | Path) -> Front:
    """Read and check a policy file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not a valid policy file; the message names file and entry.
    """
    content = store.load_json(path)
    if content.get("version") != FRONT_VERSION:
        raise ValueError(f"{path}: version {content.get('version')!r}, this package reads version {FRONT_VERSION}")

    def number(holder: dict[str, Any], key: str, where: str) -> float:
        value = holder.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{path}: {where}{key} is {value!r}, not a number")
        return float(value)

    entries = content.get("points")
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: points must be a non-empty list")
    points = []
    for index, entry in enumerate(entries):
        where = f"points[{index}]."
        thresholds = entry.get("thresholds") if isinstance(entry, dict) else None
        if not isinstance(thresholds, list) or not thresholds:
            raise ValueError(f"{path}: {where}thresholds must be a non-empty list of numbers")
        values = dict(enumerate(thresholds))
        points.append(
            Point(
                thresholds=tuple(number(values, key, f"{where}thresholds.") for key in values),  # type: ignore[arg-type]
                **{key: number(entry, key, where) for key in ("top1", "macs_ratio", "bytes_ratio")},
            )
        )
    if len({len(point.thresholds) for point in points}) != 1:
        raise ValueError(f"{path}: all points need the same number of thresholds")
    for key in ("model", "dataset"):
        if not isinstance(content.get(key), str):
            raise ValueError(f"{path}: {key} is {content.get(key)!r}, not a string")
    if content.get("feature") not in FEATURES:
        raise ValueError(f"{path}: feature is {content.get('feature')!r}, not one of {', '.join(FEATURES)}")
    unmerged_top1 = number(content, "unmerged_top1", "")
    return Front(content["model"], content["dataset"], unmerged_top1, tuple(points), content["feature"])
