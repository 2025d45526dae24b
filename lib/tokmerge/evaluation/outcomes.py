"""Run a model over pictures and say what it made of them and what it took: classes, or maps.

Every image has a *score*, between 0 and 1 and better when larger: of a class whether it is right, of a map its
intersection over union with the mask. Where nothing is known of the pictures it is agreement with the unmerged model:
of classes whether they are the same, of maps their correlation.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from tokmerge.data.image_sets import Batch
from tokmerge.evaluation import maps
from tokmerge.models.classifier import MergedClassifier, TokenChannel
from tokmerge.models.dense import MergedDense


@dataclass(frozen=True)
class Outcome:
    """What a classifier did with n images, in order.

    Attributes:
        ids: n image ids.
        labels: (n,) int64; -1 where none is known.
        logits: (n, classes) float32.
        tokens: (n, L + 1) int64, entering each block and after the last.
        macs: (n,) int64.
        payload_bytes: (n,) int64.
        masks: (n, H, W) bool; None where there are none.
    """

    ids: list[str]
    labels: Tensor
    logits: Tensor
    tokens: Tensor
    macs: Tensor
    payload_bytes: Tensor
    masks: Tensor | None = None

    @property
    def score_name(self) -> str:
        """What the score is."""
        return "top-1" if self.known else "agreement"

    @property
    def known(self) -> bool:
        """Whether the truth is known of all images."""
        return bool((self.labels >= 0).all())

    def answers(self) -> dict[str, Tensor]:
        """Columns, (n,) each, of what the model says and how right it is; where that is not known, it is."""
        confidence, prediction = self.logits.softmax(1).max(1)
        if not self.known:
            return {"prediction": prediction, "confidence": confidence, "score": torch.ones(len(prediction))}
        loss = F.cross_entropy(self.logits, self.labels, reduction="none")
        score = (prediction == self.labels).double()
        return {"prediction": prediction, "confidence": confidence, "loss": loss, "score": score}

    def compare(self, unmerged: "Outcome") -> dict[str, Tensor]:
        """Columns, (n,) each, against what the unmerged model did: losses, of which 0 is none."""
        log_p, log_q = unmerged.logits.double().log_softmax(1), self.logits.double().log_softmax(1)
        kl = (log_p.exp() * (log_p - log_q)).sum(1)
        first, second = log_p.exp().topk(2).values.unbind(1)
        doubt = 1 - (first - second)
        other = (unmerged.logits.argmax(1) != self.logits.argmax(1)).double()
        found = {"kl": kl, "margin_kl": kl * doubt / doubt.mean().clamp_min(1e-12), "disagreement": other}
        if not self.known:
            return found | {"score": 1 - other, "score_drop": other}
        loss, before = (F.cross_entropy(of.logits.double(), of.labels, reduction="none") for of in (self, unmerged))
        hit, was = ((of.logits.argmax(1) == of.labels).double() for of in (self, unmerged))
        return found | {"score": hit, "loss": loss, "loss_rise": loss - before, "score_drop": was - hit}

    def frame(self) -> pd.DataFrame:
        """One row per image: id, label, `answers`, tokens, macs, payload_bytes."""
        costs = {"tokens": self.tokens[:, -1], "macs": self.macs, "payload_bytes": self.payload_bytes}
        return pd.DataFrame({"id": self.ids, "label": self.labels, **self.answers(), **costs})

    def summary(self) -> dict[str, float]:
        """Means over the images: n_images, macs, tokens, payload_bytes; score with its 95 % interval, and losses."""
        frame = self.frame()
        names = [name for name in ("loss", "mae", "f_measure") if name in frame]
        means = {name: float(frame[name].mean()) for name in (*names, "macs", "tokens", "payload_bytes")}
        return {"n_images": len(frame), **score_interval(frame.score), **means}


class MapOutcome(Outcome):
    """What a dense model did with n pictures: logits are (n, H, W), those of maps."""

    @property
    def score_name(self) -> str:
        return "IoU" if self.known else "correlation"

    @property
    def known(self) -> bool:
        return self.masks is not None

    def answers(self) -> dict[str, Tensor]:
        confidence = self.logits.abs().sigmoid().mean((1, 2))
        known = {"score": torch.ones(len(confidence))}
        return {"confidence": confidence} | (known if self.masks is None else maps.score_maps(self.logits, self.masks))

    def compare(self, unmerged: Outcome) -> dict[str, Tensor]:
        found = maps.compare_maps(self.logits, unmerged.logits)
        if self.masks is None:
            return found | {"score": found["correlation"], "score_drop": 1 - found["correlation"]}
        own, before = (maps.score_maps(of.logits, self.masks) for of in (self, unmerged))
        return found | own | {"loss_rise": own["mae"] - before["mae"], "score_drop": before["score"] - own["score"]}


def evaluate(
    merged: MergedClassifier, batches: Iterable[Batch], total: int | None = None, description: str | None = None,
    through: TokenChannel | None = None,
) -> Outcome:  # fmt: skip
    """Evaluate a patched model.

    Args:
        merged: what `tokmerge.patch` gives (policy None evaluates the unmerged model).
        batches: the images, such as `tokmerge.data.image_sets.batches` gives or `split_batch` cuts.
        total, description: number of images, and what is shown beside the progress bar; None for no bar.
        through: what happens to the tokens between device and server, as `tokmerge.patch`'s model takes it.
    """
    device = next(merged.parameters()).device
    ids: list[str] = []
    masks: list[Tensor] = []
    parts: list[tuple[Tensor, ...]] = []
    quiet = description is None
    with torch.inference_mode(), tqdm(total=total, desc=description, unit="img", mininterval=2, disable=quiet) as bar:
        for batch in batches:
            logits, record = merged(batch.images.to(device), through=through)
            ids += batch.ids
            masks += [] if batch.masks is None else [batch.masks]
            values = (logits.float(), record.tokens, record.macs, record.payload_bytes)
            parts.append((batch.labels, *(value.cpu() for value in values)))
            bar.update(len(batch.ids))
    labels, logits, tokens, macs, sent = (torch.cat(column) for column in zip(*parts, strict=True))
    truth = torch.cat(masks) if len(masks) == len(parts) else None
    return kind_of(merged)(ids, labels, logits, tokens, macs, sent, truth)


def decide(logits: Tensor) -> Tensor:
    """What is answered: (B,) classes of (B, classes) logits, (B, H, W) bool of those of maps."""
    return logits.argmax(1) if logits.ndim == 2 else logits > 0


def agreement(answers: Tensor, truth: Tensor) -> Tensor:
    """(B,) of `decide`'s answers with others or with what is true: 1 for the same class, the overlap of maps.

    >>> agreement(torch.tensor([3, 1]), torch.tensor([3, 2]))
    tensor([1., 0.], dtype=torch.float64)
    """
    return (answers == truth).double() if answers.ndim == 1 else maps.overlap(answers, truth)


def kind_of(merged: MergedClassifier) -> type[Outcome]:
    """What a patched model's answers are."""
    return MapOutcome if isinstance(merged, MergedDense) else Outcome


def score_interval(scores: pd.Series | np.ndarray) -> dict[str, float]:
    """The mean score and the ends of its 95 % interval, score_low and score_high.

    Wilson's (1927) where every image is right or wrong, else the normal one.

    >>> {name: round(value, 4) for name, value in score_interval(np.array([1.0] * 90 + [0.0] * 10)).items()}
    {'score': 0.9, 'score_low': 0.8256, 'score_high': 0.9448}
    """
    scores, n = np.asarray(scores, float), len(scores)
    mean = float(scores.mean())
    if np.isin(scores, (0, 1)).all():
        interval = stats.binomtest(int(scores.sum()), n).proportion_ci(method="wilson")
        return {"score": mean, "score_low": float(interval.low), "score_high": float(interval.high)}
    half = float(stats.norm.ppf(0.975) * scores.std(ddof=1) / n**0.5)
    return {"score": mean, "score_low": mean - half, "score_high": mean + half}


def relative(rows: pd.DataFrame, unmerged: pd.DataFrame) -> dict[str, float]:
    """Score of some images' rows, and what they cost relative to the same images in the same order unmerged.

    Returns:
        n_images; score with its 95 % interval (score_low, score_high); score_drop with its standard error; macs_ratio,
        tokens_ratio and bytes_ratio, means over images of merged / unmerged; payload_bytes.
    """
    drop = unmerged.score.to_numpy() - rows.score.to_numpy()
    found = {"n_images": len(rows), **score_interval(rows.score)}
    found |= {"score_drop": float(drop.mean()), "score_drop_sem": float(drop.std(ddof=1) / len(drop) ** 0.5)}
    for name, column in (("macs_ratio", "macs"), ("tokens_ratio", "tokens_sent"), ("bytes_ratio", "payload_bytes")):
        if column in rows:
            found[name] = float((rows[column].to_numpy() / unmerged[column].to_numpy()).mean())
    return found | {"payload_bytes": float(rows.payload_bytes.mean())}
