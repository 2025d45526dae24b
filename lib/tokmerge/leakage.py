"""How much of an image a reconstruction gives away: image by image, on average, and for the unlucky ones.

Similarity: PSNR and SSIM (torchmetrics), FSIM and HaarPSI (piq), all of which work on 28x28 pixels as they are.
Distance in the embedded ViT's own features. Task accuracy of a *judge*, a classifier that no attacker has seen.
And *matching*: does the reconstruction tell its original from the other test images of its class? A model that keeps
its accuracy must send the class; everything that matching finds beyond chance is more than the task asks for.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import numpy as np
import pandas as pd
import piq
import torch
from scipy.stats import t
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from tqdm.auto import tqdm

# The share of images that counts as unlucky.
WORST = 0.05
# Fewer originals of a class than this make matching too easy to mean anything.
RIVALS = 20


def similarity(images: Tensor, rebuilt: Tensor, batch_size: int = 256) -> pd.DataFrame:
    """Full-reference metrics of each image: psnr (dB), ssim, fsim, haarpsi; larger is more alike.

    Args:
        images: (n, C, H, W) in [0, 1], C = 1 or 3, at least 16 pixels a side.
        rebuilt: the same of the reconstructions.
        batch_size: images at a time.

    Raises:
        ValueError: the shapes differ.
    """
    if images.shape != rebuilt.shape:
        raise ValueError(f"images are {tuple(images.shape)}, reconstructions {tuple(rebuilt.shape)}")
    parts = []
    for x, y in zip(images.split(batch_size), rebuilt.split(batch_size), strict=True):
        colours = x.shape[1] == 3
        parts.append(
            {
                # An exact copy would be infinitely good.
                "psnr": peak_signal_noise_ratio(
                    y, x, data_range=1.0, reduction="none", dim=(1, 2, 3)
                ).clamp(max=100.0),
                "ssim": structural_similarity_index_measure(y, x, data_range=1.0, reduction="none"),
                "fsim": piq.fsim(y, x, reduction="none", chromatic=colours),
                "haarpsi": piq.haarpsi(y, x, reduction="none"),
            }
        )  # fmt: skip
    columns = {name: torch.cat([part[name] for part in parts]).flatten() for name in parts[0]}
    return pd.DataFrame({name: column.numpy() for name, column in columns.items()})


def feature_distance(features: Callable[[Tensor], Tensor], images: Tensor, rebuilt: Tensor, batch_size: int) -> Tensor:
    """(n,) 1 - cosine between a model's features of original and reconstruction.

    Args:
        features: (B, C, H, W) images in [0, 1] to (B, d).
        images, rebuilt: (n, C, H, W) in [0, 1].
        batch_size: images at a time.
    """
    pairs = zip(images.split(batch_size), rebuilt.split(batch_size), strict=True)
    with torch.inference_mode():
        return torch.cat([1 - F.cosine_similarity(features(x), features(y), dim=1) for x, y in pairs])


def matching(images: Tensor, rebuilt: Tensor, groups: Tensor) -> pd.DataFrame:
    """Does each reconstruction find its original among all originals of its group, by squared pixel distance?

    Args:
        images, rebuilt: (n, C, H, W).
        groups: (n,) such as the class.

    Returns:
        matched: the original is the nearest; chance: one over the originals to choose from. Missing values where a
        group has fewer than `RIVALS` images.
    """
    matched, chance = np.full(len(images), np.nan), np.full(len(images), np.nan)
    for group in groups.unique():
        rows = (groups == group).nonzero().flatten()
        if len(rows) < RIVALS:
            continue
        nearest = torch.cdist(rebuilt[rows].flatten(1).double(), images[rows].flatten(1).double()).argmin(1)
        matched[rows] = (nearest == torch.arange(len(rows))).numpy()
        chance[rows] = 1 / len(rows)
    return pd.DataFrame({"matched": matched, "chance": chance})


def summarise(
    table: pd.DataFrame, reference: pd.DataFrame | None = None, draws: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Means with 95 % bootstrap intervals over the images, over all of them and over the worst.

    The worst are the 5 % of images whose reconstructions are most alike by SSIM, the same ones for all metrics; every
    draw of images finds its own.

    Args:
        table: one row per image, a column per metric, among them ssim; missing values do not count.
        reference: the same images under another defence, for differences on the same images.
        draws: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        Rows metric, images ("all" or "worst"), value, low, high, and with a reference change, change_low, change_high.
    """
    n, metrics = len(table), list(table.columns)
    rng = np.random.default_rng(seed)
    samples = [np.arange(n), *(rng.integers(0, n, n) for _ in range(draws))]
    found = {which: np.stack([_means(table, rows, which) for rows in samples]) for which in ("all", "worst")}
    based = None
    if reference is not None:
        reference = reference[metrics]
        based = {which: np.stack([_means(reference, rows, which) for rows in samples]) for which in found}
    rows = []
    for which, means in found.items():
        for column, metric in enumerate(metrics):
            row = {"metric": metric, "images": which, **_interval(means[:, column])}
            if based is not None:
                change = _interval(means[:, column] - based[which][:, column])
                row |= {
                    f"change{'_' * (key != 'value')}{key if key != 'value' else ''}": v for key, v in change.items()
                }
            rows.append(row)
    return pd.DataFrame(rows)


def _means(table: pd.DataFrame, rows: np.ndarray, which: str) -> np.ndarray:
    """Mean of every column over the images drawn, or over the worst of them."""
    values = table.to_numpy(float)[rows]
    if which == "worst":
        count = max(1, round(WORST * len(rows)))
        values = values[np.argsort(-values[:, table.columns.get_loc("ssim")], kind="stable")[:count]]
    seen = np.isfinite(values)
    total, number = np.where(seen, values, 0.0).sum(0), seen.sum(0)
    return np.divide(total, number, out=np.full(len(total), np.nan), where=number > 0)


def _interval(values: np.ndarray) -> dict[str, float]:
    low, high = np.nanquantile(values[1:], [0.025, 0.975]) if np.isfinite(values).any() else (np.nan, np.nan)
    return {"value": float(values[0]), "low": float(low), "high": float(high)}


class Judge(nn.Module):
    """A small convolutional classifier of (B, C, H, W) images in [0, 1], unlike what attacks and what is attacked."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        widths = (channels, 32, 32, 64, 64, 96)
        layers: list[nn.Module] = []
        for index, (before, after) in enumerate(pairwise(widths)):
            layers += [nn.Conv2d(before, after, 3, 1 + index % 2, 1), nn.BatchNorm2d(after), nn.ReLU()]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(widths[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        """Class scores (B, classes)."""
        return self.head(self.body(images - 0.5).mean((2, 3)))


def teach(
    judge: Judge, images: Tensor, labels: Tensor, *, epochs: float, batch_size: int, lr: float, seed: int,
    description: str | None = None,
) -> Judge:  # fmt: skip
    """Train a judge on labelled images, mirrored and shifted at random.

    Args:
        judge: trained in place.
        images: (n, C, H, W) uint8.
        labels: (n,) int64.
        epochs, batch_size, lr: of AdamW with a one-cycle rate.
        seed: of batches, mirrors and shifts.
        description: shown beside the progress bar; None for no bar.

    Returns:
        The judge, ready to evaluate.
    """
    generator, n, device = torch.Generator().manual_seed(seed), len(images), next(judge.parameters()).device
    steps = max(2, round(epochs * n / batch_size))
    optimiser = torch.optim.AdamW(judge.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps)
    judge.train()
    for _ in tqdm(range(steps), desc=description, mininterval=5, disable=description is None):
        rows = torch.randint(n, (batch_size,), generator=generator)
        batch = images[rows].float() / 255
        if torch.rand(1, generator=generator) < 0.5:
            batch = batch.flip(3)
        shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
        batch = batch.roll(shift, (2, 3)).to(device)
        value = F.cross_entropy(judge(batch), labels[rows].to(device), label_smoothing=0.05)
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        schedule.step()
    return judge.eval()


def classify(judge: nn.Module, images: Tensor, batch_size: int = 256) -> Tensor:
    """(n,) predicted classes, on the CPU, of (n, C, H, W) images in [0, 1], which go where the judge lies."""
    device = next(judge.parameters()).device
    with torch.inference_mode():
        return torch.cat([judge(batch.to(device)).argmax(1).cpu() for batch in images.split(batch_size)])


def retraining_intervals(values: Mapping[str, Sequence[float]], level: float = 0.95) -> dict[str, tuple[float, float]]:
    """Where one more training would land, from some that differ in nothing but the seed.

    mean +- t s sqrt(1 + 1/k), as for a further draw from a normal distribution; s is pooled over all that is given.

    Args:
        values: of each defence, k trainings.
        level: probability.

    Raises:
        ValueError: fewer than two trainings of one defence.

    >>> found = retraining_intervals({"a": [0.5, 0.52, 0.54]})
    >>> [round(end, 3) for end in found["a"]]
    [0.421, 0.619]
    """
    for name, given in values.items():
        if len(given) < 2:
            raise ValueError(f"{name}: {len(given)} training tells nothing about the next: give at least two")
    freedom = sum(len(given) - 1 for given in values.values())
    squares = sum(np.square(np.subtract(given, np.mean(given))).sum() for given in values.values())
    reach = float(t.ppf(0.5 + level / 2, freedom)) * float(squares / freedom) ** 0.5
    middles = {name: (float(np.mean(given)), reach * (1 + 1 / len(given)) ** 0.5) for name, given in values.items()}
    return {name: (middle - away, middle + away) for name, (middle, away) in middles.items()}
