"""The search on a problem that costs nothing. Candidates of the model are compared within one machine only."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import toy
from ax.core.trial_status import TrialStatus
from ax.service.utils.best_point import get_trace
from botorch.acquisition.multi_objective import logei
from tokmerge.evaluation.workers import here
from tokmerge.io import store
from tokmerge.search import pareto
from tokmerge.search.bayesian import Search, Settings, begin

QUICK = {"axis": "kl", "reference": toy.REFERENCE, "n_curve": 2, "n_sobol": 3, "restarts": 1, "raw_samples": 8}


def opened(folder, **settings):
    return Search(folder, toy.SPACE, Settings(**{**QUICK, **settings}), {})


def advance(folder, n, measure=toy.measure, **settings):
    """Run a search until it has n trials."""
    search = opened(folder, **settings)
    search.run(here(measure), n, at_once=2)
    return search


def chosen(search):
    return search.table[["trial", "origin", "tau_00", "tau_01", "status"]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A search that nothing interrupted."""
    return advance(tmp_path_factory.mktemp("whole"), 8)


def test_starts_on_the_curve_then_spreads_then_models(whole):
    table = whole.table
    assert table.trial.tolist() == list(range(8))
    assert table.origin.tolist() == ["curve"] * 2 + ["sobol"] * 3 + ["model"] * 3
    np.testing.assert_allclose(table[["tau_00", "tau_01"]][:2], [[2 / 3] * 2, [5 / 6] * 2])
    assert (table.ask_seconds[:5] == 0).all()
    assert (table.ask_seconds[5:] > 0).all()
    assert table.clock.is_monotonic_increasing


def test_finds_the_known_front(whole):
    start, reached = (pareto.objectives(rows, "kl") for rows in (whole.table[:5], whole.table))
    start, reached, possible = (pareto.hypervolume(part, toy.REFERENCE) for part in (start, reached, toy.front()))
    assert whole.hypervolume == reached
    assert start < reached <= possible
    assert reached > 0.75 * possible


def test_ax_knows_every_trial_and_measures_the_same_hypervolume(whole):
    experiment = whole.client._experiment
    assert [trial.status for trial in experiment.trials.values()] == [TrialStatus.COMPLETED] * 8
    # Ax's is in the objectives' own units.
    ours = pareto.trace(pareto.objectives(whole.table, "kl"), toy.REFERENCE) * np.prod(toy.REFERENCE)
    np.testing.assert_allclose(list(get_trace(experiment).values()), ours, rtol=1e-6)


def test_the_reference_point_is_what_ax_optimises_against():
    config = begin(toy.SPACE, Settings(axis="score_drop", reference=(0.05, 1.0, 0.5)))._experiment.optimization_config
    found = {threshold.metric_names[0]: threshold.bound for threshold in config.objective_thresholds}
    assert found == {"score_drop": 0.05, "macs_ratio": 1.0, "bytes_ratio": 0.5}
    assert "-score_drop" in config.objective.expression


def test_no_kernel_is_compiled(whole):
    assert logei._load_attempted
    assert logei._C is None


def test_a_killed_search_goes_on_as_if_nothing_had_happened(whole, tmp_path):
    log = tmp_path / "log"
    code = (
        "import toy, test_bayesian;"
        f"test_bayesian.advance({str(tmp_path / 'search')!r}, 8, toy.make_mortal({str(log)!r}, 6))"
    )
    where = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1]), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": where}
    killed = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment)
    assert killed.returncode == -9
    (folder,) = (tmp_path / "search").iterdir()
    assert store.load_table(folder / "trials.parquet").trial.tolist() == [0, 1, 2, 3, 4, 5]
    again = advance(tmp_path / "search", 8, toy.make_mortal(log, 6))
    assert chosen(again).equals(chosen(whole)), "the trials of an uninterrupted search, bit by bit"
    assert again.table.kl.tolist() == whole.table.kl.tolist()
    lines = log.read_text().splitlines()
    assert len(lines) == len(set(lines)) == 8, "nothing is evaluated twice"


def test_a_search_left_between_batches_and_workers_out_of_order_change_nothing(whole, tmp_path):
    advance(tmp_path, 5)
    search = opened(tmp_path)
    for trial in reversed(search.ask(2)):
        search.tell(trial, toy.measure(trial.configuration))
    assert chosen(search).equals(chosen(whole)[:7])


def test_seed_decides(tmp_path):
    first, second = (advance(tmp_path, 5, seed=seed) for seed in (1, 2))
    assert not chosen(first).equals(chosen(second))


def test_trials_handed_out_come_again_until_told(tmp_path):
    search = opened(tmp_path)
    first = search.ask(3)
    assert search.ask(3) == first == opened(tmp_path).ask(3)
    search.tell(first[1], toy.measure(first[1].configuration))
    assert [trial.index for trial in search.ask(5)] == [0, 2, 3, 4]


def test_failed_trials_are_failed_in_ax_and_the_search_goes_on(tmp_path):
    search = advance(tmp_path, 10, toy.touchy, n_curve=9, n_sobol=0, max_failures=9)
    table = search.table
    assert table.origin[9] == "model"
    failing = (table.tau_00 > 0.9) | (table.tau_01 > 0.9)
    assert failing.any()
    assert (table.status == np.where(failing, "failed", "completed")).all()
    assert "ArithmeticError: the first threshold is too high" in set(table.reason)
    experiment = search.client._experiment
    assert [experiment.trials[i].status.name for i in range(10)] == table.status.str.upper().tolist()
    assert np.isfinite(search.hypervolume)


@pytest.mark.parametrize(("noise", "expected"), [("none", 0.0), ("known", 0.001), ("inferred", None)])
def test_what_ax_is_told_about_noise(tmp_path, noise, expected):
    search = opened(tmp_path, noise=noise)
    (trial,) = search.ask(1)
    search.tell(trial, toy.measure(trial.configuration))
    sems = search.client._experiment.lookup_data().df["sem"]
    assert sems.isna().all() if expected is None else (sems == expected).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"axis": "top5"}, "unknown accuracy axis 'top5'"),
        ({"noise": "loud"}, "unknown noise 'loud'"),
        ({"reference": (0.1, 1.0)}, "three positive numbers"),
        ({"n_curve": 1, "n_sobol": 0}, "a model needs trials to start from"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        Settings(**change)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder, other: shutil.copy(other / "trials.parquet", folder), r"trial \d is not one of this search"),
        (lambda folder, other: shutil.copy(other / "proposed.json", folder), r"trial \d is not one of this search"),
        (
            lambda folder, _: store.save_table(
                store.load_table(folder / "trials.parquet").drop(6).replace({"trial": {5: 9}}),
                folder / "trials.parquet",
            ),
            r"trials\.parquet has trial 9, but not all before it",
        ),
    ],
)
def test_files_that_do_not_belong_together_are_refused(tmp_path, break_it, message):
    search, other = advance(tmp_path / "a", 7), advance(tmp_path / "b", 7, seed=1)
    break_it(search.folder, other.folder)
    with pytest.raises(ValueError, match=message) as refused:
        advance(tmp_path / "a", 8)
    assert f"delete {search.folder} to start afresh" in str(refused.value)
