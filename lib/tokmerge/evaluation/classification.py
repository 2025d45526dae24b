"""Run a model over a data set and say what it scored and what it took."""

from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd
import torch
from scipy import stats
from torch import Tensor
from tqdm.auto import tqdm

from tokmerge.data.image_sets import Batch
from tokmerge.models.classifier import MergedClassifier, TokenChannel


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
        loss = torch.nn.functional.cross_entropy(self.logits, self.labels, reduction="none")
        columns = {"label": self.labels, "prediction": prediction, "confidence": confidence, "loss": loss}
        costs = {"tokens": self.tokens[:, -1], "macs": self.macs, "payload_bytes": self.payload_bytes}
        return pd.DataFrame({"id": self.ids, **columns, **costs})

    def summary(self) -> dict[str, float]:
        """Means over the images: n_images, top1 with its 95 % interval, loss, macs, tokens, payload_bytes."""
        frame = self.frame()
        means = {name: float(frame[name].mean()) for name in ("loss", "macs", "tokens", "payload_bytes")}
        return {**score_top1(frame), **means}


def evaluate(
    merged: MergedClassifier, batches: Iterable[Batch], total: int | None = None, description: str | None = None,
    through: TokenChannel | None = None,
) -> Outcome:  # fmt: skip
    """Evaluate a patched model.

    Args:
        merged: what `tokmerge.patch` gives (policy None evaluates the unmerged model).
        batches: the data, such as `tokmerge.data.image_sets.batches` gives or `split_batch` cuts.
        total, description: number of images, and what is shown beside the progress bar; None for no bar.
        through: what happens to the tokens between device and server, as `tokmerge.patch`'s model takes it.
    """
    device = next(merged.parameters()).device
    ids: list[str] = []
    parts: list[tuple[Tensor, ...]] = []
    quiet = description is None
    with torch.inference_mode(), tqdm(total=total, desc=description, unit="img", mininterval=2, disable=quiet) as bar:
        for batch in batches:
            logits, record = merged(batch.images.to(device), through=through)
            ids += batch.ids
            values = (logits.float(), record.tokens, record.macs, record.payload_bytes)
            parts.append((batch.labels, *(value.cpu() for value in values)))
            bar.update(len(batch.ids))
    return Outcome(ids, *(torch.cat(column) for column in zip(*parts, strict=True)))


def score_top1(rows: pd.DataFrame) -> dict[str, float]:
    """n_images, and top1 with the ends of its 95 % interval (Wilson 1927), top1_low and top1_high.

    >>> rows = pd.DataFrame({"prediction": [0] * 100, "label": [0] * 90 + [1] * 10})
    >>> {name: round(value, 4) for name, value in score_top1(rows).items()}
    {'n_images': 100, 'top1': 0.9, 'top1_low': 0.8256, 'top1_high': 0.9448}
    """
    hits, n = int((rows.prediction == rows.label).sum()), len(rows)
    interval = stats.binomtest(hits, n).proportion_ci(method="wilson")
    return {"n_images": n, "top1": hits / n, "top1_low": float(interval.low), "top1_high": float(interval.high)}


def relative(rows: pd.DataFrame, unmerged: pd.DataFrame) -> dict[str, float]:
    """Accuracy of some images' rows, and what they cost relative to the same images in the same order unmerged.

    Returns:
        n_images; top1 with its 95 % interval (top1_low, top1_high); top1_drop with its standard error; macs_ratio,
        tokens_ratio and bytes_ratio, means over images of merged / unmerged; payload_bytes.
    """
    hit, before = (part.prediction.eq(part.label).to_numpy(float) for part in (rows, unmerged))
    drop, found = before - hit, dict(score_top1(rows))
    found |= {"top1_drop": float(drop.mean()), "top1_drop_sem": float(drop.std(ddof=1) / len(hit) ** 0.5)}
    for name, column in (("macs_ratio", "macs"), ("tokens_ratio", "tokens_sent"), ("bytes_ratio", "payload_bytes")):
        if column in rows:
            found[name] = float((rows[column].to_numpy() / unmerged[column].to_numpy()).mean())
    return found | {"payload_bytes": float(rows.payload_bytes.mean())}
