"""The rule that chooses a point, and never sees the test images.

Trials are measured on *search*. Of every run, a method with one seed, as many go on to *select* as of every other: at
each of some losses the trial with fewest MACs and the one with fewest bytes (`shortlist`). They are measured there,
halving what is left, to find the cheapest that loses no more than is allowed (`halve`; both: `on_select`); that one
is chosen (`choose`).
A method is the median over its runs (`summarise`), and that run's point is what *test* sees. Where no trial stays
within, what is left is not to merge: ratios of 1 and no loss.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from tokmerge.evaluation.objective import COSTS
from tokmerge.io import paths, store
from tokmerge.models.configuration import from_row

RUN = ["method", "seed"]
# Normal: there are thousands of images.
Z95 = 1.959964
# For rounding: a loss of one image in two hundred is half a point.
SLACK = 1e-9


def known_rows(folder: str | None, facts: Mapping[str, Any]) -> Callable[..., pd.DataFrame | None]:
    """Gives the rows of a study's tables that have such values, or None where there are none.

    Args:
        folder: of search.parquet, select.parquet where there is one, and study.json; None: nothing is known.
        facts: what study.json has to say, so that the rows are of this study.

    Raises:
        ValueError: it says something else.
    """
    tables: dict[str, pd.DataFrame] = {}
    if folder:
        where = paths.need(folder, made_by="35_images_study")
        said = store.load_json(where / "study.json")
        for name, value in facts.items():
            if said[name] != value:
                raise ValueError(f"{folder} is of another study: its {name} is {said[name]}, not {value}")
        tables = {name: store.load_table(file) for name in ("search", "select")
                  if (file := where / f"{name}.parquet").is_file()}  # fmt: skip

    def rows(table: str, **values: Any) -> pd.DataFrame | None:
        if table not in tables:
            return None
        found = tables[table]
        for name, value in values.items():
            found = found[found[name] == value]
        return found if len(found) else None

    return rows


def shortlist(trials: pd.DataFrame, axis: str, limits: Sequence[float]) -> pd.DataFrame:
    """The trials of every run that *select* is to see: per limit and cost the cheapest, or else what loses least.

    Args:
        trials: rows with method, seed, the axis and `COSTS`, measured on *search*.
        axis: what limits are of.
        limits: losses.

    >>> trials = pd.DataFrame({"method": "m", "seed": 0, "kl": [0.1, 0.2, 0.9], "macs_ratio": [0.5, 0.6, 0.1],
    ...                        "bytes_ratio": [0.5, 0.4, 0.1]})
    >>> shortlist(trials, "kl", [0.2]).index.tolist(), shortlist(trials, "kl", [0.0]).index.tolist()
    ([0, 1], [0])
    """
    chosen: list[int] = []
    for _, run in trials.groupby(RUN, sort=False):
        within = [run[run[axis] <= limit] for limit in limits]
        cheapest = [part[cost].idxmin() for part in within if len(part) for cost in COSTS]
        chosen += dict.fromkeys(cheapest or [run[axis].idxmin()])
    return trials.loc[chosen]


def halve(
    listed: pd.DataFrame, axis: str, measure: Callable[[dict[str, Any]], Mapping[str, Any]], max_drop: float
) -> pd.DataFrame:
    """What listed trials of one run do on *select*: for each cost the middle one, then that of the half that is left.

    The cheaper half is left where the middle one stays within ``max_drop``, the dearer one else: of seven trials three
    are measured.

    Args:
        listed: `shortlist`'s rows of a run; one that is dearer than another and loses as much on *search* is passed
            over.
        axis: the loss on *search*.
        measure: what a row's trial does on *select*: score_drop and whatever else.
        max_drop: as of `choose`.

    >>> listed = pd.DataFrame({"macs_ratio": [0.2, 0.5, 0.9], "bytes_ratio": [0.2, 0.5, 0.9], "kl": [0.02, 0.01, 0.0]})
    >>> halve(listed, "kl", lambda row: {"score_drop": row["kl"]}, 0.005).score_drop.tolist()
    [0.01, 0.0]
    """
    measured: dict[int, Mapping[str, Any]] = {}
    rows = dict(zip(listed.index, listed.to_dict("records"), strict=True))
    for cost in COSTS:
        ordered = listed.sort_values([cost, axis], kind="stable")
        left = ordered.index[ordered[axis] < ordered[axis].cummin().shift(fill_value=np.inf)].tolist()
        while left:
            middle = len(left) // 2
            index = left[middle]
            measured[index] = measured.get(index) or measure(rows[index])
            left = left[:middle] if measured[index]["score_drop"] <= max_drop + SLACK else left[middle + 1 :]
    return pd.DataFrame(list(measured.values()), index=list(measured))


def on_select(
    trials: pd.DataFrame, axis: str, limits: Sequence[float], measure: Callable[[dict[str, Any]], Mapping[str, Any]],
    max_drop: float, by: Sequence[str] = RUN,
) -> pd.DataFrame:  # fmt: skip
    """What the listed trials of every run do on *select*: `shortlist`, then `halve`; runs differ in columns ``by``.

    >>> trials = pd.DataFrame({"method": ["a", "b"], "seed": 0, "kl": 0.1, "macs_ratio": 0.5, "bytes_ratio": 0.5})
    >>> on_select(trials, "kl", [0.2], lambda row: {"score_drop": 0.0, "method": row["method"]}, 0.01).method.tolist()
    ['a', 'b']
    """
    runs = tqdm(list(trials.groupby(list(by), sort=False)), desc="select", unit="run")
    found = [halve(shortlist(run, axis, limits), axis, measure, max_drop) for _, run in runs]
    return pd.concat(found, ignore_index=True)


def choose(points: pd.DataFrame, max_drop: float, by: Sequence[str] = RUN) -> pd.DataFrame:
    """For every run and cost the cheapest point that loses no more than ``max_drop`` on *select*.

    Args:
        points: rows with the columns ``by``, `COSTS` and score_drop, measured on *select*.
        max_drop: in the units of score_drop.
        by: the columns that runs differ in.

    Returns:
        One row per run and cost (column ``cost``): the point's; where none stays within, a row with ``merged`` False,
        ratios of 1 and no loss.

    >>> points = pd.DataFrame({"method": "m", "seed": 0, "score_drop": [0.0, 0.01], "macs_ratio": [0.5, 0.1],
    ...                        "bytes_ratio": [0.3, 0.1]})
    >>> choose(points, 0.005)[["cost", "macs_ratio", "merged"]].values.tolist()
    [['macs_ratio', 0.5, True], ['bytes_ratio', 0.5, True]]
    """
    rows = []
    for run, part in points.groupby(list(by), sort=False):
        within = part[part.score_drop <= max_drop + SLACK]
        for cost in COSTS:
            if len(within):
                rows.append({**within.loc[within[cost].idxmin()], "cost": cost, "merged": True})
            else:
                nothing = dict(zip(by, run, strict=True)) | {"score_drop": 0.0, **dict.fromkeys(COSTS, 1.0)}
                rows.append({**nothing, "cost": cost, "merged": False})
    return pd.DataFrame(rows)


def one_family(
    points: Sequence[Any], on: Mapping[str, Callable[[Any], Mapping[str, float]]], axis: str, limits: Sequence[float],
    max_drop: float,
) -> pd.DataFrame:  # fmt: skip
    """The whole rule for a family with one number, of a model of its own, in one piece.

    Args:
        points: configurations; every one is measured on *search*.
        on: under "search", "select" and "test" what measures a configuration there.
        axis, limits, max_drop: as of `shortlist` and `choose`.

    Returns:
        A row per cost: merged, configuration, `COSTS`, score_drop and its half interval drop_ci95, on *test*.
    """
    run = {"method": "one family", "seed": 0}
    rows = [{**run, **point.row(), **on["search"](point)} for point in tqdm(points, desc="search", unit="point")]
    listed = on_select(
        pd.DataFrame(rows), axis, limits, lambda row: {**row, **on["select"](from_row(row))}, max_drop
    )  # fmt: skip
    found = []
    for row in choose(listed, max_drop).to_dict("records"):
        tested = on["test"](from_row(row)) if row["merged"] else {**row, "score_drop_sem": 0.0}
        found.append({
            "cost": row["cost"], "merged": row["merged"], "configuration": row.get("configuration"),
            **{cost: tested[cost] for cost in COSTS}, "score_drop": tested["score_drop"],
            "drop_ci95": Z95 * tested["score_drop_sem"],
        })  # fmt: skip
    return pd.DataFrame(found)


def interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Mean over examples, and half of its 95 % interval.

    >>> [round(value, 4) for value in interval([0, 1, 0, 0])]
    [0.25, 0.49]
    """
    return float(np.mean(values)), float(Z95 * np.std(values, ddof=1) / len(values) ** 0.5)


def paired(first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """`interval` of first minus second, example by example.

    >>> paired([1, 1, 0, 1], [1, 0, 0, 1]) == interval([0, 1, 0, 0])
    True
    """
    return interval(np.asarray(first, float) - np.asarray(second, float))


def summarise(chosen: pd.DataFrame, columns: Sequence[str], by: Sequence[str] = ("method",)) -> pd.DataFrame:
    """Over the runs of every method, per cost: the run at the median of that cost, and the lowest and highest value.

    Args:
        chosen: `choose`'s rows.
        columns: of the median run to report beside the cost; of an even number of runs the dearer of the middle two.
        by: the columns that methods differ in.

    >>> rows = pd.DataFrame({"method": "m", "seed": [0, 1, 2], "cost": "macs_ratio", "macs_ratio": [0.2, 0.9, 0.4]})
    >>> summarise(rows, ["seed"])[["value", "low", "high", "seed"]].round(3).values.tolist()
    [[0.4, 0.2, 0.9, 2.0]]
    """
    rows = []
    for key, part in chosen.groupby([*by, "cost"], sort=False):
        cost = key[-1]
        ordered = part.sort_values(cost, kind="stable")
        middle = ordered.iloc[len(ordered) // 2]
        low, high = ordered[cost].iloc[[0, -1]]
        values = {"value": middle[cost], "low": low, "high": high, "n_runs": len(part)}
        rows.append({**dict(zip([*by, "cost"], key, strict=True)), **values, **middle[list(columns)]})
    return pd.DataFrame(rows)
