import numpy as np
import pytest
import toy
from tokmerge.evaluation.workers import here
from tokmerge.merging.policies import Threshold, TopR
from tokmerge.search import baselines, pareto
from tokmerge.search.baselines import BaselineSearch


def advance(folder, name, method, n, factory=toy.plain, batch=4):
    """The table of a method that is run until it has n trials or no more to propose."""
    return BaselineSearch(folder, name, method, "kl", toy.REFERENCE, {"seed": 0}).run(here(factory()), n, batch)


def volume(table):
    return pareto.hypervolume(pareto.objectives(table, "kl"), toy.REFERENCE)


def test_sobol_evaluates_its_points_once_each_and_stops(tmp_path):
    table = advance(tmp_path, "sobol", baselines.sobol(toy.SPACE, 16, seed=3), 20)
    assert table.trial.tolist() == list(range(16))
    assert set(table.origin) == {"sobol"}
    found = table[["tau_00", "tau_01"]].to_dict("records")
    assert found == toy.SPACE.sobol(16, seed=3)


def test_nsga2_gets_closer_to_the_known_front(tmp_path):
    table = advance(tmp_path, "nsga2", baselines.nsga2(toy.SPACE, 8, seed=0), 96)
    assert len(table) == 96
    assert 1.3 * volume(table[:8]) < volume(table) <= pareto.hypervolume(toy.front(), toy.REFERENCE)


@pytest.mark.parametrize("stop", [3, 8, 20])
def test_a_method_that_was_left_goes_on_where_it_was(tmp_path, stop):
    whole = advance(tmp_path / "whole", "nsga2", baselines.nsga2(toy.SPACE, 8, seed=1), 30)
    advance(tmp_path / "left", "nsga2", baselines.nsga2(toy.SPACE, 8, seed=1), stop)
    again = advance(tmp_path / "left", "nsga2", baselines.nsga2(toy.SPACE, 8, seed=1), 30)
    columns = ["trial", "tau_00", "tau_01", "kl"]
    assert again[columns].equals(whole[columns])
    other = advance(tmp_path / "other", "nsga2", baselines.nsga2(toy.SPACE, 8, seed=2), 8)
    assert not other.tau_00.equals(whole.tau_00[:8])


def test_failed_trials_do_not_stop_a_method(tmp_path):
    table = advance(tmp_path, "nsga2", baselines.nsga2(toy.SPACE, 6, seed=0), 12, toy.make_touchy)
    assert len(table) == 12
    assert (table.status == "failed").any()


def test_uniform_is_one_threshold_for_all_blocks():
    proposals = baselines.uniform(5)
    values = [configuration.policy.thresholds for configuration in proposals]
    assert sorted(values) == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9])
    assert all(isinstance(configuration.policy, Threshold) for configuration in proposals)
    assert values[0] == 0.5
    assert abs(values[1] - values[0]) == pytest.approx(0.4), "the ends first"


def test_fixed_r_takes_constants_first_then_schedules():
    proposals = baselines.fixed_r(depth=4, n_tokens=64, n=40)
    settings = [configuration.policy.r for configuration in proposals]
    assert all(isinstance(configuration.policy, TopR) for configuration in proposals)
    assert len(set(settings)) == len(settings) == 40
    assert set(settings[:16]) == {(r,) * 4 for r in range(1, 17)}
    assert any(r[0] > r[-1] for r in settings)
    assert any(r[0] < r[-1] for r in settings)
    for r in settings:
        np.testing.assert_allclose(r, np.linspace(r[0], r[-1], 4), atol=0.5)


@pytest.mark.parametrize("n", [1, 2, 7, 16])
def test_every_beginning_of_a_grid_covers_it(n):
    grid = list(range(n))
    order = baselines._scattered(grid)
    assert sorted(order) == grid
    for k in range(2, n):
        gaps = np.diff(sorted(order[:k]))
        assert gaps.max() <= 2 ** (n - 1).bit_length() / 2 ** (k.bit_length() - 1)
