"""Trials of a search: handed out, told, and kept in a table that is on disk after every one of them."""

import hashlib
import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from tokmerge import store
from tokmerge.spaces import Configuration

Result = Mapping[str, float] | Exception
COMPLETED, FAILED = "completed", "failed"


@dataclass(frozen=True)
class Trial:
    """One evaluation to make.

    Attributes:
        index: its number in the search, from 0.
        origin: what proposed it.
        parameters: the point of the search space.
        configuration: what that point stands for.
    """

    index: int
    origin: str
    parameters: Mapping[str, float]
    configuration: Configuration


class Trials:
    """The trials of one search: rows in trial order, saved whole at every change.

    A row holds the trial, its status and what was measured. Opened again with the same ``about``, the table goes on
    where it stopped; with another one it begins anew beside it, so that trials are never mixed.

    Args:
        folder: where this and other searches keep their own folders.
        about: everything the trials depend on; kept as ``about.json``.
        max_failures: more failed trials than this stop the search.
    """

    def __init__(self, folder: str | Path, about: Mapping[str, Any], max_failures: int = 5) -> None:
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        self.folder, self.max_failures = Path(folder) / digest[:12], max_failures
        self._path = self.folder / "trials.parquet"
        store.save_json(about, self.folder / "about.json")
        self._rows: dict[int, dict[str, Any]] = {}
        if self._path.exists():
            self._rows = {int(row["trial"]): row for row in store.load_table(self._path).to_dict("records")}
        before = max((row["clock"] for row in self._rows.values()), default=0.0)
        self._started = time.monotonic() - before

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, index: int) -> bool:
        return index in self._rows

    def row(self, index: int) -> dict[str, Any]:
        """One trial's row."""
        return self._rows[index]

    @property
    def table(self) -> pd.DataFrame:
        """One row per trial told, in trial order."""
        return pd.DataFrame([self._rows[index] for index in sorted(self._rows)])

    @property
    def completed(self) -> pd.DataFrame:
        """The rows of the trials that did not fail."""
        table = self.table
        return table[table.status == COMPLETED] if len(table) else table

    def add(self, trial: Trial, result: Result, **extra: float) -> None:
        """Record how a trial ended and save the table.

        Args:
            trial: the trial.
            result: what was measured; an exception or a value that is not finite makes it a failed trial.
            **extra: further columns.

        Raises:
            ValueError: the trial has ended before.
            RuntimeError: too many trials have failed; the message quotes the last failure.
        """
        if trial.index in self._rows:
            raise ValueError(f"trial {trial.index} has already been told")
        row = {"trial": trial.index, "origin": trial.origin, **_outcome(result), **trial.parameters}
        row |= trial.configuration.row() | {name: float(value) for name, value in extra.items()}
        self._rows[trial.index] = row | {"clock": time.monotonic() - self._started}
        store.save_table(self.table, self._path)
        self.check_failures()

    def check_failures(self) -> None:
        """Raise RuntimeError if too many trials have failed."""
        failed = [row for _, row in sorted(self._rows.items()) if row["status"] == FAILED]
        if len(failed) > self.max_failures:
            raise RuntimeError(
                f"{len(failed)} of {len(self)} trials failed, more than max_failures={self.max_failures}; trial "
                f"{failed[-1]['trial']} with: {failed[-1]['reason']}. Once that is mended, delete {self.folder} "
                "to start afresh"
            )


class AskTell(ABC):
    """What every way of searching shares: trials are asked for and told, and nothing is handed out anew before that.

    Attributes:
        trials: those told so far.
    """

    def __init__(self, trials: Trials) -> None:
        self.trials = trials
        self._pending: list[Trial] = []
        self._ask_seconds = 0.0

    @abstractmethod
    def _propose(self, n: int) -> list[Trial]:
        """About n further trials; those that a search left and opened again has been told may be among them."""

    @property
    def n(self) -> int:
        """Trials told so far, failed ones included."""
        return len(self.trials)

    @property
    def table(self) -> pd.DataFrame:
        """One row per trial told."""
        return self.trials.table

    def ask(self, n: int) -> list[Trial]:
        """Up to n trials to evaluate: those handed out and never told, or else new ones; none where there are no more.

        Raises:
            RuntimeError: too many trials have failed.
        """
        self.trials.check_failures()
        while not (left := [trial for trial in self._pending if trial.index not in self.trials]):
            self._pending = self._propose(n)
            if not self._pending:
                return []
        return left[:n]

    def tell(self, trial: Trial, result: Result) -> None:
        """Record how a trial ended: what was measured, or the exception it ended with.

        Raises:
            ValueError: the trial has been told before.
            RuntimeError: too many trials have failed.
        """
        self.trials.add(trial, result, ask_seconds=self._ask_seconds)


def _outcome(result: Result) -> dict[str, Any]:
    if isinstance(result, Exception):
        return {"status": FAILED, "reason": f"{type(result).__name__}: {result}"}
    wrong = [name for name, value in result.items() if not math.isfinite(value)]
    if wrong:
        return {"status": FAILED, "reason": ", ".join(f"{name} is {result[name]}" for name in wrong)}
    return {"status": COMPLETED, "reason": None, **{name: float(value) for name, value in result.items()}}
