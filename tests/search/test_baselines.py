from dataclasses import replace

import numpy as np
import pytest
import tokmerge
import torch
import toy
from tokmerge.evaluation.workers import here
from tokmerge.merging import merge
from tokmerge.merging.packed import pack
from tokmerge.merging.peers import AttentionPruning
from tokmerge.merging.policies import Threshold, TopR
from tokmerge.search import baselines, pareto
from tokmerge.search.baselines import BaselineSearch
from torch.nn import functional as F


def advance(folder, method, n, measure=toy.measure):
    """The table of a method that is run until it has n trials or no more to propose."""
    return BaselineSearch(folder, "some", method, "kl", toy.REFERENCE, {"seed": 0}).run(here(measure), n, 4)


def nsga2(folder, n, seed=0, measure=toy.measure):
    return advance(folder, baselines.nsga2(toy.SPACE, 8, seed), n, measure)


def test_sobol_evaluates_its_points_once_each_and_stops(tmp_path):
    table = advance(tmp_path, baselines.sobol(toy.SPACE, 16, seed=3), 20)
    assert table.trial.tolist() == list(range(16))
    assert set(table.origin) == {"some"}
    assert table[["tau_00", "tau_01"]].to_dict("records") == toy.SPACE.sobol(16, seed=3)


def test_nsga2_gets_closer_to_the_known_front(tmp_path):
    values = pareto.objectives(nsga2(tmp_path, 96), "kl")
    assert len(values) == 96
    start, reached, possible = (pareto.hypervolume(part, toy.REFERENCE) for part in (values[:8], values, toy.front()))
    assert 1.3 * start < reached <= possible


@pytest.mark.parametrize("stop", [3, 8, 20])
def test_a_method_that_was_left_goes_on_where_it_was(tmp_path, stop):
    whole = nsga2(tmp_path / "whole", 30, seed=1)
    nsga2(tmp_path / "left", stop, seed=1)
    again, columns = nsga2(tmp_path / "left", 30, seed=1), ["trial", "tau_00", "tau_01", "kl"]
    assert again[columns].equals(whole[columns])
    assert not nsga2(tmp_path / "other", 8, seed=2).tau_00.equals(whole.tau_00[:8])


def test_failed_trials_do_not_stop_a_method(tmp_path):
    table = nsga2(tmp_path, 12, measure=toy.touchy)
    assert len(table) == 12
    assert (table.status == "failed").any()


def test_uniform_is_one_threshold_for_all_blocks():
    policies = [configuration.policy for configuration in baselines.uniform(5)]
    assert {type(policy) for policy in policies} == {Threshold}
    # The ends first.
    assert [policy.thresholds for policy in policies] == pytest.approx([0.4, 0.976, 0.784, 0.616, 0.904])


def test_fixed_r_takes_constants_first_then_schedules():
    policies = [configuration.policy for configuration in baselines.fixed_r(depth=4, n_tokens=64, n=40)]
    settings = [policy.r for policy in policies]
    assert {type(policy) for policy in policies} == {TopR}
    assert len(set(settings)) == len(settings) == 40
    assert set(settings[:16]) == {(r,) * 4 for r in range(1, 17)}
    assert any(r[0] > r[-1] for r in settings)
    assert any(r[0] < r[-1] for r in settings)
    for r in settings:
        np.testing.assert_allclose(r, np.linspace(r[0], r[-1], 4), atol=0.5)


def test_three_stages_keep_a_share_of_what_is_left():
    policies = [one.policy for one in baselines.three_stages(AttentionPruning, 12, 196, 8)]
    # 196 -> 137 -> 96 -> 67
    assert policies[0].r == (0, 0, 0, 59, 0, 0, 41, 0, 0, 29, 0, 0)
    assert len({policy.r for policy in policies}) == 8
    assert [sum(policy.r) for policy in policies[1:]] == sorted(sum(policy.r) for policy in policies[1:])


def test_pooling_halves_the_grid_side_by_side(model, images):
    policies = baselines.pooling(4, 60)
    assert len(set(policies)) == 60
    counts = {tuple(tokmerge.patch(model, policy)(images[:1])[1].tokens[0].tolist()) for policy in policies}
    assert {before for tokens in counts for before in tokens} == {65, 33, 17, 9, 5}
    # Pooled at once, a window's tokens become their mean.
    once = next(policy for policy in policies if policy.rows == (1, 2, 1, 1) and policy.columns == (1, 2, 1, 1))
    x = torch.randn(1, 65, 48)
    place = torch.stack([torch.arange(64) // 8, torch.arange(64) % 8], 1).float()
    tokens = replace(pack(x), place=torch.cat([place[:1], place]))
    pooled = merge.step(tokens, once, layer=1, depth=4, protected=1, qkv=torch.zeros(65, 3, 1, 1)).x
    grid = x[:, 1:].transpose(1, 2).view(1, 48, 8, 8)
    torch.testing.assert_close(pooled[1:], F.avg_pool2d(grid, 2).flatten(2)[0].T)
