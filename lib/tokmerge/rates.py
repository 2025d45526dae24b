"""What some peers need to know before they merge: statistics and thresholds measured on calibration images."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tokmerge import evaluate
from tokmerge.data import Batch
from tokmerge.merge import Context, Merges
from tokmerge.policies import Observe, Policy, Threshold, check_length
from tokmerge.vit import patch


def similarity_statistics(model: nn.Module, batches: Sequence[Batch]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation over images of their mean best-match similarity, one per block: for `AdaMerge`."""
    observer = Observe()
    n_images = len(evaluate.run(patch(model, observer), batches).ids)
    # Nothing merges while observing: every image has as many matches as any other.
    layers = [torch.cat(observer.seen[layer]).view(n_images, -1).mean(1) for layer in sorted(observer.seen)]
    return tuple(part.mean().item() for part in layers), tuple(part.std().item() for part in layers)


@dataclass(frozen=True)
class _Upto:
    """One policy before a layer, another one at it, nothing after it."""

    before: Policy
    here: Policy
    layer: int

    def check(self, depth: int) -> None:
        self.before.check(depth)

    def active(self, layer: int) -> bool:
        return layer == self.layer or (layer < self.layer and self.before.active(layer))

    def select(self, context: Context) -> Merges:
        return (self.here if context.layer == self.layer else self.before).select(context)

    def match_macs(self, n: Tensor, d: int) -> Tensor:
        return self.before.match_macs(n, d)


def thresholds_for_rates(model: nn.Module, batches: Sequence[Batch], rates: Sequence[float]) -> Threshold:
    """Thresholds under which every block loses a given number of tokens on average (DyMU, Wang et al., 2504.17040).

    Block by block, each one observed while those before it merge.

    Args:
        model: timm VisionTransformer.
        batches: calibration images; they are run once per block.
        rates: mean number of tokens to lose, one per block.

    Raises:
        ValueError: not one rate per block.
    """
    blocks: nn.Sequential = model.blocks  # type: ignore[assignment]
    check_length("thresholds_for_rates", "rates", tuple(rates), len(blocks))
    thresholds = [1.0] * len(blocks)
    n_images = sum(len(batch.ids) for batch in batches)
    for layer, rate in enumerate(rates):
        count = round(rate * n_images)
        if count == 0:
            continue
        observer = Observe()
        evaluate.run(patch(model, _Upto(Threshold(thresholds), observer, layer)), batches)
        seen = torch.cat(observer.seen[layer]).sort(descending=True).values
        # Just those above the next one merge; all of them where there are not more.
        thresholds[layer] = seen[count].item() if count < len(seen) else -1.0
    return Threshold(thresholds)
