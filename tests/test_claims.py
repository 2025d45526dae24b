import json

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
    assert judged.conditions == [
        ("gain 2 (1.5 to 2.5), to be ≥ 0", True),
        ("drop 3, to be ≤ 1.5", False),
    ]
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
