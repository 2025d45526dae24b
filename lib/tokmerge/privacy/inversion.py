"""White-box inversion: descend through the encoder to images that have the intercepted tokens; nothing is learned."""

from collections.abc import Callable

import pandas as pd
import torch
from torch import Tensor, nn

from tokmerge.merging.calibration import Observed
from tokmerge.merging.matching import Context, Merges, Policy
from tokmerge.merging.packed import Packed
from tokmerge.models.patching import patch


def replayed(policy: Policy) -> Policy:
    """A policy whose decisions of the first pass are repeated in all others, of the same batch."""
    taken: dict[int, Merges] = {}

    def hook(context: Context, choose: Callable[[], Merges]) -> Merges:
        if context.layer not in taken:
            taken[context.layer] = choose()
        return taken[context.layer]

    return Observed(policy, hook)


def invert(
    model: nn.Module, policy: Policy | None, images: Tensor, distort: Callable[[Packed], Packed], *, mean: Tensor,
    std: Tensor, steps: int, tv_weight: float, seed: int = 0,
) -> tuple[Tensor, pd.DataFrame]:  # fmt: skip
    """White-box attack: descend from noise to images whose tokens are the intercepted ones.

    Merging decisions are those of the true images, given to the attacker and held fixed: more than it would have,
    and an objective without jumps.

    Args:
        model, policy: timm VisionTransformer, and what merges in it; None for nothing.
        images: (B, C, H, W) true images in [0, 1]; only their tokens and merging decisions are used.
        distort: what happens to the tokens on the way.
        mean, std: (C,) normalisation the model expects.
        steps, seed: of Adam on the pixels' logits, and of its start.
        tv_weight: of the total variation (mean absolute difference of neighbouring pixels).

    Returns:
        (B, C, H, W) images in [0, 1], on the CPU, and the curve: step, loss.
    """
    images = images.to(next(model.parameters()).device)
    merged = patch(model, None if policy is None else replayed(policy))
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
