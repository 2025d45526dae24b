"""How figures look: one palette, one size grid, the same bytes at every run."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tokmerge import store

# Okabe and Ito's colour-blind-safe palette; one colour per method, everywhere.
COLORS = {
    "threshold": "#0072B2",
    "fixed r": "#E69F00",
    "unmerged": "#333333",
    "accent": "#D55E00",
}


def style() -> None:
    """Set matplotlib's defaults for the project; makes SVG output repeatable."""
    plt.rcParams.update(
        {
            "figure.dpi": 110,
            "savefig.dpi": 160,
            "savefig.bbox": "tight",
            "font.size": 9.5,
            "axes.titlesize": 10.5,
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": "0.92",
            "axes.axisbelow": True,
            "legend.frameon": False,
            "svg.hashsalt": "tokmerge",
            "image.cmap": "gray",
        }
    )


def save(figure: Figure, path: Path) -> None:
    """Write ``path`` as both SVG and PNG, without dates, so that equal figures are equal files."""
    for suffix, metadata in ((".svg", {"Date": None}), (".png", {"Software": None})):
        with store.writing(path.with_suffix(suffix)) as temporary:
            figure.savefig(temporary, metadata=metadata)


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


def draw_merge_map(ax: Axes, image: np.ndarray, groups: np.ndarray, sizes: dict[int, int] | None = None) -> None:
    """Draw an image, the borders between merged groups, and a tint on every group of several patches.

    Args:
        ax: where to draw.
        image: (H, W), (H, W, 1) or (H, W, 3) in [0, 1].
        groups: (rows, columns) group of each patch, such as `merge_map` gives.
        sizes: patches per group; counted from ``groups`` by default.
    """
    rows, columns = groups.shape
    if sizes is None:
        sizes = dict(zip(*(part.tolist() for part in np.unique(groups, return_counts=True)), strict=True))
    ax.imshow(image, extent=(0, columns, rows, 0), vmin=0, vmax=1, interpolation="nearest")
    tint = np.zeros((rows, columns, 4))
    # Groups are numbered in reading order; a large odd stride gives neighbours different hues.
    hues = colormaps["hsv"](np.arange(groups.max() + 1) * 0.381966 % 1.0)
    for group, size in sizes.items():
        if size > 1:
            tint[groups == group] = (*hues[group][:3], 0.42)
    ax.imshow(tint, extent=(0, columns, rows, 0), interpolation="nearest")
    vertical = np.argwhere(groups[:, 1:] != groups[:, :-1])
    horizontal = np.argwhere(groups[1:] != groups[:-1])
    ax.vlines(vertical[:, 1] + 1, vertical[:, 0], vertical[:, 0] + 1, color="white", lw=0.6)
    ax.hlines(horizontal[:, 0] + 1, horizontal[:, 1], horizontal[:, 1] + 1, color="white", lw=0.6)
    ax.set(xticks=[], yticks=[], xlim=(0, columns), ylim=(rows, 0))
    ax.grid(False)
