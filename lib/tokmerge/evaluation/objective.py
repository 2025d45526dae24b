"""What a configuration costs and loses: in one number each for a search, and image by image in shards.

A search measures on the same images as the unmerged model and relative to it, image by image: most of the noise of
drawing those images cancels.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import pandas as pd
import torch
from torch import nn

from tokmerge import wire
from tokmerge.data import image_sets
from tokmerge.data.image_sets import Batch, ImageSet
from tokmerge.evaluation import outcomes
from tokmerge.evaluation.inputs import open_inputs
from tokmerge.evaluation.outcomes import Outcome
from tokmerge.evaluation.workers import Shard
from tokmerge.models import zoo
from tokmerge.models.configuration import Configuration
from tokmerge.models.patching import patch

# What may stand on the accuracy axis; each is 0 for the unmerged model and grows as merging does harm.
AXES = ("kl", "root_kl", "root_margin_kl", "loss_rise", "disagreement", "score_drop")
COSTS = ("macs_ratio", "bytes_ratio")


@dataclass
class Objective:
    """Evaluates configurations of one model on one set of images; the same configuration only once.

    Args:
        model: timm VisionTransformer.
        images: the pre-processed search images, two at least.
        batch_size: images per forward pass.
    """

    model: nn.Module
    images: Batch
    batch_size: int = 32
    _measured: dict[Configuration, dict[str, float]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if len(self.images.ids) < 2:
            raise ValueError(f"cannot measure on {len(self.images.ids)} images: a standard error needs two")

    def __call__(self, configuration: Configuration) -> dict[str, float]:
        """Measure a configuration.

        Returns:
            Means over the images and their standard errors (``<name>_sem``): score (see
            `tokmerge.evaluation.outcomes`); kl, the divergence KL(unmerged || merged) of the predicted distributions,
            and its root; root_margin_kl, the same of a mean in which images (pixels of a map) count the more the more
            the unmerged model is in doubt; disagreement, the share of images (pixels) given another answer than
            without merging; score_drop, and where the truth is known loss_rise, both against the unmerged
            model; macs_ratio, tokens_ratio and bytes_ratio, merged / unmerged at float16; n_images.
        """
        if configuration not in self._measured:
            self._measured[configuration] = compare_outcomes(self._run(configuration), self.unmerged)
        return dict(self._measured[configuration])

    @cached_property
    def unmerged(self) -> Outcome:
        """What the unmerged model does with the images."""
        return self._run(Configuration(None))

    @property
    def about(self) -> dict[str, float]:
        """What measurements depend on: the number of images, and what the unmerged model does with them."""
        made = self.unmerged
        size = round(made.logits.double().square().mean().sqrt().item(), 4)
        return {"n_images": len(made.ids), "logits": size, "macs": made.macs.double().mean().item()}

    def batches(self, n_images: int | None = None) -> Iterable[Batch]:
        """The first n images (all by default), a forward pass at a time."""
        first = next(iter(image_sets.split_batch(self.images, n_images or len(self.images.ids))))
        return image_sets.split_batch(first, self.batch_size)

    def _run(self, configuration: Configuration) -> Outcome:
        return evaluate_configuration(self.model, configuration, self.batches())


def evaluate_configuration(model: nn.Module, configuration: Configuration, batches: Iterable[Batch]) -> Outcome:
    """What a model does under a configuration; the server works on values of the precision that was sent.

    At 16 bits and more it works on the device's own: rounding changes the scores by less than one in a thousand.
    """
    precision = configuration.precision
    merged = patch(model, configuration.policy, precision=precision, split_layer=configuration.split_layer)
    if precision not in ("int8", "int4"):
        return outcomes.evaluate(merged, batches)
    return outcomes.evaluate(
        merged, batches, through=lambda sent: sent.with_x(wire.quantise(sent.x, precision).to(sent.x.dtype))
    )


def compare_outcomes(merged: Outcome, unmerged: Outcome) -> dict[str, float]:
    """Means and standard errors of a merged model's outcome against the unmerged model's, image by image."""
    columns = merged.compare(unmerged) | {
        "macs_ratio": merged.macs / unmerged.macs.double(),
        "tokens_ratio": merged.tokens[:, -1] / unmerged.tokens[:, -1].double(),
        "bytes_ratio": merged.payload_bytes / unmerged.payload_bytes.double(),
    }
    measured = {"n_images": float(len(merged.ids))}
    for name, values in columns.items():
        measured |= {name: values.mean().item(), f"{name}_sem": (values.std() / len(values) ** 0.5).item()}
    for name in ("kl", "margin_kl"):
        measured |= root_of(name, measured[name], measured[f"{name}_sem"])
    return measured


def root_of(name: str, kl: float, sem: float) -> dict[str, float]:
    """The root of a mean divergence and its standard error, from those of the divergence.

    >>> root_of("kl", 0.25, 0.125), root_of("kl", 0.0, 0.25)
    ({'root_kl': 0.5, 'root_kl_sem': 0.125}, {'root_kl': 0.0, 'root_kl_sem': 0.5})
    """
    # Rounding can leave the divergence of nearly equal distributions a hair below zero.
    root = max(kl, 0.0) ** 0.5
    # To first order; near zero, where that breaks down, the root of the mean's own error.
    return {f"root_{name}": root, f"root_{name}_sem": min(sem / (2 * root), sem**0.5) if root else sem**0.5}


def load_objective(
    inputs_dir: str, n_images: int, batch_size: int = 32, skip: int = 0, split: str = "search", dtype: str = "float32"
) -> Objective:  # fmt: skip
    """The objective on images of a split, as `Inputs.images` gives them; for workers, of plain values.

    Args:
        dtype: of torch, what model and images are cast to: bfloat16 takes half the time where a CPU multiplies it.
    """
    inputs, kind = open_inputs(inputs_dir), getattr(torch, dtype)
    batch = inputs.batch(split, n_images, skip)
    return Objective(inputs.model.to(kind), batch._replace(images=batch.images.to(kind)), batch_size)


@dataclass(frozen=True)
class ImageEvaluation:
    """Evaluates shards of one set of images with one timm VisionTransformer, so many images per forward pass."""

    model: nn.Module
    images: ImageSet
    batch_size: int = 32

    def __call__(self, shard: Shard) -> pd.DataFrame:
        """One row per image: `Outcome.frame`'s, tokens_sent, and tokens entering each block and after the last."""
        part = image_sets.subset(self.images, range(shard.start, shard.stop))
        batches = image_sets.batches(part, zoo.transform(self.model), self.batch_size)
        outcome = evaluate_configuration(self.model, shard.configuration, batches)
        return outcome.frame().rename(columns={"tokens": "tokens_sent"}).assign(tokens=outcome.tokens.tolist())


def load_image_evaluation(
    inputs_dir: str, batch_size: int = 32, n_images: int | None = None, split: str = "test", skip: int = 0
) -> ImageEvaluation:
    """The evaluation of a split, as `inputs.Inputs.images` gives it; for workers, of plain values."""
    inputs = open_inputs(inputs_dir)
    return ImageEvaluation(inputs.model, inputs.images(split, n_images, skip), batch_size)
