"""Where work is done: in this process, or by Ray, on this machine or a cluster; and long work in shards.

Both are a function from jobs by key to (key, result, seconds), in the order in which they end. Work that raises has its
exception as the result; when a worker dies, its job is done again. A shard is a stretch of images or questions under
one configuration: a file once it is done, whoever does it and in whichever run. Rows do not depend on shards.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from tokmerge.io import store
from tokmerge.io.cache import Cache, digest
from tokmerge.io.extras import extra
from tokmerge.models.configuration import Configuration, to_json

Work = Callable[[Any], Any]
Done = tuple[Any, Any, float]
Run = Callable[[Mapping[Any, Any]], Iterator[Done]]
# Times that a job is begun whose worker dies, before it counts as failed.
ATTEMPTS = 3


def start(
    work: Work, factory: Callable[[], Work], n_workers: int = 1, ray_address: str | None = None
) -> AbstractContextManager[Run]:
    """Start workers, and stop them when the block ends.

    Args:
        work: what is done with a job, where everything stays in this process.
        factory: makes it elsewhere; called once in every worker, so it must be importable there (a function of a
            module, or `functools.partial` of one).
        n_workers: how many; each gets its share of the cores, and a GPU where there are any. With 1 and no address,
            everything stays in this process.
        ray_address: of a Ray cluster ("auto", "ray://host:10001"); None: several workers are those of a Ray that is
            started on this machine. Ray comes with the extra ``tokmerge[ray]``.

    Returns:
        A context whose value is a function: jobs by key -> (key, result, seconds), in the order in which they end.

    Raises:
        ValueError: fewer than one worker.
        ModuleNotFoundError: Ray is needed, but not installed.
    """
    if n_workers < 1:
        raise ValueError(f"n_workers is {n_workers}: at least one is needed")
    if n_workers == 1 and ray_address is None:
        return nullcontext(here(work))
    return _ray(factory, n_workers, ray_address or "local")


def here(work: Work) -> Run:
    """One job after the other in this process.

    >>> [(key, result) for key, result, _ in here(abs)({"a": -1, "b": 2})]
    [('a', 1), ('b', 2)]
    """
    return lambda jobs: ((key, *_attempt(work, job)) for key, job in jobs.items())


def results(
    run: Run, jobs: Mapping[Any, Any], keep: Callable[[Any, Any], Any] | None = None, description: str | None = None
) -> dict[Any, Any]:
    """All results by key, in the order of the jobs.

    Args:
        run, jobs: what `start` gives, and what it is called with.
        keep: called with every key and result as soon as it is there; what it returns stands for the result.
        description: shown beside the progress bar; None for no bar.

    Raises:
        RuntimeError: a job failed; all others have been done.

    >>> results(here(abs), {"a": -1, "b": 2})
    {'a': 1, 'b': 2}
    """
    done, failed, quiet = {}, [], description is None
    for key, result, _ in tqdm(run(jobs), description, len(jobs), unit="piece", mininterval=2, disable=quiet):
        if isinstance(result, Exception):
            failed.append(f"{key}: {type(result).__name__}: {result}")
        else:
            done[key] = keep(key, result) if keep else result
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(jobs)} pieces failed; the first: {failed[0]}")
    return {key: done[key] for key in jobs}


@dataclass(frozen=True)
class Shard:
    """What is evaluated, and where in the set of images or questions."""

    configuration: Configuration
    start: int
    stop: int


def evaluate_in_shards(
    cache: Cache, configurations: Sequence[Configuration], n: int, shard_size: int, evaluation: Work,
    factory: Callable[[], Work], n_workers: int = 1, ray_address: str | None = None, description: str | None = None,
) -> list[pd.DataFrame]:  # fmt: skip
    """The rows of every configuration, in the set's order; a shard that is in the cache is not made again.

    Args:
        cache: keeps every shard as soon as it is made; what else rows depend on (data, model) is what it is about.
        configurations: two that are equal are one piece of work.
        n, shard_size: images or questions in the set, and in a shard; the last ones are shorter.
        evaluation: gives a shard's rows.
        factory, n_workers, ray_address, description: as of `start` and `results`, whose errors are raised too.

    Raises:
        ValueError: shards of nothing.
    """
    if shard_size < 1:
        raise ValueError(f"shard_size is {shard_size}: at least one is needed")
    planned = []
    for configuration in configurations:
        parts = [Shard(configuration, start, min(n, start + shard_size)) for start in range(0, n, shard_size)]
        key = digest(to_json(configuration))
        planned.append({f"{key} {part.start:07d} {part.stop:07d}": part for part in parts})
    shards = {name: shard for own in planned for name, shard in own.items()}
    paths = {name: cache.path(name, ".parquet") for name in shards}
    missing = {name: shard for name, shard in shards.items() if not paths[name].exists()}
    with start(evaluation, factory, n_workers, ray_address) as run:
        results(run, missing, lambda name, table: store.save_table(table, paths[name]), description)
    tables = {name: store.load_table(path) for name, path in paths.items()}
    return [pd.concat([tables[name] for name in own], ignore_index=True) for own in planned]


def _attempt(work: Work, job: Any) -> tuple[Any, float]:
    """The result, or the exception instead of it, and the seconds it took."""
    begin = time.monotonic()
    try:
        result = work(job)
    except Exception as error:
        result = error
    return result, time.monotonic() - begin


def _threads(n_workers: int) -> int:
    return max(1, (os.cpu_count() or 1) // n_workers)


@contextmanager
def _ray(factory: Callable[[], Work], n_workers: int, address: str) -> Iterator[Run]:
    with extra("ray"):
        import ray

    class Worker:
        def __init__(self, threads: int) -> None:
            torch.set_num_threads(threads)
            self.work = factory()

        def attempt(self, job: Any) -> tuple[Any, float]:
            return _attempt(self.work, job)

    def run(jobs: Mapping[Any, Any]) -> Iterator[Done]:
        waiting, idle, busy = list(jobs), list(workers), dict[Any, Any]()
        while waiting or busy:
            while waiting and idle:
                key, worker = waiting.pop(0), idle.pop()
                busy[worker.attempt.remote(jobs[key])] = key, worker
            (ended,), _ = ray.wait(list(busy))
            key, worker = busy.pop(ended)
            idle.append(worker)
            try:
                yield key, *ray.get(ended)
            except ray.exceptions.RayError as error:
                yield key, error, 0.0

    ours = not ray.is_initialized()
    if ours:
        ray.init(address=address, include_dashboard=False, log_to_driver=False)
    try:
        # A worker to a GPU, where there are any.
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        kind: Any = ray.remote(max_restarts=-1, max_task_retries=ATTEMPTS - 1, num_gpus=gpus)(Worker)
        workers = [kind.remote(_threads(n_workers)) for _ in range(n_workers)]
        yield run
    finally:
        if ours:
            ray.shutdown()
