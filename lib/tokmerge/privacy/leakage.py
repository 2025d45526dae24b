"""How much of an image a reconstruction gives away: image by image, on average, and for the unlucky ones.

Similarity: PSNR and SSIM (torchmetrics), FSIM and HaarPSI (piq), all of which work on 28x28 pixels as they are.
Distance in the embedded ViT's own features. Task accuracy of a *judge*, a classifier that no attacker has seen.
And *re-identification*: does the reconstruction tell its original from the other test images of its class? A model
that keeps its accuracy must send the class; everything found beyond chance is more than the task asks for.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
import piq
import torch
from scipy.stats import t
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

# The share of images that counts as unlucky.
WORST = 0.05
# Among fewer originals of a class than this the right one is found too easily to mean anything.
FEWEST_CANDIDATES = 20


def similarity(images: Tensor, rebuilt: Tensor, batch_size: int = 256) -> pd.DataFrame:
    """Full-reference metrics of each image: psnr (dB), ssim, fsim, haarpsi; larger is more alike.

    Images and reconstructions are (n, C, H, W) in [0, 1], C = 1 or 3, at least 16 pixels a side.

    Raises:
        ValueError: the shapes differ.
    """
    if images.shape != rebuilt.shape:
        raise ValueError(f"images are {tuple(images.shape)}, reconstructions {tuple(rebuilt.shape)}")
    parts = []
    for x, y in zip(images.split(batch_size), rebuilt.split(batch_size), strict=True):
        psnr = peak_signal_noise_ratio(y, x, data_range=1.0, reduction="none", dim=(1, 2, 3))
        columns = {
            # An exact copy would be infinitely good.
            "psnr": psnr.clamp(max=100.0),
            "ssim": structural_similarity_index_measure(y, x, data_range=1.0, reduction="none"),
            "fsim": piq.fsim(y, x, reduction="none", chromatic=x.shape[1] == 3),
            "haarpsi": piq.haarpsi(y, x, reduction="none"),
        }
        parts.append(pd.DataFrame({name: column.flatten().numpy() for name, column in columns.items()}))
    return pd.concat(parts, ignore_index=True)


def feature_distance(features: Callable[[Tensor], Tensor], images: Tensor, rebuilt: Tensor, batch_size: int) -> Tensor:
    """(n,) 1 - cosine between a model's features (B, d) of originals and reconstructions, as the model takes them."""
    pairs = zip(images.split(batch_size), rebuilt.split(batch_size), strict=True)
    with torch.inference_mode():
        return torch.cat([1 - F.cosine_similarity(features(x), features(y), dim=1) for x, y in pairs])


def reidentify(images: Tensor, rebuilt: Tensor, groups: Tensor) -> pd.DataFrame:
    """Does each reconstruction find its original among the originals of its group, by squared pixel distance?

    Images and reconstructions are (n, C, H, W), groups (n,), such as the class. Columns: identified, the original is
    the nearest; chance, one over the originals to choose from; missing in groups of fewer than `FEWEST_CANDIDATES`.
    """
    found = pd.DataFrame(np.nan, range(len(images)), ["identified", "chance"])
    for group in groups.unique():
        rows = (groups == group).nonzero().flatten()
        if len(rows) >= FEWEST_CANDIDATES:
            nearest = torch.cdist(rebuilt[rows].flatten(1).double(), images[rows].flatten(1).double()).argmin(1)
            found.loc[rows.numpy(), "identified"] = (nearest == torch.arange(len(rows))).double().numpy()
            found.loc[rows.numpy(), "chance"] = 1 / len(rows)
    return found


def summarise_leakage(
    table: pd.DataFrame, reference: pd.DataFrame | None = None, draws: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Means with 95 % bootstrap intervals over the images, over all of them and over the worst.

    The worst are the 5 % of images whose reconstructions are most alike by SSIM, the same ones for all metrics; every
    draw of images finds its own.

    Args:
        table: one row per image, a column per metric, among them ssim; missing values do not count.
        reference: the same images under another defence, for differences on the same images.
        draws, seed: of the bootstrap.

    Returns:
        Rows metric, images ("all" or "worst"), value, low, high, and with a reference change, change_low, change_high.
    """
    n, metrics = len(table), list(table.columns)
    rng = np.random.default_rng(seed)
    samples = np.stack([np.arange(n), *(rng.integers(0, n, n) for _ in range(draws))])
    parts = np.array_split(samples, max(1, samples.size // 100_000))  # a few MB at a time
    rows = []
    for which in ("all", "worst"):
        means = np.concatenate([_means(table, drawn, which) for drawn in parts])
        change = None
        if reference is not None:
            change = means - np.concatenate([_means(reference[metrics], drawn, which) for drawn in parts])
        for column, metric in enumerate(metrics):
            row = {"metric": metric, "images": which, **_interval(means[:, column], "value", "low", "high")}
            if change is not None:
                row |= _interval(change[:, column], "change", "change_low", "change_high")
            rows.append(row)
    return pd.DataFrame(rows)


def _means(table: pd.DataFrame, drawn: np.ndarray, which: str) -> np.ndarray:
    """Mean of every column over the images of every draw (one a row), or over the worst of them: (draws, columns)."""
    values = table.to_numpy(float)[drawn]
    if which == "worst":
        count = max(1, round(WORST * drawn.shape[1]))
        order = np.argsort(-values[:, :, table.columns.get_loc("ssim")], axis=1, kind="stable")[:, :count]
        values = np.take_along_axis(values, order[:, :, None], 1)
    seen = np.isfinite(values)
    total, number = np.where(seen, values, 0.0).sum(1), seen.sum(1)
    return np.divide(total, number, out=np.full(total.shape, np.nan), where=number > 0)


def _interval(values: np.ndarray, *names: str) -> dict[str, float]:
    """The first of the values and the quantiles of the others, under three names."""
    ends = np.nanquantile(values[1:], [0.025, 0.975]) if np.isfinite(values).any() else (np.nan, np.nan)
    return dict(zip(names, map(float, (values[0], *ends)), strict=True))


def retraining_intervals(values: Mapping[str, Sequence[float]], level: float = 0.95) -> dict[str, tuple[float, float]]:
    """Where one more training would land with probability ``level``, from k of each defence that differ in the seed.

    mean +- t s sqrt(1 + 1/k), as for a further draw from a normal distribution; s is pooled over all that is given.

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
