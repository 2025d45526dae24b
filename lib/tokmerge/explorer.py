"""Sliders over the thresholds, and the merge map that follows them: for the tour, in JupyterLab."""

import io
from collections.abc import Sequence
from typing import Any

import ipywidgets as widgets
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from tokmerge import plots, vit
from tokmerge.spaces import Configuration, Space


def show(
    model: nn.Module,
    images: Tensor,
    pixels: Sequence[np.ndarray],
    configuration: Configuration,
    unmerged: vit.Record,
    cell: int = 14,
) -> tuple[bytes, str]:
    """The merge maps of some images side by side, and a line about them.

    Args:
        model: timm VisionTransformer whose patches form a square.
        images: (B, C, H, W), what the model is shown.
        pixels: the same B images as (H, W) or (H, W, C) in [0, 1].
        configuration: how tokens merge.
        unmerged: record of the same images without merging.
        cell: pixels along the side of a patch.

    Returns:
        PNG file, and text: tokens of each image, and the means of their MACs and bytes against the unmerged model.
    """
    with torch.inference_mode():
        _, record = vit.patch(model, configuration.policy, precision=configuration.precision)(images, source=True)
    sources = record.source
    assert sources is not None, "asked for above"
    maps = [plots.merge_map(source.numpy(), model.num_prefix_tokens) for source in sources]  # type: ignore[arg-type]
    pictures = [plots.paint_merge_map(image, groups, cell) for image, groups in zip(pixels, maps, strict=True)]
    gap = np.full((len(pictures[0]), cell, 3), 255, np.uint8)
    strip = [part for picture in pictures for part in (picture, gap)][:-1]
    file = io.BytesIO()
    Image.fromarray(np.concatenate(strip, axis=1)).save(file, "png", compress_level=1)
    left = ", ".join(str(int(n)) for n in record.tokens[:, -1])
    macs, sent = (record.macs / unmerged.macs).mean(), (record.payload_bytes / unmerged.payload_bytes).mean()
    line = f"{left} of {int(record.tokens[0, 0])} tokens left: {macs:.0%} of the MACs, {sent:.0%} of the bytes"
    return file.getvalue(), line


def build(
    model: nn.Module, images: Tensor, pixels: Sequence[np.ndarray], space: Space, start: Sequence[float]
) -> widgets.VBox:
    """Sliders for the parameters of a search space over the merge maps of some images.

    Args:
        model: as in `show`.
        images: as in `show`.
        pixels: as in `show`.
        space: whose parameters are moved, such as `tokmerge.spaces.threshold_space` gives with a few knots.
        start: first value of each.

    Raises:
        ValueError: not one start value per parameter.
    """
    if len(start) != len(space.bounds):
        raise ValueError(f"{len(start)} start values for {len(space.bounds)} parameters: give one per parameter")
    places = np.linspace(1, space.depth, len(space.bounds)).round().astype(int)
    sliders = {
        name: widgets.FloatSlider(
            value,
            min=low,
            max=high,
            step=0.01,
            description=f"block {place}",
            layout=widgets.Layout(width="min(30rem, 95%)"),
        )
        for (name, (low, high)), value, place in zip(space.bounds.items(), start, places, strict=True)
    }
    picture, line = widgets.Image(format="png", layout=widgets.Layout(max_width="100%")), widgets.Label()

    with torch.inference_mode():
        unmerged = vit.patch(model, None)(images)[1]

    def follow(change: Any = None) -> None:
        configuration = space.configuration({name: slider.value for name, slider in sliders.items()})
        picture.value, line.value = show(model, images, pixels, configuration, unmerged)

    for slider in sliders.values():
        slider.observe(follow, "value")
    follow()
    return widgets.VBox([*sliders.values(), line, picture])
