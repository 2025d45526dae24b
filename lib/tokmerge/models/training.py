"""The one training loop: of ViT, LLaVAs, judges, attackers and learned codecs."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR
from tqdm.auto import trange

from tokmerge.io import store

Optimization = tuple[Sequence[Optimizer], Sequence[LRScheduler]]


def adamw(model: nn.Module, lr: float, steps: int, weight_decay: float, warm_up: float = 0.3) -> Optimization:
    """AdamW whose rate rises for a share ``warm_up`` of the steps and then falls to zero (one cycle)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=weight_decay)
    return [optimizer], [OneCycleLR(optimizer, lr, total_steps=max(steps, 2), pct_start=warm_up)]


def muon(
    model: nn.Module, hidden: Sequence[str], lr_muon: float, lr_adamw: float, weight_decay: float,
    factor: Callable[[int], float],
) -> Optimization:  # fmt: skip
    """Muon for hidden layers' matrices (with one of ``hidden`` in their name), AdamW for all other weights.

    Both rates are multiplied by ``factor`` of the step (from 0); the weight decay is AdamW's, Muon's is 0.01.
    """
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, weights in model.named_parameters():
        (matrices if weights.ndim == 2 and any(part in name for part in hidden) else others).append(weights)
    optimizers: list[Optimizer] = [torch.optim.Muon(matrices, lr=lr_muon, weight_decay=0.01)]
    optimizers.append(torch.optim.AdamW(others, lr=lr_adamw, weight_decay=weight_decay))
    return optimizers, [LambdaLR(optimizer, factor) for optimizer in optimizers]


def train(
    model: nn.Module,
    loss: Callable[[int], Tensor],
    optimization: Optimization,
    steps: int,
    *,
    clip: float | None = None,
    seed: int | None = None,
    check: Callable[[int, list[float]], bool | None] | None = None,
    check_every: int = 0,
    checkpoint: Path | None = None,
    description: str | None = None,
) -> list[float]:
    """Train a model in place, on the device where it lies.

    Args:
        model: left in evaluation mode.
        loss: draws batch number ``step`` (from 0) and gives its loss.
        optimization: optimisers and their schedules, such as `adamw` or `muon` gives.
        steps: of the optimisers.
        clip: largest norm of the gradient; None for any.
        seed: of torch's global generators, set anew before every step; None where they go on from where they are, or
            ``loss`` has a generator of its own.
        check: called after every ``check_every`` steps with the steps done and all losses so far; what it draws on
            the CPU changes nothing. If it gives True, training ends there.
        check_every: 0 for never. The checkpoint is written as often, and after the last step.
        checkpoint: file the run goes on from, and leaves behind. What follows is equal to the bit to a run that was
            not interrupted, on the CPU also without ``seed``.
        description: shown beside the progress bar; None for no bar.

    Returns:
        The loss of every step.
    """
    optimizers, schedules = optimization
    losses: list[float] = []
    state_of: list[Any] = [*optimizers, *schedules]
    if checkpoint is not None and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location="cpu")
        model.load_state_dict(state["model"])
        for item, saved in zip(state_of, state["optimization"], strict=True):
            item.load_state_dict(saved)
        losses = state["losses"]
        torch.set_rng_state(state["generator"])
    model.train()
    start = len(losses)
    for step in trange(
        start, steps, initial=start, total=steps, desc=description, mininterval=10, disable=description is None
    ):
        if seed is not None:
            torch.manual_seed(seed * 1_000_003 + step)
        value = loss(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        value.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        for item in state_of:
            item.step()
        losses.append(value.item())
        due = check_every > 0 and (step + 1) % check_every == 0
        if checkpoint is not None and (due or step + 1 == steps):
            with store.writing(checkpoint) as temporary:
                saved = [item.state_dict() for item in state_of]
                state = {"model": model.state_dict(), "losses": losses, "optimization": saved}
                torch.save(state | {"generator": torch.get_rng_state()}, temporary)
        if check is not None and due:
            model.eval()
            with torch.random.fork_rng(devices=[]):
                ended = check(step + 1, losses)
            if ended:
                break
            model.train()
    model.eval()
    return losses
