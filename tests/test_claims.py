import json

import pandas as pd
import pytest
import yaml
from tokmerge import claims
from tokmerge.claims import Condition, judge
from tokmerge.io import paths

GAIN, DROP = Condition("gain", "a", "≥", 0), Condition("drop", "b", "≤", "a")


@pytest.mark.parametrize(
    ("numbers", "verdict"),
    [
        ({"a": 2, "b": 2}, "held"),
        ({"a": 2, "b": 3}, "in part"),
        ({"a": -1, "b": 3}, "not held"),
        ({"a": 2}, "untestable"),
        ({"b": 2}, "untestable"),
        # The worst ends decide, on both sides.
        ({"a": 2, "a.low": 1, "a.high": 3, "b": 0.5, "b.ci95": 0.5}, "held"),
        ({"a": 2, "a.low": 1, "a.high": 3, "b": 0.5, "b.ci95": 0.6}, "in part"),
        ({"a": 2, "a.ci95": 2.5, "b": 0.5}, "not held"),
    ],
)
def test_verdicts(numbers, verdict):
    assert judge([GAIN, DROP], numbers).verdict == verdict


def test_a_claim_says_what_it_rests_on():
    judged = judge([GAIN, DROP], {"a": 2, "a.ci95": 0.5, "b": 3})
    assert judged.conditions == [("gain 2 (1.5 to 2.5), to be ≥ 0", True), ("drop 3, to be ≤ 1.5", False)]
    assert judged.estimate == (2, 1.5, 2.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda claims: claims[1].update(name=claims[0]["name"]), "two claims are called search"),
        (lambda claims: claims[0].update(mood="good"), "claim 'search'.*mood"),
        (lambda claims: claims[0]["conditions"][0].__setitem__(2, "<"), "unknown comparison <"),
    ],
)
def test_bad_files_are_named(tmp_path, change, message):
    content = yaml.safe_load((paths.root() / "params" / "claims.yaml").read_text())
    change(content["claims"])
    (tmp_path / "claims.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=message):
        claims.load_claims(str(tmp_path / "claims.yaml"))


def test_the_committed_verdicts_follow_from_the_committed_numbers():
    numbers = json.loads((paths.root() / "figures" / "numbers.json").read_text())
    _, found = claims.load_claims("params/claims.yaml")
    expected = claims.verdicts(found, numbers)
    assert {key: value for key, value in numbers.items() if key.startswith("claims.")} == pytest.approx(expected)
    assert set(claims.VERDICTS) >= {value for key, value in expected.items() if key.endswith(".verdict")}


def test_the_numbers_of_a_study_by_hand():
    study = pd.DataFrame({
        "method": ["threshold", "threshold", "ToMe", "ToMe"], "cost": ["macs_ratio", "bytes_ratio"] * 2,
        "value": [0.4, 0.2, 0.5, 0.1], "low": [0.3, 0.1, 0.5, 0.1], "high": [0.5, 0.3, 0.6, 0.2],
        "score_drop": [0.01, 0.02, 0.03, 0.04], "drop_ci95": 0.001, "macs_ratio": [0.4, 0.8, 0.5, 0.9],
        "bytes_ratio": [0.7, 0.2, 0.6, 0.1],
    })  # fmt: skip
    found = claims.chosen_numbers("x.select", study, {"ours": ["threshold"], "all": ["threshold", "ToMe"]})
    assert found["x.select.threshold.macs"] == 0.4
    assert found["x.select.threshold.macs.low"] == 0.3
    assert found["x.select.threshold.drop"] == 0.01
    assert found["x.select.threshold.bytes.drop"] == 0.02
    assert (found["x.select.tome.bytes.macs"], found["x.select.tome.macs.bytes"]) == (0.9, 0.6)
    assert (found["x.select.best_all.macs"], found["x.select.best_all.macs.method"]) == (0.4, "threshold")
    assert (found["x.select.best_all.bytes"], found["x.select.best_all.bytes.high"]) == (0.1, 0.2)
    assert found["x.select.best_ours.bytes.method"] == "threshold"
    taught = pd.DataFrame({"cost": ["macs_ratio", "bytes_ratio"], "macs_ratio": [0.5, 0.6], "bytes_ratio": [0.3, 0.2],
                           "score_drop": 0.0, "drop_ci95": 0.0})  # fmt: skip
    found = claims.chosen_numbers("x", claims.ablated(taught), {})
    assert (found["x.one_threshold_taught.macs"], found["x.one_threshold_taught.bytes.high"]) == (0.5, 0.2)
    assert claims.chosen_numbers("x", claims.ablated(pd.DataFrame()), {}) == {}


def test_what_adaptivity_buys_is_read_at_the_fewest_macs():
    gains = pd.DataFrame({
        "method": "threshold", "cost": ["bytes_ratio", "macs_ratio", "macs_ratio"],
        "against": ["same counts", "same counts", "window pooling"], "gain": [0.5, 0.01, 0.02], "gain_ci95": 0.005,
    })  # fmt: skip
    assert claims.adaptivity_numbers("x", gains, "threshold", "_b") == pytest.approx({
        "x.adaptivity_b.drop_pp": 1, "x.adaptivity_b.drop_pp.ci95": 0.5, "x.adaptivity_b_pooling.drop_pp": 2,
        "x.adaptivity_b_pooling.drop_pp.ci95": 0.5,
    })  # fmt: skip
    assert claims.adaptivity_numbers("x", gains, "ToMe") == {}
