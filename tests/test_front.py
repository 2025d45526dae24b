import json

import numpy as np
import pandas as pd
import pytest
import tokmerge
from tokmerge import front
from tokmerge.front import Front, Point

POINTS = (
    Point((0.99, 0.98), top1=0.900, macs_ratio=0.80, bytes_ratio=0.50),
    Point((0.97, 0.96), top1=0.896, macs_ratio=0.50, bytes_ratio=0.20),
    Point((0.95, 0.94), top1=0.895, macs_ratio=0.45, bytes_ratio=0.25),
    Point((0.90, 0.90), top1=0.850, macs_ratio=0.20, bytes_ratio=0.05),
)
FRONT = Front("vit", "toy data", 0.9, POINTS)


def test_pick_takes_fewest_macs_within_the_drop():
    assert FRONT.pick(max_drop=0.005) == tokmerge.Threshold(POINTS[2].thresholds)
    assert FRONT.pick(max_drop=0.004) == tokmerge.Threshold(POINTS[1].thresholds)
    assert FRONT.pick(max_drop=0.005, max_bytes=0.2) == tokmerge.Threshold(POINTS[1].thresholds)
    assert FRONT.pick(max_drop=1) == tokmerge.Threshold(POINTS[3].thresholds)


def test_pick_without_a_drop_takes_the_most_accurate():
    assert FRONT.pick() == tokmerge.Threshold(POINTS[0].thresholds)
    assert FRONT.pick(max_macs=0.5) == tokmerge.Threshold(POINTS[1].thresholds)
    assert FRONT.pick(max_bytes=0.1) == tokmerge.Threshold(POINTS[3].thresholds)


def test_pick_says_what_can_be_reached():
    with pytest.raises(ValueError, match=r"drop of 0\.0000, MACs 0\.200, bytes 0\.050"):
        FRONT.pick(max_drop=0.001, max_macs=0.3)


def test_policy_file_round_trip(tmp_path):
    front.save_front(FRONT, tmp_path / "front.json")
    assert tokmerge.load_front(tmp_path / "front.json") == FRONT


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(version=3), "version 3, this package reads version 2"),
        (lambda c: c.update(points=[]), "points must be a non-empty list"),
        (lambda c: c.update(points={"a": 1}), "points must be a non-empty list"),
        (lambda c: c["points"].append(3), r"points\[4\]\.thresholds must be"),
        (lambda c: c["points"][1].pop("top1"), r"points\[1\]\.top1 is None"),
        (lambda c: c["points"][0].update(macs_ratio="0.5"), r"points\[0\]\.macs_ratio is '0\.5'"),
        (lambda c: c["points"][0].update(thresholds=[0.9, True]), r"points\[0\]\.thresholds\.1 is True"),
        (lambda c: c["points"][0].update(thresholds=[0.9]), "same number of thresholds"),
        (lambda c: c.pop("unmerged_top1"), "unmerged_top1 is None"),
        (lambda c: c.update(model=3), "model is 3, not a string"),
        (lambda c: c.update(feature="values"), "feature is 'values', not one of tokens, keys"),
    ],
)
def test_a_bad_policy_file_is_named(tmp_path, change, message):
    path = tmp_path / "front.json"
    front.save_front(FRONT, path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as caught:
        tokmerge.load_front(path)
    assert "front.json" in str(caught.value)


def test_a_missing_policy_file():
    with pytest.raises(FileNotFoundError):
        tokmerge.load_front("nowhere/front.json")


def test_build_keeps_what_a_policy_file_needs():
    rows = pd.DataFrame([{**vars(point), "thresholds": np.array(point.thresholds), "kl": 0.1} for point in POINTS])
    assert front.build(rows, "vit", "toy data", np.float32(0.9)).points == POINTS
