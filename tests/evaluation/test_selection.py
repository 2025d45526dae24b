import numpy as np
import pandas as pd
import pytest
from tokmerge.evaluation import selection
from tokmerge.io import store
from tokmerge.merging.policies import Threshold
from tokmerge.models.configuration import Configuration


def table(**columns):
    return pd.DataFrame(columns)


TRIALS = table(
    method=["a"] * 4 + ["b"] * 2, seed=[0, 0, 0, 1, 0, 0], kl=[0.01, 0.02, 0.03, 0.5, 0.05, 0.01],
    macs_ratio=[0.6, 0.5, 0.2, 0.1, 0.3, 0.9], bytes_ratio=[0.5, 0.6, 0.7, 0.1, 0.2, 0.8],
)  # fmt: skip


def test_what_a_study_has_measured_is_known(tmp_path):
    rows = table(method=["a", "a", "b"], seed=[0, 1, 0], kl=[0.1, 0.2, 0.3])
    store.save_table(rows, tmp_path / "search.parquet")
    store.save_json({"dataset": "photos", "n_search": 32}, tmp_path / "study.json")
    known = selection.known_rows(str(tmp_path), {"dataset": "photos", "n_search": 32})
    assert known("search", method="a", seed=1).kl.tolist() == [0.2]
    assert known("search", method="b", seed=1) is None
    assert known("select", method="a", seed=1) is None, "there is no such table yet"
    with pytest.raises(ValueError, match="is of another study: its n_search is 32, not 64"):
        selection.known_rows(str(tmp_path), {"dataset": "photos", "n_search": 64})
    assert selection.known_rows(None, {"n_search": 64})("search", method="a") is None


def test_every_run_sends_its_cheapest_of_each_limit_to_select():
    chosen = selection.shortlist(TRIALS, "kl", [0.02, 0.05])
    # a, 0: within 0.02 trials 1 (MACs) and 0 (bytes), within 0.05 trial 2 and again 0; a, 1: none, so what loses least;
    # b: within 0.02 trial 5 alone, within 0.05 trial 4 for both.
    assert chosen.index.tolist() == [1, 0, 2, 3, 5, 4]


def test_the_cheapest_within_the_loss_is_chosen_or_nothing_merges():
    points = TRIALS.assign(score_drop=[0.0, 0.005, 0.006, 0.01, 0.005, -0.01])
    chosen = selection.choose(points, 0.005)
    found = chosen.set_index(["method", "seed", "cost"])[["macs_ratio", "bytes_ratio", "score_drop", "merged"]]
    assert found.loc[("a", 0, "macs_ratio")].tolist() == [0.5, 0.6, 0.005, True]
    assert found.loc[("a", 0, "bytes_ratio")].tolist() == [0.6, 0.5, 0.0, True]
    assert found.loc[("a", 1, "macs_ratio")].tolist() == [1.0, 1.0, 0.0, False]
    assert found.loc[("b", 0, "bytes_ratio")].tolist() == [0.3, 0.2, 0.005, True]


def test_an_interval_is_that_of_paired_differences():
    rng = np.random.default_rng(0)
    before, after = rng.random(4000) < 0.9, rng.random(4000) < 0.88
    mean, half = selection.paired(before, after)
    difference = before.astype(float) - after
    resampled = [rng.choice(difference, len(difference)).mean() for _ in range(2000)]
    low, high = np.quantile(resampled, [0.025, 0.975])
    assert mean == pytest.approx(difference.mean())
    assert half == pytest.approx((high - low) / 2, rel=0.1)
    assert selection.interval([0.0, 1.0, 1.0, 0.0]) == (0.5, pytest.approx(1.96 * (1 / 3) ** 0.5 / 2, rel=1e-4))


def test_a_method_is_the_run_in_the_middle():
    chosen = table(method=["a"] * 3 + ["b"] * 2, seed=[0, 1, 2, 0, 1], cost="macs_ratio",
                   macs_ratio=[0.4, 0.2, 0.3, 1.0, 0.5], score_drop=[0.1, 0.2, 0.3, 0.0, 0.5])  # fmt: skip
    found = selection.summarise(chosen, ["score_drop"]).set_index("method")
    assert found.loc["a", ["value", "low", "high", "score_drop", "n_runs"]].tolist() == [0.3, 0.2, 0.4, 0.3, 3]
    assert found.loc["b", ["value", "low", "high", "score_drop"]].tolist() == [1.0, 0.5, 1.0, 0.0]


@pytest.mark.parametrize("seed", range(20))
def test_halving_finds_what_measuring_all_would(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 40))
    costs = {name: np.clip(1 - rng.random(n), 0, 1) for name in ("macs_ratio", "bytes_ratio")}
    trials = pd.DataFrame({"method": "a", "seed": 0, "kl": rng.random(n), **costs})
    listed = selection.shortlist(trials, "kl", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
    asked = []

    def measure(row):
        asked.append(row["kl"])
        return {**row, "score_drop": row["kl"]}

    chosen = selection.choose(selection.halve(listed, "kl", measure, 0.35), 0.35)
    everything = selection.choose(listed.assign(score_drop=listed.kl), 0.35)
    pd.testing.assert_frame_equal(chosen, everything[chosen.columns])
    assert len(asked) == len(set(asked)) <= 2 * 3


def test_halving_believes_select_and_not_search():
    listed = table(kl=[0.03, 0.02, 0.01], macs_ratio=[0.1, 0.2, 0.3], bytes_ratio=[0.1, 0.2, 0.3])
    drops = {0.03: 0.01, 0.02: 0.0, 0.01: 0.02}
    found = selection.halve(listed, "kl", lambda row: {**row, "score_drop": drops[row["kl"]]}, 0.005)
    assert found.kl.tolist() == [0.02, 0.03]


@pytest.mark.parametrize(("max_drop", "chosen"), [(0.03, 0.7), (0.011, 0.9), (0.001, None)])
def test_a_family_is_measured_chosen_and_reported_on_images_of_its_own(max_drop, chosen):
    points = [Configuration(Threshold(tau)) for tau in (0.9, 0.7, 0.5)]
    seen = {"search": [], "select": [], "test": []}

    def measure(split, lost):
        def on(point):
            tau = point.policy.thresholds
            seen[split].append(tau)
            return {"kl": 1 - tau, "score_drop": lost * (1 - tau), "score_drop_sem": 0.01,
                    "macs_ratio": tau, "bytes_ratio": tau / 2}  # fmt: skip

        return on

    on = {split: measure(split, lost) for split, lost in (("search", 0.0), ("select", 0.1), ("test", 0.5))}
    found = selection.one_family(points, on, "kl", [0.15, 0.35, 0.9], max_drop)
    assert seen["search"] == [0.9, 0.7, 0.5]
    assert found.cost.tolist() == ["macs_ratio", "bytes_ratio"]
    if chosen is None:
        assert not seen["test"]
        assert found[["macs_ratio", "bytes_ratio", "score_drop", "merged"]].values.tolist() == [[1, 1, 0, False]] * 2
    else:
        assert set(seen["test"]) == {chosen}
        assert found.macs_ratio.tolist() == [chosen] * 2
        assert found.score_drop.tolist() == pytest.approx([0.5 * (1 - chosen)] * 2)
        assert found.drop_ci95.tolist() == pytest.approx([0.0196] * 2, abs=1e-4)
