import dataclasses
import json

import numpy as np
import pytest
import tokmerge
from tokmerge import Threshold, TopR
from tokmerge.merging import front
from tokmerge.merging.calibration import Observed
from tokmerge.merging.front import Front, Point

POINTS = (
    Point(Threshold((0.99, 0.98)), score=0.900, macs_ratio=0.80, bytes_ratio=0.50),
    Point(Threshold((0.97, 0.96), "keys"), score=0.896, macs_ratio=0.50, bytes_ratio=0.20),
    Point(TopR((3, 4)), score=0.895, macs_ratio=0.45, bytes_ratio=0.25),
    Point(TopR(9, "tokens"), score=0.850, macs_ratio=0.20, bytes_ratio=0.05),
)
FRONT = Front("vit", "toy data", 0.9, POINTS)


@pytest.mark.parametrize(
    ("bounds", "best"),
    [
        ({"max_drop": 0.005}, 2),
        ({"max_drop": 0.004}, 1),
        ({"max_drop": 0.005, "max_bytes": 0.2}, 1),
        ({"max_drop": 1}, 3),
        ({}, 0),
        ({"max_macs": 0.5}, 1),
        ({"max_bytes": 0.1}, 3),
    ],
)
def test_pick_takes_fewest_macs_within_a_drop_and_else_the_most_accurate(bounds, best):
    assert FRONT.pick(**bounds) == POINTS[best].policy


def test_pick_says_what_can_be_reached():
    with pytest.raises(ValueError, match=r"drop of 0\.0000, MACs 0\.200, bytes 0\.050"):
        FRONT.pick(max_drop=0.001, max_macs=0.3)


def test_policy_file_round_trip(tmp_path):
    front.save_front(FRONT, tmp_path / "front.json")
    assert tokmerge.load_front(tmp_path / "front.json") == FRONT
    own = Front("vit", "toy data", 0.9, (Point(Observed(None, None), 0.9, 1.0, 1.0),))
    with pytest.raises(ValueError, match="a Observed cannot be written down"):
        front.save_front(own, tmp_path / "own.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(version=2), "version 2, this package reads version 5"),
        (lambda c: c.update(points=[]), "points must be a non-empty list"),
        (lambda c: c["points"][2].update(policy=None), r"points\[2\]\.policy must be an object"),
        (lambda c: c["points"][2]["policy"].update(kind="Magic"), r"points\[2\]\.policy: unknown policy 'Magic'"),
        (lambda c: c["points"][2]["policy"].update(colour="red"), r"points\[2\]\.policy: .*colour"),
        (lambda c: c["points"][0]["policy"].update(thresholds=[0.9, True]), r"points\[0\].*thresholds\[1\] is True"),
        (lambda c: c["points"][0]["policy"].update(thresholds=[0.9, float("inf")]), "policy: Out of range"),
        (lambda c: c.update(points=[c["points"][0] | {"policy": {"kind": "TopR", "r": []}}]), "same number of values"),
        (lambda c: c["points"][1]["policy"].update(feature="values"), "unknown feature 'values'"),
        (lambda c: c["points"][0].update(macs_ratio="0.5"), r"points\[0\]\.macs_ratio is '0\.5'"),
        (lambda c: c.pop("unmerged_score"), "unmerged_score is None"),
        (lambda c: c.update(model=3), "model is 3, not a string"),
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


def test_build_keeps_what_a_policy_file_needs():
    rows = [{**vars(point), "score": np.float32(point.score), "kl": 0.1} for point in POINTS]
    built = front.build_front(rows, "vit", "toy data", np.float32(0.9))
    assert [point.policy for point in built.points] == [point.policy for point in POINTS]
    assert built.points[3].score == pytest.approx(0.85)
    assert {type(built.unmerged_score), *(type(point.score) for point in built.points)} == {float}


def test_a_front_is_of_one_models_weights(tmp_path):
    front.save_front(dataclasses.replace(FRONT, weights="0123456789ab"), tmp_path / "front.json")
    assert tokmerge.load_front(tmp_path / "front.json", "0123456789ab").points == FRONT.points
    with pytest.raises(ValueError, match="found for vit with weights 0123456789ab, this model's are ba9876543210"):
        tokmerge.load_front(tmp_path / "front.json", "ba9876543210")
