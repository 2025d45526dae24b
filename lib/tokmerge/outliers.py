"""Attention pruning at the end of a vision tower, with a number of tokens that follows each image.

PruMerge's idea (Shang et al., 2403.15388; VisionZip, 2412.04467, fixes the number), written anew on this engine: the
class token attends strongly to few tokens. Those whose attention is an outlier stay, every other token goes into the
one most like it, by its key. It works in the last layer that is run, before that layer's MLP.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokmerge.merge import Context, Merges


@dataclass(frozen=True)
class OutlierMerging:
    """Keep tokens whose class attention is above Q3 + spread (Q3 - Q1) of their image; the most attended one always.

    Every other token merges into the kept one with the most similar key, averaged by class attention.

    Args:
        layer: where it works: the tower's last layer that is run.
        spread: how far out an outlier is; 1.5 is the usual rule, less keeps more.
    """

    feature: ClassVar[str] = "keys"
    layer: int
    spread: float = 1.5

    def check(self, depth: int) -> None:
        if self.layer != depth - 1:
            raise ValueError(f"OutlierMerging: layer is {self.layer}, the last of {depth} layers is {depth - 1}")

    def active(self, layer: int) -> bool:
        return layer == self.layer

    def select(self, context: Context) -> Merges:
        layout, first = context.layout, context.protected
        valid = layout.valid[:, first:]
        attention = context.class_attention
        padded = layout.pad(attention)[:, first:].masked_fill(~valid, float("nan"))
        q1, q3 = padded.nanquantile(torch.tensor([0.25, 0.75], device=padded.device, dtype=padded.dtype), 1)
        # At most the largest value, so that one always stays.
        bar = (q3 + self.spread * (q3 - q1)).minimum(padded.nan_to_num(-1.0).amax(1))
        stay = padded >= bar[:, None]
        metric = context.padded_metric[:, first:]
        scores = (metric @ metric.transpose(1, 2)).masked_fill(~stay[:, None, :], float("-inf"))
        rows = layout.offsets[:, None] + first + torch.arange(valid.shape[1], device=valid.device)
        go = valid & ~stay
        dst = rows.gather(1, scores.argmax(2))
        return Merges(rows[go], dst[go], go.sum(1), weights=attention.clamp_min(1e-12))

    def match_macs(self, n: Tensor, d: int) -> Tensor:
        # Which stay is known only afterwards: as if each were compared with every other.
        return n * n * d
