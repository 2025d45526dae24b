"""A threshold that knows how sure the model already is: images it has recognised early merge harder.

How much merging harms an image has little to do with how alike its tokens are, and nearly all with how close it is to
another class: on most images no amount of merging changes the answer. The class token tells the two apart after the
first block. `fit` learns to read it from calibration images in closed form, without labels: the model's own
predictions are the classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import ClassVar

import numpy as np
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor, nn

from tokmerge import evaluate
from tokmerge.data import Batch
from tokmerge.merge import Context, Merges, match
from tokmerge.policies import at, bipartite_macs, check_length, per_layer
from tokmerge.vit import patch


@dataclass(frozen=True, eq=False)
class Guide:
    """What reads the class token at every block.

    Attributes:
        weights: (L, D, C) and
        biases: (L, C): class scores of the class token's value, linear discriminant analysis with a shrunk covariance
            (Ledoit and Wolf, 2004). All zero at the first block, which comes before the class token has seen anything.
        quantiles: (L, Q) doubt of the calibration images at evenly spaced probabilities.
    """

    weights: Tensor
    biases: Tensor
    quantiles: np.ndarray

    def doubt(self, values: Tensor, layer: int) -> Tensor:
        """Entropy of the class distribution seen in (B, D) class token values, from 0 (sure) to 1: (B,)."""
        scores = values.float() @ self.weights[layer].to(values.device) + self.biases[layer].to(values.device)
        log_p = scores.log_softmax(1)
        return -(log_p.exp() * log_p).sum(1) / np.log(scores.shape[1])

    def limits(self, share: float) -> tuple[float, ...]:
        """The doubt that a share of the calibration images stays below, one per block."""
        grid = np.linspace(0, 1, self.quantiles.shape[1])
        return tuple(float(np.interp(share, grid, row)) for row in self.quantiles)


@dataclass(frozen=True)
class GuidedThreshold:
    """Two thresholds per layer: one for images in which the class token leaves little doubt, one for the others.

    Args:
        sure: cosine threshold where the doubt is below the limit: one for every block, or one per block.
        unsure: where it is not, and at the first block, which comes before the class token has seen anything.
        limits: of the doubt, one for every block, or one per block.
        guide: what reads the class token (`fit`).
    """

    feature: ClassVar[str] = "tokens"
    sure: float | Sequence[float]
    unsure: float | Sequence[float]
    limits: float | Sequence[float]
    guide: Guide = field(repr=False)

    def __post_init__(self) -> None:
        for name in ("sure", "unsure", "limits"):
            object.__setattr__(self, name, per_layer("GuidedThreshold", name, getattr(self, name), Real))

    def check(self, depth: int) -> None:
        for name in ("sure", "unsure", "limits"):
            check_length("GuidedThreshold", name, getattr(self, name), depth)
        if len(self.guide.weights) != depth:
            raise ValueError(f"GuidedThreshold: a guide of {len(self.guide.weights)} blocks for a model of {depth}")

    def active(self, layer: int) -> bool:
        return at(self.unsure, layer) < 1.0 or (layer > 0 and at(self.sure, layer) < 1.0)

    def select(self, context: Context) -> Merges:
        layer, matches = context.layer, match(context)
        unsure = at(self.unsure, layer)
        if layer == 0:
            return matches.merges(matches.similarity > unsure)
        sure = self.guide.doubt(class_values(context), layer) < at(self.limits, layer)
        thresholds = torch.where(sure, at(self.sure, layer), unsure)[:, None]
        # Cosines round up to a hair above 1: a threshold of 1 must let nothing merge.
        return matches.merges((matches.similarity > thresholds) & (thresholds < 1.0))

    def match_macs(self, n: Tensor, d: int) -> Tensor:
        return bipartite_macs(n, d) + self.guide.weights[0].numel()


def class_values(context: Context) -> Tensor:
    """(B, D) what the class token offers the others at this layer: its value, all heads.

    Raises:
        ValueError: the model has no class token.
    """
    if context.qkv is None or context.protected == 0:
        raise ValueError("GuidedThreshold reads the class token, and this model has none")
    return context.qkv[context.layout.offsets, 2].flatten(1)


@dataclass(frozen=True)
class _ClassTokens:
    """Merges nothing; keeps every class token's values at each layer."""

    feature: ClassVar[str] = "keys"
    seen: dict[int, list[Tensor]] = field(default_factory=dict)

    def check(self, depth: int) -> None:
        pass

    def active(self, layer: int) -> bool:
        return True

    def select(self, context: Context) -> Merges:
        self.seen.setdefault(context.layer, []).append(class_values(context).float().cpu())
        nothing = context.layout.lengths.new_empty(0)
        return Merges(nothing, nothing, torch.zeros_like(context.layout.lengths))

    def match_macs(self, n: Tensor, d: int) -> Tensor:
        return torch.zeros_like(n)


def fit(model: nn.Module, batches: Sequence[Batch], points: int = 101) -> Guide:
    """Learn to read the class token from calibration images, without their labels.

    Args:
        model: timm VisionTransformer with a class token.
        batches: calibration images.
        points: of the table of quantiles.

    Raises:
        ValueError: the model predicts fewer than two classes on these images.
    """
    watched = _ClassTokens()
    predicted = evaluate.run(patch(model, watched), batches).logits.argmax(1).numpy()
    if len(np.unique(predicted)) < 2:
        raise ValueError(f"the model sees one class in all {len(predicted)} calibration images: more are needed")
    weights, biases, quantiles = [], [], []
    for layer in sorted(watched.seen):
        values = torch.cat(watched.seen[layer])
        w, b = _discriminant(values.double().numpy(), predicted) if layer else (None, None)
        n_classes = len(np.unique(predicted))
        weights.append(torch.zeros(values.shape[1], n_classes) if w is None else w)
        biases.append(torch.zeros(n_classes) if b is None else b)
        doubt = Guide(weights[-1][None], biases[-1][None], np.empty(0)).doubt(values, 0)
        quantiles.append(np.quantile(doubt.double().numpy(), np.linspace(0, 1, points)))
    return Guide(torch.stack(weights), torch.stack(biases), np.stack(quantiles))


def _discriminant(values: np.ndarray, classes: np.ndarray) -> tuple[Tensor, Tensor]:
    """(D, C) weights and (C,) biases of the class scores."""
    analysis = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(values, classes)
    weights, biases = analysis.coef_, analysis.intercept_
    if len(biases) == 1:
        # Of two classes only the difference is kept.
        weights, biases = np.concatenate([-weights, weights]) / 2, np.concatenate([-biases, biases]) / 2
    return torch.tensor(weights.T, dtype=torch.float32), torch.tensor(biases, dtype=torch.float32)
