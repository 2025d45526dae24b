"""What the model-based search is measured against: the same objective, the same table of trials, other proposals.

A method is a generator: it yields configurations, a batch at a time, and is sent their (n, 3) objective values.
`BaselineSearch` runs one as `bayesian.Search` runs its own. Methods are deterministic given their seed, so reopening a
folder replays what has been measured and goes on.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from itertools import combinations_with_replacement, count
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.evaluator import Evaluator
from pymoo.core.problem import Problem
from pymoo.problems.static import StaticProblem

from tokmerge.evaluation.objective import COSTS
from tokmerge.evaluation.workers import Run
from tokmerge.merging.matching import Policy
from tokmerge.merging.peers import WindowPooling
from tokmerge.merging.policies import Threshold, TopR
from tokmerge.models.configuration import Configuration, to_json
from tokmerge.search.space import Space, cosines
from tokmerge.search.trials import COMPLETED, AskTell, Trial

Method = Generator[list[tuple[dict[str, float], Configuration]], np.ndarray | None, None]


def sobol(space: Space, n: int, seed: int) -> Method:
    """n scrambled Sobol points of the space."""
    yield [(parameters, space.configuration(parameters)) for parameters in space.sobol(n, seed)]


def nsga2(space: Space, population: int, seed: int) -> Method:
    """NSGA-II (Deb et al., 2002) from pymoo, a generation at a time, for ever."""
    problem = Problem(n_var=len(space.bounds), n_obj=1 + len(COSTS), xl=0.0, xu=1.0)
    algorithm = NSGA2(pop_size=population).setup(problem, termination=("n_gen", 2**31), seed=seed)
    while True:
        generation = algorithm.ask()
        choices = space.scale(generation.get("X"))
        values = yield [(parameters, space.configuration(parameters)) for parameters in choices]
        Evaluator().eval(StaticProblem(problem, F=values), generation)
        algorithm.tell(infills=generation)


def grid(configurations: Sequence[Configuration]) -> Method:
    """These configurations, all at once."""
    yield [({}, configuration) for configuration in configurations]


def uniform(n: int) -> list[Configuration]:
    """One cosine threshold for all blocks, n of them, spread as `tokmerge.search.space.threshold_space` does."""
    roots = np.linspace(1.0, 0.0, n, endpoint=False).tolist()
    return [Configuration(Threshold(tau)) for tau in cosines(_scattered(roots))]


def fixed_r(depth: int, n_tokens: int, n: int) -> list[Configuration]:
    """ToMe's settings, n of them: every constant r, then schedules whose r changes linearly over the depth."""
    most = n_tokens // depth
    constant = [(r,) * depth for r in _scattered(range(1, most + 1))]
    step = max(1, most // 8)
    ends = [(first, last) for first in range(0, 2 * most + 1, step) for last in range(0, 2 * most + 1, step)]
    linear = [tuple(int(r) for r in np.linspace(first, last, depth).round()) for first, last in _scattered(ends)]
    distinct = list(dict.fromkeys(schedule for schedule in constant + linear if any(schedule)))
    return [Configuration(TopR(schedule)) for schedule in distinct[:n]]


def three_stages(method: Callable[[tuple[int, ...]], Policy], depth: int, n_tokens: int, n: int) -> list[Configuration]:
    """EViT's schedule: a share of the tokens is kept after a fourth, a half and three fourths of the blocks.

    Args:
        method: takes the number of tokens that go at every block.
        depth, n_tokens: blocks, and tokens that may go.
        n: how many shares, evenly spread, 0.7 (the method's own) among them.
    """
    shares, configurations = np.linspace(0.98, 0.2, n - 1), []
    for keep in (0.7, *shares):
        left, r = n_tokens, [0] * depth
        for stage in (1, 2, 3):
            r[stage * depth // 4] = left - round(left * keep)
            left = round(left * keep)
        configurations.append(Configuration(method(tuple(r))))
    return configurations


def pooling(depth: int, n: int) -> list[Policy]:
    """Content-blind pooling of the patch grid, n of its ways, evenly spread over the tokens that are computed.

    Up to four times, at any blocks, half of the columns and then half of the rows go.
    """
    plans = [plan for times in range(1, 5) for plan in combinations_with_replacement(range(depth), times)]

    def computed(plan: tuple[int, ...]) -> float:
        return sum(0.5 ** sum(at <= block for at in plan) for block in range(depth))

    ordered = sorted(plans, key=lambda plan: (computed(plan), plan))
    chosen = [ordered[place] for place in np.linspace(0, len(ordered) - 1, n).round().astype(int)]
    found: list[Policy] = []
    for plan in dict.fromkeys(chosen):
        rows, columns = [1] * depth, [1] * depth
        for number, block in enumerate(plan):
            # Windows are counted in patches: the second halving of a side takes four.
            (rows if number % 2 else columns)[block] = 2 ** (number // 2 + 1)
        found.append(WindowPooling(rows, columns))
    return found


def _scattered(grid: Sequence[Any]) -> list[Any]:
    """The grid in an order whose every beginning covers it evenly (van der Corput's).

    >>> _scattered([0, 1, 2, 3, 4])
    [0, 4, 2, 1, 3]
    """
    bits = max(1, (len(grid) - 1).bit_length())
    order = sorted(range(2**bits), key=lambda place: f"{place:0{bits}b}"[::-1])
    return [grid[place] for place in order if place < len(grid)]


class BaselineSearch(AskTell):
    """Trials of one method, a batch of its own size at a time.

    Args:
        folder, about: as of `AskTell`; the method's own settings and seed are part of what the trials depend on.
        name, method: what proposes the trials, and what it is called in the table.
        axis, reference: the accuracy axis the method is told, and the reference point: a failed trial is told twice it.
    """

    def __init__(
        self, folder: str | Path, name: str, method: Method, axis: str, reference: Sequence[float],
        about: Mapping[str, Any],
    ) -> None:  # fmt: skip
        super().__init__(folder, {**about, "method": name, "axis": axis, "reference": list(reference)})
        self._name, self._method, self._axis, self._failed = name, method, axis, 2 * np.asarray(reference, float)
        self._numbers = count()

    def _propose(self, n: int) -> list[Trial]:
        told = [self._rows[trial.index] for trial in self._pending]
        values = [[row[name] for name in (self._axis, *COSTS)] if row["status"] == COMPLETED else self._failed
                  for row in told]  # fmt: skip
        try:
            proposals = self._method.send(np.array(values) if values else None)
        except StopIteration:
            return []
        return [Trial(next(self._numbers), self._name, *proposal) for proposal in proposals]


def measure_grid(
    folder: str | Path, name: str, configurations: Sequence[Configuration], evaluate: Run, about: Mapping[str, Any]
) -> pd.DataFrame:
    """The trials of some configurations, in their order; those on disk are not repeated."""
    everything = {**about, "configurations": [to_json(configuration) for configuration in configurations]}
    return BaselineSearch(folder, name, grid(configurations), "kl", (1, 1, 1), everything).run(evaluate)
