"""Trials of a search: asked for, told, and kept in a table that is on disk after every one of them."""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from tokmerge.evaluation.workers import Run
from tokmerge.io import store
from tokmerge.io.cache import Cache
from tokmerge.models.configuration import Configuration

COMPLETED, FAILED = "completed", "failed"
Result = Mapping[str, float] | Exception


@dataclass(frozen=True)
class Trial:
    """One evaluation to make: its number from 0, what proposed it, the point of the space and what that stands for."""

    index: int
    origin: str
    parameters: Mapping[str, float]
    configuration: Configuration


class AskTell(ABC):
    """What every way of searching shares: trials are asked for and told, and nothing is handed out anew before that.

    Opened again with the same ``about``, a search goes on where it stopped; with another one it begins anew beside it.
    While it runs no other may run in its folder, and trials on disk must be those that it would have proposed.

    Args:
        folder, about: as of `tokmerge.io.cache.Cache`; attribute ``folder`` is the search's own.
        max_failures: more failed trials than this stop the search.
    """

    def __init__(self, folder: str | Path, about: Mapping[str, Any], max_failures: int = 5) -> None:
        cache = Cache(folder, about)
        self.folder, self._path, self._max_failures = cache.folder, cache.path("trials", ".parquet"), max_failures
        self._rows: dict[int, dict[str, Any]] = {}
        if self._path.exists():
            self._rows = {int(row["trial"]): row for row in store.load_table(self._path).to_dict("records")}
        self._started = time.monotonic() - max((row["clock"] for row in self._rows.values()), default=0.0)
        self._pending: list[Trial] = []
        self._ask_seconds = 0.0

    @abstractmethod
    def _propose(self, n: int) -> list[Trial]:
        """Trials that a search was left with, or else about n further ones."""

    @property
    def n(self) -> int:
        """Trials told so far, failed ones included."""
        return len(self._rows)

    @property
    def table(self) -> pd.DataFrame:
        """One row per trial told, in trial order: the trial, its status, and what was measured."""
        return pd.DataFrame([self._rows[index] for index in sorted(self._rows)])

    @property
    def completed(self) -> pd.DataFrame:
        """The rows of the trials that did not fail."""
        return self.table[self.table.status == COMPLETED] if self.n else self.table

    @property
    def progress(self) -> dict[str, str]:
        """What is shown beside the progress bar."""
        return {}

    def ask(self, n: int) -> list[Trial]:
        """Up to n trials to evaluate: those handed out and never told, or else new ones; none where there are no more.

        Raises:
            RuntimeError: too many trials have failed.
        """
        self._check_failures()
        while not (left := [trial for trial in self._pending if trial.index not in self._rows]):
            self._pending = self._propose(n)
            if not self._pending:
                return []
            for trial in self._pending:
                self._compare(trial.index, trial.parameters)
        return left[:n]

    def _compare(self, index: int, parameters: Mapping[str, float]) -> None:
        """Raise ValueError if a trial on disk is of other parameters."""
        row = self._rows.get(index, parameters)
        if any(not math.isclose(row.get(name, math.nan), value, abs_tol=1e-9) for name, value in parameters.items()):
            raise ValueError(f"{self._path}: trial {index} is not one of this search: {self.remedy}")

    @property
    def remedy(self) -> str:
        """What to do about a folder that does not hold together."""
        return f"restore what belongs together, or delete {self.folder} to start afresh"

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No other search runs in the folder meanwhile, nor has one since this one was opened; RuntimeError else."""
        try:
            with FileLock(self.folder / ".lock", timeout=0):
                if self._path.exists() and len(store.load_table(self._path)) != self.n:
                    raise RuntimeError(f"another run has searched in {self.folder} since: open it again")
                yield
        except Timeout:
            raise RuntimeError(f"another run is searching in {self.folder}: wait for its end") from None

    def tell(self, trial: Trial, result: Result) -> None:
        """Record what was measured; an exception, or a value that is not finite, makes it a failed trial.

        Raises:
            ValueError: the trial has been told before.
            RuntimeError: too many trials have failed; the message quotes the last failure.
        """
        if trial.index in self._rows:
            raise ValueError(f"trial {trial.index} has already been told")
        row = {"trial": trial.index, "origin": trial.origin, **_outcome(result), **trial.parameters}
        row |= {**trial.configuration.row(), "ask_seconds": float(self._ask_seconds)}
        self._rows[trial.index] = row | {"clock": time.monotonic() - self._started}
        store.save_table(self.table, self._path)
        self._check_failures()

    def run(self, evaluate: Run, n: float = math.inf, at_once: int = 1, description: str | None = None) -> pd.DataFrame:
        """Ask, evaluate and tell.

        Args:
            evaluate: of `tokmerge.evaluation.workers`; from configurations to what is measured of them.
            n, at_once: trials to have in the end (all there are by default), and that are proposed together.
            description: shown beside the progress bar; None for no bar.

        Returns:
            The table, with each evaluation's ``seconds``.
        """
        bar = tqdm(total=n, initial=self.n, desc=description, unit="trial", leave=False, disable=description is None)
        with self._alone(), bar:
            while self.n < n and (trials := self.ask(int(min(at_once, n - self.n)))):
                asked = {trial.index: trial for trial in trials}
                for index, result, seconds in evaluate({key: trial.configuration for key, trial in asked.items()}):
                    measured = result if isinstance(result, Exception) else {**result, "seconds": seconds}
                    self.tell(asked[index], measured)
                    bar.set_postfix(self.progress, refresh=False)
                    bar.update()
        return self.table

    def _check_failures(self) -> None:
        failed = [row for _, row in sorted(self._rows.items()) if row["status"] == FAILED]
        if len(failed) > self._max_failures:
            raise RuntimeError(
                f"{len(failed)} of {self.n} trials failed, more than max_failures={self._max_failures}; trial "
                f"{failed[-1]['trial']} with: {failed[-1]['reason']}. Once that is mended, delete {self.folder} "
                "to start afresh"
            )


def _outcome(result: Result) -> dict[str, Any]:
    if isinstance(result, Exception):
        return {"status": FAILED, "reason": f"{type(result).__name__}: {result}"}
    if wrong := [name for name, value in result.items() if not math.isfinite(value)]:
        return {"status": FAILED, "reason": ", ".join(f"{name} is {result[name]}" for name in wrong)}
    return {"status": COMPLETED, "reason": None, **{name: float(value) for name, value in result.items()}}
