"""What the search evaluates: a configuration has a price and a loss.

Everything is measured on the same images as the unmerged model and relative to it, image by image: most of the
noise of drawing those images cancels.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokmerge import data, evaluate, models, wire
from tokmerge.data import Batch
from tokmerge.evaluate import Outcome
from tokmerge.spaces import Configuration
from tokmerge.vit import patch

# What may stand on the accuracy axis; each is 0 for the unmerged model and grows as merging does harm.
AXES = ("kl", "root_kl", "loss_rise", "top1_drop")
COSTS = ("macs_ratio", "bytes_ratio")


@dataclass
class Objective:
    """Evaluates configurations of one model on one set of images; the same configuration only once.

    Args:
        model: timm VisionTransformer.
        images: the pre-processed search images.
        batch_size: images per forward pass.
    """

    model: nn.Module
    images: Batch
    batch_size: int = 32
    _outcomes: dict[Any, Outcome] = field(default_factory=dict, repr=False)
    _measured: dict[Any, dict[str, float]] = field(default_factory=dict, repr=False)

    def __call__(self, configuration: Configuration, n_images: int | None = None) -> dict[str, float]:
        """Measure a configuration.

        Args:
            configuration: what to evaluate.
            n_images: use only the first of the images: a cheap look with a larger standard error.

        Returns:
            Means over the images and their standard errors (``<name>_sem``): top1 and loss; kl, the divergence
            KL(unmerged || merged) of the predicted distributions, and its root; loss_rise and top1_drop against the
            unmerged model; macs_ratio, tokens_ratio and bytes_ratio, merged / unmerged at float16; n_images.
        """
        n = len(self.images.ids) if n_images is None else n_images
        if not 1 < n <= len(self.images.ids):
            raise ValueError(f"cannot measure on {n} of {len(self.images.ids)} images")
        key = (configuration, n)
        if key not in self._measured:
            self._measured[key] = compare(self._run(configuration, n), self.unmerged(n))
        return dict(self._measured[key])

    def unmerged(self, n_images: int | None = None) -> Outcome:
        """What the unmerged model does with the first n images (all by default)."""
        n = len(self.images.ids) if n_images is None else n_images
        if n not in self._outcomes:
            self._outcomes[n] = self._run(Configuration(None), n)
        return self._outcomes[n]

    @property
    def about(self) -> dict[str, float]:
        """What measurements depend on: the number of images, and what the unmerged model does with them."""
        unmerged = self.unmerged().summary()
        return {"n_images": unmerged["n_images"], "loss": round(unmerged["loss"], 5), "macs": unmerged["macs"]}

    def batches(self, n_images: int) -> Iterable[Batch]:
        """The first n images, a forward pass at a time."""
        first = next(iter(evaluate.split_batch(self.images, n_images)))
        return evaluate.split_batch(first, self.batch_size)

    def _run(self, configuration: Configuration, n: int) -> Outcome:
        return run(self.model, configuration, self.batches(n))


def run(model: nn.Module, configuration: Configuration, batches: Iterable[Batch]) -> Outcome:
    """What a model does under a configuration; the server works on values of the precision that was sent.

    At 16 bits and more it works on the device's own: rounding changes the scores by less than one in a thousand.
    """
    precision = configuration.precision
    merged = patch(model, configuration.policy, precision=precision, split_layer=configuration.split_layer)
    if precision not in ("int8", "int4"):
        return evaluate.run(merged, batches)
    return evaluate.run(merged, batches, through=lambda sent: sent.with_x(wire.quantise(sent.x, precision)))


def compare(merged: Outcome, unmerged: Outcome) -> dict[str, float]:
    """Means and standard errors of a merged model's outcome against the unmerged model's, image by image."""
    log_p, log_q = unmerged.logits.double().log_softmax(1), merged.logits.double().log_softmax(1)
    hit = (merged.logits.argmax(1) == merged.labels).double()
    loss = F.cross_entropy(merged.logits.double(), merged.labels, reduction="none")
    columns = {
        "top1": hit,
        "loss": loss,
        "kl": (log_p.exp() * (log_p - log_q)).sum(1),
        "loss_rise": loss - F.cross_entropy(unmerged.logits.double(), merged.labels, reduction="none"),
        "top1_drop": (unmerged.logits.argmax(1) == merged.labels).double() - hit,
        "macs_ratio": merged.macs / unmerged.macs.double(),
        "tokens_ratio": merged.tokens[:, -1] / unmerged.tokens[:, -1].double(),
        "bytes_ratio": merged.payload_bytes / unmerged.payload_bytes.double(),
    }
    measured = {"n_images": float(len(hit))}
    for name, values in columns.items():
        measured |= {name: values.mean().item(), f"{name}_sem": _standard_error(values)}
    return measured | root_of(measured["kl"], measured["kl_sem"])


def root_of(kl: float, sem: float) -> dict[str, float]:
    """The root of a mean divergence and its standard error, from those of the divergence.

    >>> root_of(0.25, 0.125), root_of(0.0, 0.25)
    ({'root_kl': 0.5, 'root_kl_sem': 0.125}, {'root_kl': 0.0, 'root_kl_sem': 0.5})
    """
    # Rounding can leave the divergence of nearly equal distributions a hair below zero.
    root = max(kl, 0.0) ** 0.5
    # To first order; near zero, where that breaks down, the root of the mean's own error.
    return {"root_kl": root, "root_kl_sem": min(sem / (2 * root), sem**0.5) if root else sem**0.5}


def _standard_error(values: Tensor) -> float:
    return (values.std() / len(values) ** 0.5).item()


def load(inputs_dir: str, n_images: int, batch_size: int = 32, skip: int = 0) -> Objective:
    """The objective on images of the search split that notebook 10_inputs settled on.

    Workers call this in their own process, so all arguments are plain.

    Args:
        inputs_dir: results of 10_inputs.
        n_images: how many images, in the split's order.
        batch_size: images per forward pass.
        skip: images left out before the first.

    Raises:
        FileNotFoundError: 10_inputs has not been run.
        ValueError: the search split holds fewer images.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, search, _ = models.reload(*models.recorded(inputs_dir), device)
    images = data.tensors(data.stretch(search, n_images, skip, "search"), models.transform(model))
    return Objective(model, images, batch_size)
