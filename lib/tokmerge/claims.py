"""What is claimed, held against the numbers by rules that were written first.

params/claims.yaml cuts every claim into conditions on figures/numbers.json. A condition is met only if all of the
number's interval is on the right side of its limit; a limit that is a number itself counts with its worst end. A claim
is *held* if all its conditions are met, held *in part* if some are, *not held* if none is, and *untestable* if a number
is missing. The keys of the studies' numbers are made here, too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import yaml

from tokmerge.io import paths

VERDICTS = ("held", "in part", "not held", "untestable")


class Estimate(NamedTuple):
    """A number and the ends of its interval, which are the number itself where it has none."""

    value: float
    low: float
    high: float


class Condition(NamedTuple):
    """A number, by its key, has to be "≤" or "≥" a limit, which is a number or the key of one."""

    what: str
    key: str
    comparison: str
    limit: float | str


@dataclass(frozen=True)
class Claim:
    """One claim on one set of data; see params/claims.yaml for the fields."""

    name: str
    claim: str
    said_of: str
    measured_on: str
    notebook: str
    protocol: str
    conditions: tuple[Condition, ...]


class Judged(NamedTuple):
    """A verdict of `VERDICTS`; each condition in words with whether it is met; the first condition's number."""

    verdict: str
    conditions: list[tuple[str, bool | None]]
    estimate: Estimate | None


def load_claims(file: str) -> tuple[str, list[Claim]]:
    """What a claims file says of itself, and its claims.

    Raises:
        ValueError: a field or comparison that is unknown, or two claims of one name.
    """
    content = yaml.safe_load(paths.resolve(file).read_text())
    claims = []
    for entry in content["claims"]:
        try:
            conditions = tuple(Condition(*condition) for condition in entry["conditions"])
            claims.append(Claim(**{**entry, "conditions": conditions}))
        except TypeError as error:
            raise ValueError(f"{file}: claim {entry.get('name')!r}: {error}") from error
        if bad := {condition.comparison for condition in conditions} - {"≤", "≥"}:
            raise ValueError(f"{file}: claim {entry['name']!r}: unknown comparison {', '.join(bad)}: use ≤ or ≥")
    names = [claim.name for claim in claims]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{file}: two claims are called {', '.join(sorted(twice))}")
    return content["about"], claims


def estimate(numbers: Mapping[str, Any], key: str) -> Estimate | None:
    """A number with its interval: half under ``<key>_ci95`` or ``<key>.ci95``, or the ends ``.low`` and ``.high``.

    >>> estimate({"a": 0.5, "a.ci95": 0.25, "b": 1}, "a"), estimate({"b": 1}, "b"), estimate({}, "c")
    (Estimate(value=0.5, low=0.25, high=0.75), Estimate(value=1, low=1, high=1), None)
    """
    if (value := numbers.get(key)) is None:
        return None
    half = numbers.get(f"{key}_ci95", numbers.get(f"{key}.ci95", 0))
    return Estimate(value, numbers.get(f"{key}.low", value - half), numbers.get(f"{key}.high", value + half))


def judge(conditions: Sequence[Condition], numbers: Mapping[str, Any]) -> Judged:
    """The verdict on a claim.

    >>> judge([Condition("drop", "d", "≤", 0.01)], {"d": 0.005, "d.ci95": 0.004}).verdict
    'held'
    >>> judge([Condition("drop", "d", "≤", 0.01)], {"d": 0.005, "d.ci95": 0.006}).verdict
    'not held'
    """
    said: list[tuple[str, bool | None]] = []
    for what, key, comparison, limit in conditions:
        found = estimate(numbers, key)
        bound = estimate(numbers, limit) if isinstance(limit, str) else Estimate(limit, limit, limit)
        if found is None or bound is None:
            said.append((f"{what}: no number", None))
            continue
        met = found.high <= bound.low if comparison == "≤" else found.low >= bound.high
        spread = f" ({found.low:.3g} to {found.high:.3g})" if found.low < found.high else ""
        worst = bound.low if comparison == "≤" else bound.high
        said.append((f"{what} {found.value:.3g}{spread}, to be {comparison} {worst:.3g}", met))
    each = [one for _, one in said]
    verdict = "untestable" if None in each else "held" if all(each) else "in part" if any(each) else "not held"
    return Judged(verdict, said, estimate(numbers, conditions[0].key))


def verdicts(claims: Sequence[Claim], numbers: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of all claims: ``claims.<name>.verdict``, and ``.value`` with ``.low`` and ``.high`` of the first."""
    found: dict[str, Any] = {}
    for claim in claims:
        judged, key = judge(claim.conditions, numbers), f"claims.{claim.name}"
        found[f"{key}.verdict"] = judged.verdict
        if judged.estimate is not None:
            found |= dict(zip((f"{key}.value", f"{key}.low", f"{key}.high"), judged.estimate, strict=True))
    return found


def slug(name: str) -> str:
    """A data set's or a method's name as part of a key.

    >>> slug("ToMe, size-aware+")
    'tome_size_aware_plus'
    """
    return name.lower().replace("-", "_").replace(", ", "_").replace(" ", "_").replace("+", "_plus")


def score_key(name: str) -> str:
    """A score's name as part of a key: "top1" of "top-1"."""
    return name.lower().replace("-", "")


def questions_key(model: str, data: str = "") -> str:
    """What is asked of a model, as part of a key or a file's name; of scenes it says where the few shipped photos were
    all they were made of.

    >>> questions_key("scenes-llava", "scenes of Fashion-MNIST (sample)")
    'scenes_sample'
    """
    known, name = {"easy-vqa-llava": "easy_vqa", "scenes-llava": "scenes", "llava-1.5-7b-hf": "vqav2"}, Path(model).name
    return known.get(name, slug(name)) + "_sample" * ("sample" in data)


def ablated(table: pd.DataFrame) -> pd.DataFrame:
    """An ablation's points as rows of a study: one threshold, the model taught with merged tokens."""
    values = [row[row["cost"]] for row in table.to_dict("records")]
    return table.assign(method="one threshold, taught", value=values, low=values, high=values)


def chosen_numbers(prefix: str, study: pd.DataFrame, groups: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Of every method of a study the points of fewest MACs and bytes: range over seeds, the other cost, what they lose.

    Args:
        prefix: of the keys.
        study: rows of one data set, as `tokmerge.evaluation.selection.summarise` gives them, with losses on *test*.
        groups: methods by the name of a group, whose best is named: ``<prefix>.best_<group>.<cost>``.
    """
    numbers: dict[str, Any] = {}
    for row in study.to_dict("records"):
        method, cost = f"{prefix}.{slug(row['method'])}", row["cost"].removesuffix("_ratio")
        key, drop = f"{method}.{cost}", f"{method}.bytes" if cost == "bytes" else method
        numbers |= {key: row["value"], f"{key}.low": row["low"], f"{key}.high": row["high"]}
        numbers |= {f"{drop}.drop": row["score_drop"], f"{drop}.drop_ci95": row["drop_ci95"]}
        other = "macs" if cost == "bytes" else "bytes"
        numbers[f"{key}.{other}"] = row[f"{other}_ratio"]
    for group, cost in [(group, cost) for group in groups for cost in ("macs", "bytes")]:
        own = study[study.method.isin(groups[group]) & (study.cost == f"{cost}_ratio")]
        best = own.loc[own.value.idxmin()]
        for end, name in (("", "value"), (".low", "low"), (".high", "high"), (".method", "method")):
            numbers[f"{prefix}.best_{group}.{cost}{end}"] = best[name]
    return numbers


def adaptivity_numbers(prefix: str, gains: pd.DataFrame, method: str, which: str = "") -> dict[str, float]:
    """What adaptivity buys at a method's point of fewest MACs, in points; ``which`` is part of the keys."""
    numbers: dict[str, float] = {}
    for against, name in (("same counts", f"adaptivity{which}"), ("window pooling", f"adaptivity{which}_pooling")):
        found = gains[(gains.method == method) & (gains.against == against)].sort_values("cost", ascending=False)
        if len(found):
            numbers[f"{prefix}.{name}.drop_pp"] = 100 * found.gain.iloc[0]
            numbers[f"{prefix}.{name}.drop_pp.ci95"] = 100 * found.gain_ci95.iloc[0]
    return numbers


def with_step(
    gain: Mapping[str, float], sweep: pd.DataFrame, family: str, over: str = "unmerged", slack: float = 0.01
) -> dict[str, float]:
    """A gain whose interval holds the step between SNRs as well: where between two of them a curve rises is not known.

    Args:
        gain: db, low and high, of `tokmerge.channel.comparison.cliff_gain_db`, whose arguments the others are.
        sweep: columns snr_db, family, score.

    >>> sweep = pd.DataFrame([(s, f, 0.9 * (s >= at)) for f, at in (("unmerged", 8), ("a", 4)) for s in (0, 4, 8)],
    ...                      columns=["snr_db", "family", "score"])
    >>> with_step({"db": 4.0, "low": 3.5, "high": 4.5}, sweep, "a")
    {'db': 4.0, 'low': 0, 'high': 8}
    """
    curves = sweep.pivot(index="snr_db", columns="family", values="score").sort_index()
    goal, ends = curves["unmerged"].iloc[-1] - slack, []
    for name in (over, family):
        there = (curves[name] >= goal).to_numpy()
        if there[0] or not there.any():
            return dict(gain)
        ends.append(curves.index[there.argmax() - 1 : there.argmax() + 1].tolist())
    (a, b), (c, d) = ends
    return {**gain, "low": min(gain["low"], a - d), "high": max(gain["high"], b - c)}


def gain_numbers(prefix: str, gains: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Decibels that families need less, with the ends and half of their interval; *adaptive* is the prefix's own.

    A gain that is a bound and has no spread was not measured: there is no cliff where the base never gets through.

    >>> gain_numbers("c", {"cut off": {"db": 1.0, "low": 0.0, "high": 3.0, "bounded": False}})["c.gain_db.cut_off.ci95"]
    1.5
    >>> gain_numbers("c", {"adaptive": {"db": 0.0, "low": 0.0, "high": 0.0, "bounded": True}})
    {}
    """
    numbers: dict[str, float] = {}
    for family, gain in gains.items():
        if gain["bounded"] and gain["low"] == gain["high"]:
            continue
        key = f"{prefix}.gain_db" + ("" if family == "adaptive" else f".{slug(family)}")
        numbers |= {key: gain["db"], f"{key}.low": gain["low"], f"{key}.high": gain["high"]}
        numbers[f"{key}.ci95"] = (gain["high"] - gain["low"]) / 2
    return numbers
