"""Merge maps: which patches of an image became one token."""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def merge_map(source: np.ndarray, protected: int) -> np.ndarray:
    """Group number of each patch on its grid, from one image's source map.

    Args:
        source: (N,) which token each original token is part of; protected tokens first.
        protected: how many they are.

    Returns:
        (rows, columns) int, -1 for dropped patches; patches must form a square.
    """
    patches = source[protected:]
    side = int(len(patches) ** 0.5)
    if side * side != len(patches):
        raise ValueError(f"{len(patches)} patches do not form a square grid")
    return patches.reshape(side, side)


def draw_merge_map(ax: Axes, image: np.ndarray, groups: np.ndarray) -> None:
    """An image, the borders between merged groups, and a tint on every group of several patches.

    The image is (H, W), (H, W, 1) or (H, W, 3) in [0, 1]; groups (rows, columns) are those of `merge_map`.
    """
    rows, columns = groups.shape
    ax.imshow(image, extent=(0, columns, rows, 0), vmin=0, vmax=1, interpolation="nearest")
    ax.imshow(tints(groups), extent=(0, columns, rows, 0), interpolation="nearest")
    vertical = np.argwhere(groups[:, 1:] != groups[:, :-1])
    horizontal = np.argwhere(groups[1:] != groups[:-1])
    ax.vlines(vertical[:, 1] + 1, vertical[:, 0], vertical[:, 0] + 1, color="white", lw=0.6, rasterized=True)
    ax.hlines(horizontal[:, 0] + 1, horizontal[:, 1], horizontal[:, 1] + 1, color="white", lw=0.6, rasterized=True)
    ax.set(xticks=[], yticks=[], xlim=(0, columns), ylim=(rows, 0))
    ax.grid(False)


def draw_saved_map(ax: Axes, row: Any, protected: int) -> None:
    """`draw_merge_map` of a row of a saved table: pixels (uint8, flat), height, width, source."""
    image = np.array(row.pixels).reshape(row.height, row.width, -1) / 255
    draw_merge_map(ax, image, merge_map(np.array(row.source), protected))


def map_grid(n_images: int, headings: Sequence[str], width: float = 1.7) -> tuple[Figure, np.ndarray]:
    """Axes for merge maps, (n_images, headings): an image to a row, a bold heading above columns of so many inches."""
    size = (width * len(headings), (width + 0.2) * n_images)
    fig, axes = plt.subplots(n_images, len(headings), figsize=size, squeeze=False)
    for ax, heading in zip(axes[0], headings, strict=True):
        ax.text(0.5, 1.25, heading, transform=ax.transAxes, ha="center", fontweight="bold", fontsize=9)
    return fig, axes


def depth_heading(blocks: int) -> str:
    """Above the maps of so many blocks."""
    return "input" if blocks == 0 else f"after block {blocks}"


def draw_depths(maps: pd.DataFrame, title: str = "") -> Figure:
    """Images merged deeper and deeper: columns id, class, blocks, tokens, protected and those of `draw_saved_map`."""
    ids, depths = list(dict.fromkeys(maps.id)), sorted(maps.blocks.unique())
    fig, axes = map_grid(len(ids), [depth_heading(blocks) for blocks in depths])
    for row in maps.itertuples():
        ax = axes[ids.index(row.id), depths.index(row.blocks)]
        draw_saved_map(ax, row, int(row.protected))
        ax.set_title(f"{row.tokens} tokens", fontsize=9)
    for ax, label in zip(axes[:, 0], maps.groupby("id", sort=False)["class"].first(), strict=True):
        ax.set_ylabel(label, fontsize=9)
    fig.suptitle(title, fontsize=10, y=0.97)
    return fig


def draw_ends(maps: pd.DataFrame, n_images: int, title: str = "") -> Figure:
    """Four images at either end of so many: columns class, end, tokens, protected and those of `draw_saved_map`."""
    fig, axes = plt.subplots(2, 4, figsize=(8.4, 4.8))
    for ax, row, label in zip(axes.flat, maps.itertuples(), maps["class"], strict=True):
        draw_saved_map(ax, row, int(row.protected))
        ax.set_title(f"{label}, {row.tokens} tokens", fontsize=7.5)
    for ax, end in zip(axes[:, 0], maps.end.unique(), strict=True):
        ax.set_ylabel(f"{end} of {n_images:,}", fontsize=8)
    means = [f"{part.tokens.mean():.0f} tokens in the images of {end}" for end, part in maps.groupby("end", sort=False)]
    fig.suptitle(f"{title}: {', '.join(means)}", fontsize=10)
    return fig


def tints(groups: np.ndarray) -> np.ndarray:
    """A colour on every group of several patches: (rows, columns) groups -> (rows, columns, 4) in [0, 1]."""
    tint = np.zeros((*groups.shape, 4))
    # Groups are numbered in reading order; a large odd stride gives neighbours different hues.
    hues = colormaps["hsv"](np.arange(groups.max() + 1) * 0.381966 % 1.0)
    for group, size in zip(*(part.tolist() for part in np.unique(groups, return_counts=True)), strict=True):
        if size > 1:
            tint[groups == group] = (*hues[group][:3], 0.42)
    return tint


def paint_merge_map(image: np.ndarray, groups: np.ndarray, cell: int = 16) -> np.ndarray:
    """What `draw_merge_map` draws, as (rows * cell, columns * cell, 3) uint8, a patch being ``cell`` pixels wide.

    For pictures that must follow a hand, figures take too long.
    """
    rows, columns = groups.shape
    y, x = (np.arange(n * cell) * size // (n * cell) for n, size in zip((rows, columns), image.shape, strict=False))
    picture = np.broadcast_to(image.reshape(*image.shape[:2], -1)[y[:, None], x], (len(y), len(x), 3))
    block = np.ones((cell, cell), int)
    tint = np.kron(tints(groups), block[..., None])
    picture = picture * (1 - tint[..., 3:]) + tint[..., :3] * tint[..., 3:]
    large = np.kron(groups, block)
    picture[:, 1:][large[:, 1:] != large[:, :-1]] = 1
    picture[1:][large[1:] != large[:-1]] = 1
    return (picture * 255).round().astype(np.uint8)
