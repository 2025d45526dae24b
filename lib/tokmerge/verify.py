"""`python -m tokmerge.verify`: are the rebuilt numbers the committed ones?

Compares figures/numbers.json with the one in git, number by number; params/tolerances.yaml says how far each may move.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from math import inf
from pathlib import Path
from typing import NamedTuple

import yaml

from tokmerge.io import paths

NUMBERS = "figures/numbers.json"
Number = float | str


class Rule(NamedTuple):
    """How far the numbers of some keys may move: by at most the tolerance (0: must be equal, inf: only reported)."""

    pattern: str
    tolerance: float
    why: str


@dataclass(frozen=True)
class Difference:
    """One key whose values are not equal; before is None where it is new, after where it is gone."""

    key: str
    before: Number | None
    after: Number | None
    rule: Rule

    @property
    def beyond(self) -> bool:
        """Whether it moved further than its rule allows; a new key cannot, a lost one always does."""
        if self.before is None or self.rule.tolerance == inf:
            return False
        if self.after is None or isinstance(self.before, str) or isinstance(self.after, str):
            return True
        return abs(self.after - self.before) > self.rule.tolerance + 1e-12

    def __str__(self) -> str:
        before, after = (
            one if one is None or isinstance(one, str) else f"{one:.6g}" for one in (self.before, self.after)
        )
        allowed = "only reported" if self.rule.tolerance == inf else f"within {self.rule.tolerance:g}"
        moved = f"{before} -> {after} ({allowed}: {self.rule.why})"
        said = f"new, {after}" if before is None else f"gone, was {before}" if after is None else moved
        return f"{'MOVED' if self.beyond else '     '} {self.key}: {said}"


@cache
def rules() -> tuple[Rule, ...]:
    """All rules, the first that fits holds, the last fits everything."""
    return tuple(Rule(**rule) for rule in yaml.safe_load((paths.root() / "params" / "tolerances.yaml").read_text()))


def rule_of(key: str) -> Rule:
    """The first rule that fits a key.

    >>> rule_of("inputs.top1").tolerance, rule_of("search.minutes_64").tolerance, rule_of("inputs.n_images").tolerance
    (0.005, inf, 0)
    """
    return next(rule for rule in rules() if fnmatchcase(key, rule.pattern))


def compare(before: Mapping[str, Number], after: Mapping[str, Number]) -> list[Difference]:
    """Every key whose values differ, in the order of the committed file, new keys last.

    >>> [moved] = compare({"a.top1": 0.9, "b": 1}, {"a.top1": 0.8, "b": 1})
    >>> moved.key, moved.beyond
    ('a.top1', True)
    """
    pairs = {key: (before.get(key), after.get(key)) for key in [*before, *after]}
    return [Difference(key, old, new, rule_of(key)) for key, (old, new) in pairs.items() if old != new]


def committed(root: Path, revision: str = "HEAD") -> dict[str, Number]:
    """The numbers as git holds them in a revision.

    Raises:
        ValueError: no git, no repository, or no such file in that commit.
    """
    command = ["git", "-C", str(root), "show", f"{revision}:{NUMBERS}"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise ValueError("git is not installed: install it, the committed numbers are read with it") from error
    if shown.returncode:
        raise ValueError(
            f"{NUMBERS} of {revision} cannot be read: {shown.stderr.strip()}\n"
            "A git clone is needed (not a downloaded archive), and a commit that holds the file."
        )
    return dict(json.loads(shown.stdout))


def main() -> None:
    """Print what moved; exit with 1 if something moved beyond its tolerance."""
    parser = argparse.ArgumentParser(prog="python -m tokmerge.verify", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--against", default="HEAD", metavar="REVISION", help="of git (default HEAD)")
    revision = parser.parse_args().against
    try:
        before = committed(paths.root(), revision)
        after = json.loads(paths.need(NUMBERS, made_by="91_claims").read_text())
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"verify: {error}")
    differences = compare(before, after)
    print(*differences, sep="\n", end="\n" if differences else "")
    beyond = sum(difference.beyond for difference in differences)
    equal = len(before) - sum(difference.before is not None for difference in differences)
    print(
        f"{len(before)} committed numbers ({revision}): {equal} equal, "
        f"{len(differences) - beyond} moved within tolerance or new, {beyond} beyond it"
    )
    sys.exit(1 if beyond else 0)


if __name__ == "__main__":
    main()
