"""Multi-objective Bayesian optimisation of the thresholds with Ax: ask for trials, tell how they ended.

    with workers.start(objective, load, n_workers) as evaluate:
        table = Search(folder, space, Settings()).run(evaluate, 64, at_once=4)

Nothing is lost when the process is killed: proposed trials are in ``proposed.json`` before they are evaluated, ended
ones in ``trials.parquet`` before the next one starts, and opening the folder again goes on with what an uninterrupted
search would have done. Ax's own snapshot is not kept: to write and read it takes longer than to propose.
"""

import logging
import math
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ax.adapter.registry import Generators
from ax.api.client import Client
from ax.api.configs import RangeParameterConfig
from ax.generation_strategy.generation_node import GenerationNode
from ax.generation_strategy.generation_strategy import GenerationStrategy
from ax.generation_strategy.generator_spec import GeneratorSpec
from ax.utils.common.logger import set_stderr_log_level
from ax.utils.common.random import with_rng_seed
from botorch.acquisition.multi_objective import logei

from tokmerge.evaluation.objective import AXES, COSTS
from tokmerge.io import store
from tokmerge.search import pareto
from tokmerge.search.space import Space
from tokmerge.search.trials import COMPLETED, AskTell, Trial

set_stderr_log_level(logging.ERROR)
# Exact values have no noise, and the models say so at every fit.
warnings.filterwarnings("ignore", "Very small noise values detected")
# botorch would compile a C++ kernel the first time (half a minute), which saves a third of a second a trial and gives
# other candidates than machines without a compiler get.
logei._load_attempted = True
NOISES = ("none", "known", "inferred")


@dataclass(frozen=True)
class Settings:
    """How to search.

    Attributes:
        axis: what stands for accuracy, one of `objective.AXES`. The root of the divergence has the same front as the
            divergence itself and is what a Gaussian process can follow.
        reference: worst value worth having of the accuracy axis, the MACs ratio and the bytes ratio. The unmerged
            model is at (0, 1, 1). Ax's objective thresholds, and the corner the hypervolume is measured from.
        n_curve: trials that start the search along the uniform-threshold curve.
        n_sobol: space-filling trials after those (scrambled Sobol points); the model proposes all further ones.
        noise: what Ax is told: "none", values are exact (they are, on these images); "known", their standard errors;
            "inferred", nothing.
        samples: Monte-Carlo samples of the acquisition function (Ax's own default: 128), which take most of the time.
        restarts, raw_samples: of its optimiser (Ax's own defaults: 20, 1024).
        max_failures: more failed trials than this stop the search.
        seed: of everything random.
    """

    axis: str = "root_kl"
    reference: tuple[float, float, float] = (0.25, 0.7, 0.4)
    n_curve: int = 0
    n_sobol: int = 10
    noise: str = "none"
    samples: int = 32
    restarts: int = 2
    raw_samples: int = 64
    max_failures: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.axis not in AXES:
            raise ValueError(f"unknown accuracy axis {self.axis!r}: use one of {', '.join(AXES)}")
        if self.noise not in NOISES:
            raise ValueError(f"unknown noise {self.noise!r}: use one of {', '.join(NOISES)}")
        if len(self.reference) != 3 or not all(value > 0 for value in self.reference):
            raise ValueError(f"reference is {self.reference}: three positive numbers are needed")
        if self.n_curve + self.n_sobol < 2:
            raise ValueError("n_curve + n_sobol is below 2: a model needs trials to start from")


class Search(AskTell):
    """A search of a space that can be left and opened again at any time.

    Args:
        folder: where it is kept, in a folder of its own.
        space, settings: what is searched, and how.
        about: what else the trials depend on (data, model, images): the same search goes on, another begins anew.
    """

    def __init__(self, folder: str | Path, space: Space, settings: Settings, about: Mapping[str, Any]) -> None:
        self.space, self.settings = space, settings
        # How many failures are borne changes no trial.
        how = {name: value for name, value in asdict(settings).items() if name != "max_failures"}
        super().__init__(folder, {**about, "space": space.about, **how}, settings.max_failures)
        self._proposed = self.folder / "proposed.json"

    @property
    def client(self) -> Client:
        """Ax's client, with every trial told so far."""
        client = self._attached
        for index in [trial.index for trial in self._running(client) if trial.index in self._rows]:
            row = self._rows[index]
            if row["status"] == COMPLETED:
                client.complete_trial(index, raw_data=self._raw_data(row))
            else:
                client.mark_trial_failed(index, failed_reason=row["reason"])
        return client

    @cached_property
    def _attached(self) -> Client:
        """A client that proposes what the one proposes that the search was left with: its trials, attached anew."""
        client = begin(self.space, self.settings)
        asked = {trial.index: dict(trial.parameters) for trial in self._running(client)}
        n_start = len(asked)
        if self._proposed.exists():
            asked |= {int(index): parameters for index, parameters in store.load_json(self._proposed).items()}
        for index in sorted({*asked, *self._rows}):
            row = self._rows.get(index, {})
            parameters = asked.get(index) or {name: row.get(name, math.nan) for name in self.space.bounds}
            self._compare(index, parameters)
            if index >= n_start and client.attach_trial(parameters) != index:
                raise ValueError(f"{self._path} has trial {index}, but not all before it: {self.remedy}")
        return client

    @property
    def hypervolume(self) -> float:
        """Share of the box below the reference point that the trials dominate."""
        if not len(rows := self.completed):
            return 0.0
        return pareto.hypervolume(pareto.objectives(rows, self.settings.axis), self.settings.reference)

    @property
    def progress(self) -> dict[str, str]:
        return {"hypervolume": f"{self.hypervolume:.4f}"}

    def _propose(self, n: int) -> list[Trial]:
        start = time.monotonic()
        if left := self._running(client := self.client):
            return left
        # Every step has a seed of its own, so that a search that was left goes on with the same random numbers.
        with with_rng_seed(self.settings.seed * 1_000_003 + self.n):
            client.get_next_trials(n)
        proposed = self._running(client)
        kept = store.load_json(self._proposed) if self._proposed.exists() else {}
        store.save_json(kept | {str(trial.index): dict(trial.parameters) for trial in proposed}, self._proposed)
        self._ask_seconds = (time.monotonic() - start) / len(proposed)
        return proposed

    def _raw_data(self, row: Mapping[str, Any]) -> dict[str, Any]:
        names = (self.settings.axis, *COSTS)
        if self.settings.noise == "inferred":
            return {name: row[name] for name in names}
        known = self.settings.noise == "known"
        return {name: (row[name], row[f"{name}_sem"] if known else 0.0) for name in names}

    def _running(self, client: Client) -> list[Trial]:
        trials, curve = [], self.settings.n_curve
        for row in client.summarize(trial_statuses=["running"]).to_dict("records"):
            index, choice = int(row["trial_index"]), {name: float(row[name]) for name in self.space.bounds}
            origin = "curve" if index < curve else "sobol" if index < curve + self.settings.n_sobol else "model"
            trials.append(Trial(index, origin, choice, self.space.configuration(choice)))
        return trials


def begin(space: Space, settings: Settings) -> Client:
    """A new Ax experiment with the trials it starts with attached."""
    client, limits, names = Client(), space.bounds.items(), (settings.axis, *COSTS)
    searched = [RangeParameterConfig(name, bounds, "float") for name, bounds in limits]
    client.configure_experiment(searched, name="thresholds")
    client.configure_optimization(
        objective=", ".join(f"-{name}" for name in names),
        # On a metric that is an objective, Ax takes a bound as its objective threshold.
        outcome_constraints=[f"{name} <= {worst}" for name, worst in zip(names, settings.reference, strict=True)],
    )
    client.set_generation_strategy(strategy(settings))
    for parameters in space.curve(settings.n_curve) + space.sobol(settings.n_sobol, settings.seed):
        client.attach_trial(parameters)
    return client


def strategy(settings: Settings) -> GenerationStrategy:
    """Ax's default model, independent Gaussian processes, under expected hypervolume improvement, all the way.

    What `Client.configure_generation_strategy` builds, without a start of its own and with a lighter optimiser. The
    acquisition function that allows for noise cuts the space into boxes once for every sample, which is most of
    what Ax's default takes; exact values need it once.
    """
    exact = settings.noise == "none"
    acquisition = logei.qLogExpectedHypervolumeImprovement if exact else logei.qLogNoisyExpectedHypervolumeImprovement
    optimizer = {"num_restarts": settings.restarts, "raw_samples": settings.raw_samples}
    options = {"botorch_acqf_class": acquisition, "botorch_acqf_options": {"mc_samples": settings.samples}}
    model = GeneratorSpec(Generators.BOTORCH_MODULAR, options, {"model_gen_options": {"optimizer_kwargs": optimizer}})
    node = GenerationNode("MBM", [model], should_deduplicate=True)
    return GenerationStrategy(name="MBM", nodes=[node])
