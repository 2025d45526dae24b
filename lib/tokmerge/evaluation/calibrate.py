"""What is measured on calibration images: how similar tokens are, and statistics and thresholds that peers need."""

from collections.abc import Iterable, Sequence

from torch import nn

from tokmerge.data.image_sets import Batch
from tokmerge.evaluation.classification import evaluate
from tokmerge.merging.calibration import Calibration, best_similarities, observe
from tokmerge.merging.matching import Policy, match
from tokmerge.merging.peers import AdaMerge
from tokmerge.merging.policies import Threshold, check_length, moments
from tokmerge.models.vit import patch


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
    return tuple(part.mean().item() for part in layers), tuple(part.std().item() for part in layers)


def thresholds_for_rates(
    model: nn.Module, batches: Sequence[Batch], rates: Sequence[float], feature: str = "keys"
) -> Threshold:
    """Thresholds under which every block loses a given number of tokens on average (DyMU, Wang et al., 2504.17040).

    Block by block, each one observed while those before it merge.

    Args:
        model: timm VisionTransformer.
        batches: calibration images; they are run once per block.
        rates: mean number of tokens to lose, one per block.
        feature: what similarity is measured on; the method's own is the keys.

    Raises:
        ValueError: not one rate per block.
    """
    blocks: nn.Sequential = model.blocks  # type: ignore[assignment]
    check_length("thresholds_for_rates", "rates", tuple(rates), len(blocks))
    thresholds = [1.0] * len(blocks)
    n_images = sum(len(batch.ids) for batch in batches)
    for layer, rate in enumerate(rates):
        if (count := round(rate * n_images)) == 0:
            continue
        # So far nothing merges at this block, nor after it.
        before = Threshold(thresholds, feature)
        seen = observe(lambda observer: evaluate(patch(model, observer), batches), best_similarities, before)[layer]
        seen = seen.sort(descending=True).values
        # Just those above the next one merge; all of them where there are not more.
        thresholds[layer] = seen[count].clamp(-1, 1).item() if count < len(seen) else -1.0
    return Threshold(thresholds, feature)
