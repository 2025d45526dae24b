"""What the paper claims, and what figures/numbers.json says about it.

The claims are those of the abstract of arXiv 2509.09955. Each is cut into conditions on numbers of this repository;
all of them together make it met. A number that is not there yet makes it "not measured", never met. On which data a
claim was measured stands beside it: nothing measured on a stand-in is a statement about ImageNet or VQAv2.
"""

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

Numbers = Mapping[str, float | str]
COMPARISONS = {"≤": operator.le, "<": operator.lt, "≥": operator.ge, ">": operator.gt}


@dataclass(frozen=True)
class Condition:
    """One number and what it must be.

    Attributes:
        name: what it is, in words.
        key: in numbers.json.
        comparison: "≤", "<", "≥" or ">".
        limit: a number, or the key of the number it is compared with.
    """

    name: str
    key: str
    comparison: str
    limit: float | str

    def check(self, numbers: Numbers) -> "Checked":
        """What was measured, and whether it is as it must be; None where a number is missing."""
        value = numbers.get(self.key)
        limit = numbers.get(self.limit) if isinstance(self.limit, str) else self.limit
        if value is None or limit is None:
            missing = self.key if value is None else str(self.limit)
            return Checked(f"{self.name}: not measured ({missing})", None)
        met = bool(COMPARISONS[self.comparison](value, limit))
        return Checked(f"{self.name} {value:.3g} ({self.comparison} {limit:.3g})", met)


class Checked(NamedTuple):
    """A condition in words, and whether it holds (None: not measured)."""

    text: str
    met: bool | None


@dataclass(frozen=True)
class Claim:
    """One claim.

    Attributes:
        text: what the paper says.
        said_of: the data it says it of.
        notebook: where it is measured here.
        dataset: key of the data it was measured on here.
        conditions: all must hold.
    """

    text: str
    said_of: str
    notebook: str
    dataset: str
    conditions: tuple[Condition, ...]


class Verdict(NamedTuple):
    """A claim held against the numbers: the claim, its data here, its conditions, met / not met / not measured."""

    claim: Claim
    dataset: str
    checked: list[Checked]
    verdict: str


def _image(text: str, *conditions: Condition) -> Claim:
    return Claim(text, "ImageNet", "40_imagenet", "imagenet.dataset", conditions)


def _vqa(prefix: str, default: str) -> Claim:
    at = f"{prefix}.at_1pp"
    return Claim(
        f"competitive with the full LLaVA at under 1/3 of the compute and 1/10 of the bandwidth{default}",
        "VQAv2",
        "50_vqav2",
        f"{prefix}.dataset",
        (
            Condition("drop of accuracy", f"{at}.drop", "≤", 0.01),
            Condition("MACs ratio", f"{at}.macs_ratio", "<", 1 / 3),
            Condition("bytes ratio", f"{at}.bytes_ratio", "<", 0.1),
        ),
    )


RIVALS = {"sobol": "Sobol points", "nsga2": "NSGA-II", "uniform": "one threshold", "fixed_r": "fixed r"}
CLAIMS = (
    Claim(
        "thresholds are found by multi-objective Bayesian optimisation as a Pareto front (here: more hypervolume than "
        "the same budget of anything else gives)",
        "ImageNet",
        "31_search_study",
        "search.dataset",
        tuple(
            Condition(f"hypervolume, against {name}", "search.hv64_fraction", ">", f"search.hv64_fraction.{key}")
            for key, name in RIVALS.items()
        ),
    ),
    _image(
        "the accuracy of the unmodified transformer with 30 % fewer FLOPs and under 20 % of the communication cost",
        Condition("drop of top-1", "imagenet.at_0.5pp.top1_drop", "≤", 0.005),
        Condition("MACs ratio", "imagenet.at_0.5pp.macs_ratio", "≤", 0.70),
        Condition("bytes ratio", "imagenet.at_0.5pp.bytes_ratio", "<", 0.20),
    ),
    _vqa("vqav2", ""),
    _vqa("vqav2.scenes", " (harder, generated questions)"),
    Claim(
        "robust over channel conditions (here: less SNR needed than by all tokens in as many channel uses)",
        "not named in the abstract",
        "60_channel",
        "channel.dataset",
        (Condition("gain in dB", "channel.gain_db_at_equal_uses", ">", 0.0),),
    ),
    Claim(
        "the front lets the sender follow the channel (here: knowing the SNR, no worse than its best fixed point)",
        "not named in the abstract",
        "60_channel",
        "channel.dataset",
        (Condition("regret in points of accuracy", "channel.policy_regret_pp", "≤", 0.0),),
    ),
    Claim(
        "merging degrades model-inversion attacks",
        "not named in the abstract",
        "70_privacy",
        "privacy.dataset",
        (
            Condition(
                "what a reconstruction is still good for",
                "privacy.attack_task_accuracy.merged",
                "<",
                "privacy.attack_task_accuracy.unmerged",
            ),
            Condition("its SSIM", "privacy.ssim.merged", "<", "privacy.ssim.unmerged"),
        ),
    ),
)


def judge(numbers: Numbers) -> list[Verdict]:
    """Hold every claim against the numbers.

    Args:
        numbers: figures/numbers.json.

    >>> [verdict] = [v for v in judge({"channel.gain_db_at_equal_uses": 2.0}) if v.verdict == "met"]
    >>> verdict.checked[0].text
    'gain in dB 2 (> 0)'
    """
    verdicts = []
    for claim in CLAIMS:
        checked = [condition.check(numbers) for condition in claim.conditions]
        if any(one.met is None for one in checked):
            verdict = "not measured"
        else:
            verdict = "met" if all(one.met for one in checked) else "not met"
        verdicts.append(Verdict(claim, str(numbers.get(claim.dataset, "")), checked, verdict))
    return verdicts
