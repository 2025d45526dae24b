"""A search problem that costs nothing and whose front is known, for tests that need no model.

Of a space of two cosine thresholds; importable by worker processes.
"""

import math
import os
import signal
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from tokmerge.merging.policies import Threshold
from tokmerge.search.space import policy_space

REFERENCE = (0.1, 1.0, 1.0)
SPACE = policy_space(2, {"tau": (0.5, 1.0)}, lambda tau: Threshold(tau), None)


def measure(configuration):
    """Merging x = 2 (1 - tau): good where the first layer merges as the second one asks for."""
    first, second = (2 * (1 - tau) for tau in configuration.policy.thresholds)
    waste = (first - 0.25 - 0.5 * second) ** 2
    values = {"kl": 0.1 * (second**2 + waste), "macs_ratio": 1 - 0.8 * second + waste}
    values["bytes_ratio"] = (1 - second) ** 2 + waste
    return {**values, **{f"{name}_sem": 0.001 for name in values}}


def front(n=400):
    """(n, 3) objective values without waste."""
    second = np.linspace(0, 1, n)
    return np.stack([0.1 * second**2, 1 - 0.8 * second, (1 - second) ** 2], axis=1)


def plain():
    return measure


def touchy(configuration):
    """Raises, or gives NaN, in parts of the space."""
    first, second = configuration.policy.thresholds
    if first > 0.9:
        raise ArithmeticError("the first threshold is too high")
    return measure(configuration) | ({"kl": float("nan")} if second > 0.9 else {})


DEADLY = 0.55


def mortal(log, die_at, configuration):
    """Notes every evaluation it ends; the first process that begins one after ``die_at`` have ended kills itself, once.

    A first threshold of ``DEADLY`` kills it every time.
    """
    log = Path(log)
    done = len(log.read_text().splitlines()) if log.exists() else 0
    if configuration.policy.thresholds[0] == DEADLY:
        os.kill(os.getpid(), signal.SIGKILL)
    if done >= die_at:
        with suppress(FileExistsError):
            log.with_name(log.name + ".died").touch(exist_ok=False)
            os.kill(os.getpid(), signal.SIGKILL)
    result = measure(configuration)
    with log.open("a") as lines:
        lines.write(f"{configuration.policy.thresholds}\n")
    return result


def make_mortal(log, die_at):
    return partial(mortal, log, die_at)


def rows_of(log, shard):
    """The rows of a shard, noted in a log when they are done."""
    time.sleep(0.02)
    with Path(log).open("a") as lines:
        lines.write(f"shard {shard.start}\n")
    return pd.DataFrame({"id": range(shard.start, shard.stop)})


def long_run(folder):
    """A search, a grid, and rows in shards, all with what they keep on disk; the log says which evaluation ended."""
    from tokmerge.evaluation import workers
    from tokmerge.io import store
    from tokmerge.io.cache import Cache
    from tokmerge.models.configuration import Configuration
    from tokmerge.search.baselines import measure_grid
    from tokmerge.search.bayesian import Search, Settings

    log, work = Path(folder) / "log", Path(folder) / "work"
    log.parent.mkdir(exist_ok=True)
    evaluate = workers.here(partial(mortal, log, math.inf))
    quick = Settings(axis="kl", reference=REFERENCE, n_curve=2, n_sobol=3, restarts=1, raw_samples=8)
    trials = Search(work, SPACE, quick, {}).run(evaluate, 8)
    points = [SPACE.configuration({"tau_00": tau, "tau_01": 0.7}) for tau in np.linspace(0.6, 0.9, 10)]
    grid = measure_grid(work, "grid", points, evaluate, {})
    (rows,) = workers.evaluate_in_shards(
        Cache(work, {}), [Configuration(None)], 60, 2, partial(rows_of, log), dict, description=None
    )
    found = {"trials": trials[["tau_00", "kl"]].to_dict("list"), "grid": grid.kl.tolist(), "rows": rows.id.tolist()}
    store.save_json(found, Path(folder) / "result.json")
