"""Run a model over a data set and say what it scored and what it took; time models against each other."""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from tokmerge.data import Batch
from tokmerge.policies import Calibration, Observe
from tokmerge.vit import Channel, MergedViT, patch


@dataclass(frozen=True)
class Outcome:
    """What a model did with n images, in order.

    Attributes:
        ids: n image ids.
        labels: (n,) int64.
        logits: (n, classes) float32.
        tokens: (n, L + 1) int64, entering each block and after the last.
        macs: (n,) int64.
        payload_bytes: (n,) int64.
    """

    ids: list[str]
    labels: Tensor
    logits: Tensor
    tokens: Tensor
    macs: Tensor
    payload_bytes: Tensor

    def frame(self) -> pd.DataFrame:
        """One row per image: id, label, prediction, confidence, loss, tokens, macs, payload_bytes."""
        confidence, prediction = self.logits.softmax(1).max(1)
        return pd.DataFrame(
            {
                "id": self.ids,
                "label": self.labels,
                "prediction": prediction,
                "confidence": confidence,
                "loss": torch.nn.functional.cross_entropy(self.logits, self.labels, reduction="none"),
                "tokens": self.tokens[:, -1],
                "macs": self.macs,
                "payload_bytes": self.payload_bytes,
            }
        )

    def summary(self) -> dict[str, float]:
        """Means over the images: n_images, top1 with its 95 % interval, loss, macs, tokens, payload_bytes."""
        frame = self.frame()
        hits, n = int((frame.prediction == frame.label).sum()), len(frame)
        low, high = wilson_interval(hits, n)
        means = {name: float(frame[name].mean()) for name in ("loss", "macs", "tokens", "payload_bytes")}
        return {"n_images": n, "top1": hits / n, "top1_low": low, "top1_high": high, **means}


def run(
    merged: MergedViT,
    batches: Iterable[Batch],
    total: int | None = None,
    description: str | None = None,
    through: Channel | None = None,
) -> Outcome:
    """Evaluate a patched model.

    Args:
        merged: what `tokmerge.patch` gives (policy None evaluates the unmerged model).
        batches: the data, such as `tokmerge.data.batches` gives or `split_batch` cuts.
        total: number of images, for the progress bar.
        description: shown beside the progress bar; None for no bar.
        through: what happens to the tokens between device and server, as `tokmerge.vit.MergedViT` takes it.
    """
    device = next(merged.parameters()).device
    ids: list[str] = []
    parts: list[tuple[Tensor, ...]] = []
    with (
        torch.inference_mode(),
        tqdm(total=total, desc=description, unit="img", mininterval=2, disable=description is None) as bar,
    ):
        for batch in batches:
            logits, record = merged(batch.images.to(device), through=through)
            ids += batch.ids
            values = (logits.float(), record.tokens, record.macs, record.payload_bytes)
            parts.append((batch.labels, *(value.cpu() for value in values)))
            bar.update(len(batch.ids))
    return Outcome(ids, *(torch.cat(column) for column in zip(*parts, strict=True)))


def calibrate(model: nn.Module, batches: Iterable[Batch], feature: str = "tokens") -> Calibration:
    """Each layer's distribution of best-match similarity in the unmerged model, measured on a feature."""
    observer = Observe(feature)
    run(patch(model, observer), batches)
    return observer.calibration()


def split_batch(batch: Batch, size: int) -> Iterable[Batch]:
    """Cut a set held in memory into batches of ``size``."""
    for start in range(0, len(batch.ids), size):
        part = slice(start, start + size)
        yield Batch(batch.ids[part], batch.images[part], batch.labels[part])


def wilson_interval(hits: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion (Wilson 1927): stays inside [0, 1] and is honest near its ends.

    >>> [round(end, 4) for end in wilson_interval(90, 100)]
    [0.8256, 0.9448]
    """
    share, z = hits / n, 1.959964
    centre = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return (centre - spread) / scale, (centre + spread) / scale


def relative(rows: pd.DataFrame, unmerged: pd.DataFrame) -> dict[str, float]:
    """Accuracy of some images' rows, and what they cost relative to the same images unmerged.

    Args:
        rows: columns prediction, label, payload_bytes, and macs and tokens_sent where they apply.
        unmerged: the same images in the same order.

    Returns:
        n_images; top1 with its 95 % interval (top1_low, top1_high); top1_drop with its standard error; macs_ratio,
        tokens_ratio and bytes_ratio, means over images of merged / unmerged; payload_bytes.
    """
    hit = rows.prediction.eq(rows.label).to_numpy()
    low, high = wilson_interval(int(hit.sum()), len(hit))
    drop = unmerged.prediction.eq(unmerged.label).to_numpy().astype(float) - hit
    costs = {"macs_ratio": "macs", "tokens_ratio": "tokens_sent", "bytes_ratio": "payload_bytes"}
    return {
        "n_images": len(hit),
        "top1": float(hit.mean()),
        "top1_low": low,
        "top1_high": high,
        "top1_drop": float(drop.mean()),
        "top1_drop_sem": float(drop.std(ddof=1) / len(hit) ** 0.5),
        **{
            name: float((rows[column].to_numpy() / unmerged[column].to_numpy()).mean())
            for name, column in costs.items()
            if column in rows
        },
        "payload_bytes": float(rows.payload_bytes.mean()),
    }


def alternate(functions: Mapping[str, Callable[[], Any]], rounds: int) -> pd.DataFrame:
    """Time functions against each other: one call of each in turn, ``rounds`` times after one warm-up round.

    Machines drift; compare the columns of one round, or their medians, as ratios.

    Returns:
        (rounds, functions) seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return pd.DataFrame(seconds)


def median_ratio(seconds: pd.DataFrame, numerator: str, denominator: str) -> float:
    """Median over the rounds of one function's time divided by another's."""
    return float(np.median(seconds[numerator] / seconds[denominator]))
