import multiprocessing
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import ray
import toy
from tokmerge.evaluation import workers
from tokmerge.io import store
from tokmerge.io.cache import Cache
from tokmerge.merging.policies import TopR
from tokmerge.models.configuration import Configuration
from tokmerge.search.bayesian import Search, Settings

QUICK = Settings(axis="kl", reference=toy.REFERENCE, n_curve=2, n_sobol=3, restarts=1, raw_samples=8)


def jobs(*taus):
    return {f"at {tau}": toy.SPACE.configuration({"tau_00": tau, "tau_01": 0.75}) for tau in taus}


def results(run, some):
    return {key: result for key, result, _ in run(some)}


def search_with(run, folder):
    return Search(folder, toy.SPACE, QUICK, {}).run(run, 6, 2)[["trial", "tau_00", "tau_01", "kl", "macs_ratio"]]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return search_with(workers.here(toy.measure), tmp_path_factory.mktemp("alone"))


def test_results_carry_their_time_and_failures_are_their_exception():
    good, bad = workers.here(toy.touchy)(jobs(0.7, 0.95))
    assert good[:2] == ("at 0.7", toy.measure(jobs(0.7)["at 0.7"]))
    assert good[2] >= 0
    assert isinstance(bad[1], ArithmeticError)


def test_in_this_process_jobs_end_one_by_one_and_nothing_is_made_anew():
    with workers.start(toy.measure, factory=lambda: pytest.fail("made anew")) as run:
        assert next(run(jobs(0.6, 0.7)))[0] == "at 0.6"


@pytest.fixture
def cluster():
    """A real Ray on this machine, with the tests' own module sent along."""
    ray.cloudpickle.register_pickle_by_value(toy)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
    ray.cloudpickle.unregister_pickle_by_value(toy)


def test_workers_give_what_one_process_gives_though_one_dies_and_a_deadly_job_fails_alone(
    alone, cluster, tmp_path, monkeypatch
):
    monkeypatch.setattr(workers, "ATTEMPTS", 2)
    some, log = jobs(0.6, 0.7, 0.8, 0.95), tmp_path / "log"
    with workers.start(toy.measure, partial(toy.make_mortal, log, 1), n_workers=2) as run:
        assert results(run, some) == {key: toy.measure(job) for key, job in some.items()}
        assert (tmp_path / "log.died").exists(), "one of the workers was killed"
        assert search_with(run, tmp_path / "search").equals(alone)
        good, bad = results(run, jobs(0.6, toy.DEADLY)).values()
    assert good == toy.measure(some["at 0.6"])
    assert isinstance(bad, ray.exceptions.RayError)


def test_a_failed_piece_is_named_and_the_next_run_makes_only_what_is_missing(tmp_path):
    made, values = [], [1, 0, 2]

    def work(shard):
        made.append(values[shard.start])
        return pd.DataFrame({"inverse": [1 / values[shard.start]]})

    def run():
        (table,) = workers.evaluate_in_shards(Cache(tmp_path, {}), [Configuration(None)], 3, 1, work, dict)
        return table.inverse.tolist()

    failed = r"1 of 3 pieces failed; the first: \w+ 0000001 0000002: ZeroDivisionError: division by zero"
    with pytest.raises(RuntimeError, match=failed):
        run()
    values[1] = 4
    assert run() == run() == [1, 0.25, 0.5]
    assert made == [1, 0, 2, 4]


def count(shard):
    return pd.DataFrame({"id": range(shard.start, shard.stop), "kind": type(shard.configuration.policy).__name__})


def test_equal_configurations_are_evaluated_once_and_other_data_anew(tmp_path):
    def run(about, size=4):
        work, equal = Cache(tmp_path, about), [Configuration(None), Configuration(TopR(12)), Configuration(None)]
        tables = workers.evaluate_in_shards(
            work, equal, 10, size, lambda shard: done.append(shard) or count(shard), dict
        )
        assert [table.id.tolist() for table in tables] == [list(range(10))] * 3
        assert [table.kind[0] for table in tables] == ["NoneType", "TopR", "NoneType"]

    done = []
    run({})
    assert [(shard.start, shard.stop) for shard in done] == [(0, 4), (4, 8), (8, 10)] * 2
    for about, new in (({}, 0), ({"model": "b"}, 6)):
        done.clear()
        run(about)
        assert len(done) == new
    with pytest.raises(ValueError, match="shard_size is 0"):
        run({}, size=0)


def test_nothing_is_left_of_a_shard_that_was_interrupted(tmp_path, monkeypatch):
    def killed(self, path, **options):
        Path(path).write_bytes(b"PAR1 half")
        raise KeyboardInterrupt

    work = Cache(tmp_path, {})
    monkeypatch.setattr(pd.DataFrame, "to_parquet", killed)
    with pytest.raises(KeyboardInterrupt):
        workers.evaluate_in_shards(work, [Configuration(None)], 2, 2, count, dict)
    assert [path.name for path in work.folder.iterdir()] == ["about.json"]


def test_bad_workers_are_named(monkeypatch):
    with pytest.raises(ValueError, match="n_workers is 0"):
        workers.start(toy.measure, toy.plain, n_workers=0)
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(ModuleNotFoundError, match=r"pip install 'tokmerge\[ray\]'"),
        workers.start(toy.measure, toy.plain, ray_address="auto"),
    ):
        pass


def test_cores_are_shared_out(monkeypatch):
    monkeypatch.setattr(workers.os, "cpu_count", lambda: 8)
    assert [workers._threads(n) for n in (1, 3, 8, 20)] == [8, 2, 1, 1]


def test_a_run_that_is_killed_at_ten_moments_does_nothing_twice_and_ends_as_one_that_is_not(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["toy", "tokmerge.search.baselines", "tokmerge.search.bayesian"])

    def run(folder, seconds=None):
        """Whether the run came to its end within some seconds; else it is killed."""
        process = context.Process(target=toy.long_run, args=(folder,))
        process.start()
        process.join(seconds)
        ended = not process.is_alive()
        process.kill()
        process.join()
        return ended

    assert run(tmp_path / "warm")
    begin = time.monotonic()
    assert run(tmp_path / "whole")
    took, folders = time.monotonic() - begin, [tmp_path / "0"]
    expected = store.load_json(tmp_path / "whole" / "result.json")
    n_done, kills = len((tmp_path / "whole" / "log").read_text().splitlines()), {folders[0]: 0}
    for moment in np.random.default_rng(0).uniform(0.05, 0.6, 10):
        if run(folders[-1], moment * took):
            folders.append(tmp_path / str(len(folders)))
            kills[folders[-1]] = 0
        else:
            kills[folders[-1]] += 1
    assert run(folders[-1])
    assert sum(kills.values()) >= 5
    for folder in folders:
        assert store.load_json(folder / "result.json") == expected
        # Only the evaluation that a kill fell into may have to be done again.
        assert n_done <= len((folder / "log").read_text().splitlines()) <= n_done + kills[folder]
