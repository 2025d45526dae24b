"""What some peers need to know before they merge: statistics and thresholds measured on calibration images."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tokmerge import evaluate
from tokmerge.data import Batch
from tokmerge.merge import Context, Merges, match
from tokmerge.peers import AdaMerge
from tokmerge.policies import Observe, Policy, Threshold, bipartite_macs, check_length, moments
from tokmerge.vit import patch


@dataclass(frozen=True)
class _Watched:
    """A policy, or None for nothing, that keeps every image's mean best-match similarity at each layer."""

    policy: Policy | None
    feature: str
    seen: dict[int, list[Tensor]] = field(default_factory=dict)

    def check(self, depth: int) -> None:
        if self.policy is not None:
            self.policy.check(depth)

    def active(self, layer: int) -> bool:
        return True

    def select(self, context: Context) -> Merges:
        matches = match(context)
        self.seen.setdefault(context.layer, []).append(moments(matches.similarity)[0].squeeze(1).cpu())
        if self.policy is not None and self.policy.active(context.layer):
            return self.policy.select(context)
        return matches.merges(torch.zeros_like(matches.similarity, dtype=torch.bool))

    def match_macs(self, n: Tensor, d: int) -> Tensor:
        return bipartite_macs(n, d)


def similarity_statistics(
    model: nn.Module, batches: Sequence[Batch], policy: Policy | None = None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation over images of their mean best-match similarity, one per block: for `AdaMerge`.

    Args:
        model: timm VisionTransformer.
        batches: calibration images.
        policy: what merges meanwhile. Merging leaves tokens that are less alike: against statistics of the unmerged
            model every image looks poor in the later blocks. None: nothing.
    """
    watched = _Watched(policy, AdaMerge.feature)
    evaluate.run(patch(model, watched), batches)
    layers = [torch.cat(watched.seen[layer]) for layer in sorted(watched.seen)]
    return tuple(part.mean().item() for part in layers), tuple(part.std().item() for part in layers)


@dataclass(frozen=True)
class _Upto:
    """One policy before a layer, another one at it, nothing after it."""

    before: Policy
    here: Policy
    layer: int

    @property
    def feature(self) -> str:
        return self.before.feature

    def check(self, depth: int) -> None:
        self.before.check(depth)

    def active(self, layer: int) -> bool:
        return layer == self.layer or (layer < self.layer and self.before.active(layer))

    def select(self, context: Context) -> Merges:
        return (self.here if context.layer == self.layer else self.before).select(context)

    def match_macs(self, n: Tensor, d: int) -> Tensor:
        return self.before.match_macs(n, d)


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
        count = round(rate * n_images)
        if count == 0:
            continue
        observer = Observe(feature)
        evaluate.run(patch(model, _Upto(Threshold(thresholds, feature), observer, layer)), batches)
        seen = torch.cat(observer.seen[layer]).sort(descending=True).values
        # Just those above the next one merge; all of them where there are not more.
        thresholds[layer] = seen[count].item() if count < len(seen) else -1.0
    return Threshold(thresholds, feature)
