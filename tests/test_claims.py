import pytest
from tokmerge.claims import CLAIMS, Condition, judge

ALL_MET = {
    "imagenet.dataset": "Fashion-MNIST",
    "imagenet.at_0.5pp.top1_drop": 0.004,
    "imagenet.at_0.5pp.macs_ratio": 0.70,
    "imagenet.at_0.5pp.bytes_ratio": 0.19,
    "search.hv64_fraction": 0.96,
    "search.hv64_fraction.sobol": 0.91,
    "search.hv64_fraction.nsga2": 0.89,
    "search.hv64_fraction.uniform": 0.88,
    "search.hv64_fraction.fixed_r": 0.83,
}


def verdicts(numbers):
    return {(verdict.claim.notebook, verdict.claim.dataset): verdict for verdict in judge(numbers)}


def test_nothing_measured_is_nothing_met():
    assert {verdict.verdict for verdict in judge({})} == {"not measured"}


def test_all_conditions_together_make_a_claim_met():
    image = verdicts(ALL_MET)["40_imagenet", "imagenet.dataset"]
    assert (image.verdict, image.dataset) == ("met", "Fashion-MNIST")
    assert [one.text for one in image.checked] == [
        "drop of top-1 0.004 (≤ 0.005)",
        "MACs ratio 0.7 (≤ 0.7)",
        "bytes ratio 0.19 (< 0.2)",
    ]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("imagenet.at_0.5pp.top1_drop", 0.0051),
        ("imagenet.at_0.5pp.macs_ratio", 0.701),
        ("imagenet.at_0.5pp.bytes_ratio", 0.2),
    ],
)
def test_one_condition_that_fails_makes_it_not_met(key, value):
    image = verdicts(ALL_MET | {key: value})["40_imagenet", "imagenet.dataset"]
    assert image.verdict == "not met"
    assert [one.met for one in image.checked].count(False) == 1


def test_one_number_that_is_missing_makes_it_not_measured():
    some = {key: value for key, value in ALL_MET.items() if not key.endswith("bytes_ratio")}
    image = verdicts(some)["40_imagenet", "imagenet.dataset"]
    assert image.verdict == "not measured"
    assert image.checked[2] == ("bytes ratio: not measured (imagenet.at_0.5pp.bytes_ratio)", None)


def test_a_limit_may_be_another_number():
    search = verdicts(ALL_MET)["31_search_study", "search.dataset"]
    assert search.verdict == "met"
    assert (
        verdicts(ALL_MET | {"search.hv64_fraction.nsga2": 0.97})["31_search_study", "search.dataset"].verdict
        == "not met"
    )
    one = Condition("a", "x", "<", "y")
    assert one.check({"x": 1.0}) == ("a: not measured (y)", None)
    assert one.check({"x": 1.0, "y": 1.0}).met is False


def test_claims_name_notebooks_in_the_order_of_the_story():
    stems = [claim.notebook for claim in CLAIMS]
    assert stems == sorted(stems)
