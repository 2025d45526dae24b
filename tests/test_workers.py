import sys
from functools import partial

import pytest
import ray
import toy
from tokmerge import workers
from tokmerge.search import Search, Settings
from tokmerge.trials import Trial

QUICK = Settings(axis="kl", reference=toy.REFERENCE, n_curve=2, n_sobol=3, restarts=1, raw_samples=8)


def trials(*taus):
    choices = [{"tau_00": tau, "tau_01": 0.75} for tau in taus]
    return [Trial(i, "sobol", choice, toy.SPACE.configuration(choice)) for i, choice in enumerate(choices)]


def expected(trial):
    return toy.measure(trial.configuration)


def kl(pairs):
    return {trial.index: result["kl"] for trial, result in pairs}


def search_with(evaluate, folder):
    return toy.drive(Search(folder, toy.SPACE, QUICK), 6, evaluate, 2).table[
        ["trial", "tau_00", "tau_01", "kl", "macs_ratio"]
    ]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    with workers.start(toy.measure, toy.plain) as evaluate:
        return search_with(evaluate, tmp_path_factory.mktemp("alone"))


def test_results_carry_their_time_and_failures_their_exception():
    with workers.start(toy.touchy, toy.make_touchy) as evaluate:
        good, bad = (result for _, result in evaluate(trials(0.7, 0.95)))
    assert good["seconds"] >= 0
    assert isinstance(bad, ArithmeticError)


def test_in_this_process_trials_end_one_by_one_and_nothing_is_made_anew():
    with workers.start(toy.measure, factory=lambda: pytest.fail("made anew")) as evaluate:
        assert next(evaluate(trials(0.6, 0.7)))[0].index == 0


def check(evaluate, alone, folder, death):
    """What one process gives, though a worker dies; a trial that kills every worker fails, and only that one."""
    jobs = trials(0.6, 0.7, 0.8, 0.95)
    assert kl(evaluate(jobs)) == {trial.index: expected(trial)["kl"] for trial in jobs}
    assert (folder / "log.died").exists(), "one of the workers was killed"
    assert search_with(evaluate, folder / "search").equals(alone)
    results = {trial.index: result for trial, result in evaluate(trials(0.6, toy.DEADLY))}
    assert isinstance(results[1], death)
    assert results[0]["kl"] == expected(jobs[0])["kl"]


def test_processes(alone, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "ATTEMPTS", 2)
    with workers.start(toy.measure, partial(toy.make_mortal, tmp_path / "log", 1), workers=2) as evaluate:
        check(evaluate, alone, tmp_path, workers.BrokenProcessPool)


@pytest.fixture
def cluster():
    """A real Ray on this machine, with the tests' own module sent along."""
    ray.cloudpickle.register_pickle_by_value(toy)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield "local"
    ray.shutdown()
    ray.cloudpickle.unregister_pickle_by_value(toy)


def test_ray(alone, cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "ATTEMPTS", 2)
    with workers.start(
        toy.measure, partial(toy.make_mortal, tmp_path / "log", 1), workers=2, ray_address=cluster
    ) as evaluate:
        check(evaluate, alone, tmp_path, ray.exceptions.RayError)


def test_bad_workers_are_named(monkeypatch):
    with pytest.raises(ValueError, match="workers is 0"), workers.start(toy.measure, toy.plain, workers=0):
        pass
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(ModuleNotFoundError, match=r"pip install 'tokmerge\[ray\]'"),
        workers.start(toy.measure, toy.plain, ray_address="auto"),
    ):
        pass


def test_cores_are_shared_out(monkeypatch):
    monkeypatch.setattr(workers.os, "cpu_count", lambda: 8)
    assert [workers._threads(n) for n in (1, 3, 8, 20)] == [8, 2, 1, 1]
