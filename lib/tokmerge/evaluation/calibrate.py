"""What is measured on calibration images: how similar tokens are, and statistics and thresholds that peers need."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from tokmerge.data.image_sets import Batch
from tokmerge.evaluation.outcomes import evaluate
from tokmerge.merging.calibration import Calibration, Observed, observe
from tokmerge.merging.matching import Context, Merges, Policy, match
from tokmerge.merging.peers import AdaMerge
from tokmerge.merging.policies import Threshold, check_length, moments
from tokmerge.models.patching import patch


def calibrate(model: nn.Module, batches: Iterable[Batch], feature: str = "tokens") -> Calibration:
    """Each layer's distribution of best-match similarity in the unmerged model, measured on a feature."""
    return Calibration.of(lambda observer: evaluate(patch(model, observer), batches), feature)


def similarity_statistics(
    model: nn.Module, batches: Sequence[Batch], policy: Policy | None = None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation over images of their mean best-match similarity, one per block: for `AdaMerge`.

    The policy merges meanwhile: that leaves tokens that are less alike, and against statistics of the unmerged model
    every image looks poor in the later blocks.
    """
    layers = observe(
        lambda observer: evaluate(patch(model, observer), batches),
        lambda context: moments(match(context).similarity)[0].squeeze(1), policy, AdaMerge.feature,
    )  # fmt: skip
    # Rounded: they are part of what a search is known by, and the last bits depend on the machine.
    return tuple(round(part.mean().item(), 4) for part in layers), tuple(round(part.std().item(), 4) for part in layers)


def thresholds_for_rates(
    run: Callable[[Policy], Any], rates: Sequence[float], feature: str = "keys", size_aware: bool = False
) -> Threshold:
    """Thresholds under which every block loses a given number of tokens on average (DyMU, Wang et al., 2504.17040).

    In every batch each block's threshold is the one that takes that many tokens off on average, and merges what comes
    before the next is observed; as published, thresholds are means over batches and not negative. Its virtual
    unmerging, which changes attention, is not part of this.

    Args:
        run: runs a model on calibration images with the policy it is given.
        rates: mean number of tokens to lose, one per block.
        feature: what similarity is measured on; the method's own is the keys.
        size_aware: as of `Threshold`, whose thresholds may then be negative; not part of the method.

    Raises:
        ValueError: not one rate per block.
    """
    lowest = -1.0 if size_aware else 0.0
    found: dict[int, list[float]] = defaultdict(list)

    def hook(context: Context, choose: Callable[[], Merges]) -> Merges:
        thresholds = found[context.layer]
        if context.layer >= len(rates) or not rates[context.layer]:
            return choose()
        matches = match(context, size_aware=size_aware)
        seen = matches.similarity[matches.similarity.isfinite()].sort(descending=True).values
        count = round(rates[context.layer] * len(context.layout.lengths))
        # Just those above the next one merge; all of them where there are not more.
        threshold = seen[count].clamp(lowest, 1).item() if count < len(seen) else lowest
        thresholds.append(threshold)
        return matches.take(threshold)

    run(Observed(None, hook, feature))
    check_length("thresholds_for_rates", "rates", tuple(rates), len(found))
    return Threshold(
        [sum(found[i]) / len(found[i]) if found[i] else 1.0 for i in range(len(rates))], feature, size_aware
    )
