"""Where trials are evaluated: in this process, in several on this machine, or on a Ray cluster.

All three are a function from trials to (trial, result) pairs. An objective that raises gives its exception as the
result; a worker that dies has its trial evaluated again by another.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from multiprocessing import current_process, get_context
from typing import Any

import torch

from tokmerge.spaces import Configuration
from tokmerge.trials import Result, Trial

Evaluate = Callable[[Configuration], dict[str, float]]
Pairs = Iterator[tuple[Trial, Result]]
# Evaluations of one trial whose worker dies, before the trial counts as failed.
ATTEMPTS = 3

_objective: Evaluate


@contextmanager
def start(
    objective: Evaluate, factory: Callable[[], Evaluate], workers: int = 1, ray_address: str | None = None
) -> Iterator[Callable[[Sequence[Trial]], Pairs]]:
    """Start workers, and stop them when the block ends.

    Args:
        objective: what evaluates a configuration, where everything stays in this process.
        factory: makes it elsewhere; called once in every worker, so it must be importable there (a function of a
            module, or `functools.partial` of one).
        workers: how many; each gets its share of the cores, and a GPU where there are any. With 1 and no cluster,
            everything stays in this process.
        ray_address: of a Ray cluster (``"auto"``, ``"ray://host:10001"``, or ``"local"`` for one on this machine);
            needs the extra ``tokmerge[ray]``.

    Yields:
        A function: trials -> (trial, result) pairs, in the order in which they end.

    Raises:
        ValueError: fewer than one worker.
        ModuleNotFoundError: an address was given, but Ray is not installed.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}: at least one is needed")
    with ExitStack() as stack:
        if ray_address is not None:
            yield stack.enter_context(_cluster(factory, workers, ray_address))
        elif workers > 1:
            yield stack.enter_context(_processes(factory, workers))
        else:
            yield lambda trials: ((trial, attempt(objective, trial.configuration)) for trial in trials)


def attempt(objective: Evaluate, configuration: Configuration) -> Result:
    """What was measured, with its ``seconds``; or the exception instead of it."""
    begin = time.monotonic()
    try:
        measured = objective(configuration)
    except Exception as error:
        return error
    return {**measured, "seconds": time.monotonic() - begin}


def _set_up(factory: Callable[[], Evaluate], threads: int) -> None:
    global _objective
    torch.set_num_threads(threads)
    if torch.cuda.is_available():
        # Processes are numbered from 1; with more workers than GPUs they share.
        number = current_process()._identity[0] - 1
        torch.cuda.set_device(number % torch.cuda.device_count())
    _objective = factory()


def _attempt_here(configuration: Configuration) -> Result:
    return attempt(_objective, configuration)


def _threads(workers: int) -> int:
    return max(1, (os.cpu_count() or 1) // workers)


@contextmanager
def _processes(factory: Callable[[], Evaluate], workers: int) -> Iterator[Callable[[Sequence[Trial]], Pairs]]:
    def pool() -> ProcessPoolExecutor:
        # Spawned, because a fork would copy torch's threads in whatever state they are.
        return ProcessPoolExecutor(workers, get_context("spawn"), _set_up, (factory, _threads(workers)))

    executor = pool()

    def submit(trial: Trial) -> Future[Result]:
        nonlocal executor
        try:
            return executor.submit(_attempt_here, trial.configuration)
        except BrokenProcessPool:
            executor.shutdown()
            executor = pool()
            return executor.submit(_attempt_here, trial.configuration)

    def alone(trial: Trial) -> Result:
        death: Result = BrokenProcessPool("its worker died")
        for _ in range(ATTEMPTS - 1):
            try:
                return submit(trial).result()
            except BrokenProcessPool as error:
                death = error
        return death

    def evaluate(trials: Sequence[Trial]) -> Pairs:
        futures = {submit(trial): trial for trial in trials}
        suspects = []
        for future in as_completed(futures):
            try:
                yield futures[future], future.result()
            except BrokenProcessPool:
                suspects.append(futures[future])
        # A dead worker takes all that was under way with it; from now on each trial answers for itself.
        for trial in sorted(suspects, key=lambda trial: trial.index):
            yield trial, alone(trial)

    try:
        yield evaluate
    finally:
        executor.shutdown(cancel_futures=True)


@contextmanager
def _cluster(
    factory: Callable[[], Evaluate], workers: int, address: str
) -> Iterator[Callable[[Sequence[Trial]], Pairs]]:
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("a Ray address was given: pip install 'tokmerge[ray]'") from error

    class Worker:
        def __init__(self, factory: Callable[[], Evaluate], threads: int) -> None:
            torch.set_num_threads(threads)
            self.objective = factory()

        def attempt(self, configuration: Configuration) -> Result:
            return attempt(self.objective, configuration)

    ours = not ray.is_initialized()
    if ours:
        ray.init(address=address, include_dashboard=False, log_to_driver=False)
    try:
        # A worker to a GPU, where there are any.
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        kind = ray.remote(max_restarts=-1, max_task_retries=ATTEMPTS - 1, num_gpus=gpus)(Worker)
        idle: list[Any] = [kind.remote(factory, _threads(workers)) for _ in range(workers)]

        def evaluate(trials: Sequence[Trial]) -> Pairs:
            waiting = list(trials)
            busy: dict[Any, tuple[Any, Trial]] = {}
            while waiting or busy:
                while waiting and idle:
                    worker, trial = idle.pop(), waiting.pop(0)
                    busy[worker.attempt.remote(trial.configuration)] = (worker, trial)
                (done,), _ = ray.wait(list(busy))
                worker, trial = busy.pop(done)
                idle.append(worker)
                try:
                    result: Result = ray.get(done)
                except ray.exceptions.RayError as error:
                    result = error
                yield trial, result

        yield evaluate
    finally:
        if ours:
            ray.shutdown()
