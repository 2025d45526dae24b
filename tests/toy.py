"""A search problem that costs nothing and whose front is known, for tests that need no model.

Of a space of two cosine thresholds; importable by worker processes.
"""

import os
import signal
from functools import partial
from pathlib import Path

import numpy as np
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


def _first_to(marker):
    """Whether this is the one process that makes a file."""
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def mortal(log, die_at, configuration):
    """Notes every evaluation it ends; the first process that begins one after ``die_at`` have ended kills itself, once.

    A first threshold of ``DEADLY`` kills it every time.
    """
    log = Path(log)
    done = len(log.read_text().splitlines()) if log.exists() else 0
    marker = log.with_name(log.name + ".died")
    if configuration.policy.thresholds[0] == DEADLY or (done >= die_at and _first_to(marker)):
        os.kill(os.getpid(), signal.SIGKILL)
    result = measure(configuration)
    with log.open("a") as lines:
        lines.write(f"{configuration.policy.thresholds}\n")
    return result


def make_mortal(log, die_at):
    return partial(mortal, log, die_at)
