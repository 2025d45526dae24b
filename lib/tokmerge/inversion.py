"""White-box inversion: descend through the encoder to images that have the intercepted tokens; nothing is learned."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pandas as pd
import torch
from torch import Tensor, nn

from tokmerge.merge import Context, Merges
from tokmerge.packed import Packed
from tokmerge.policies import Policy
from tokmerge.vit import patch


@dataclass(frozen=True)
class Replay:
    """The decisions another policy took on one batch: recorded in the first pass, repeated in all others.

    Args:
        policy: decides in the first pass.
    """

    policy: Policy
    taken: dict[int, Merges] = field(default_factory=dict)

    @property
    def feature(self) -> str:
        """What the other policy compares."""
        return self.policy.feature

    def check(self, depth: int) -> None:
        self.policy.check(depth)

    def active(self, layer: int) -> bool:
        return self.policy.active(layer)

    def select(self, context: Context) -> Merges:
        if context.layer not in self.taken:
            self.taken[context.layer] = self.policy.select(context)
        return self.taken[context.layer]

    def match_macs(self, n: Tensor, d: int) -> Tensor:
        return self.policy.match_macs(n, d)


def invert(
    model: nn.Module,
    policy: Policy | None,
    images: Tensor,
    distort: Callable[[Packed], Packed],
    *,
    mean: Tensor,
    std: Tensor,
    steps: int,
    tv_weight: float,
    seed: int = 0,
) -> tuple[Tensor, pd.DataFrame]:
    """White-box attack: descend from noise to images whose tokens are the intercepted ones.

    Merging decisions are those of the true images, given to the attacker and held fixed: more than it would have,
    and an objective without jumps.

    Args:
        model: timm VisionTransformer.
        policy: what merges; None for nothing.
        images: (B, C, H, W) true images in [0, 1]; only their tokens and merging decisions are used.
        distort: what happens to the tokens on the way.
        mean, std: (C,) normalisation the model expects.
        steps: of Adam on the pixels' logits.
        tv_weight: of the total variation (mean absolute difference of neighbouring pixels).
        seed: of the start.

    Returns:
        (B, C, H, W) images in [0, 1], on the CPU, and the curve: step, loss.
    """
    images = images.to(next(model.parameters()).device)
    merged = patch(model, None if policy is None else Replay(policy))
    mean, std = (part.view(-1, 1, 1).to(images.device) for part in (mean, std))
    with torch.no_grad():
        target = distort(merged.edge((images - mean) / std)).x
    scale = target.std(0).clamp_min(1e-6)
    start = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    logits = (0.1 * start).to(images.device).requires_grad_()
    optimiser = torch.optim.Adam([logits], lr=0.3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    curve = []
    for step in range(1, steps + 1):
        guess = logits.sigmoid()
        distance = ((merged.edge((guess - mean) / std).x - target) / scale).square().mean()
        variation = guess.diff(dim=2).abs().mean() + guess.diff(dim=3).abs().mean()
        (logits.grad,) = torch.autograd.grad(distance + tv_weight * variation, [logits])
        optimiser.step()
        schedule.step()
        if step % max(1, steps // 10) == 0:
            curve.append({"step": step, "loss": distance.item()})
    return logits.detach().sigmoid().cpu(), pd.DataFrame(curve)
