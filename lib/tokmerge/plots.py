"""How figures look: one palette, one size grid, the same bytes at every run."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
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


def draw_similarity(ax: Axes, similarity: pd.DataFrame) -> None:
    """Draw the distribution of best-match similarity over the layers.

    Args:
        ax: where to draw.
        similarity: columns layer, quantile (0.05, 0.25, 0.5, 0.75, 0.95), similarity.
    """
    wide = similarity.pivot(index="layer", columns="quantile", values="similarity")
    for low, high, alpha in ((0.05, 0.95, 0.15), (0.25, 0.75, 0.3)):
        label = f"{low:.0%} to {high:.0%}"
        ax.fill_between(wide.index, wide[low], wide[high], color=COLORS["threshold"], alpha=alpha, lw=0, label=label)
    ax.plot(wide.index, wide[0.5], "o-", color=COLORS["threshold"], ms=3.5, label="median")
    ax.set(xlabel="layer", ylabel="cosine with best match", xticks=wide.index)
    ax.legend(loc="lower right", ncols=3)


def draw_sweep(ax: Axes, sweep: pd.DataFrame, column: str) -> None:
    """Draw top-1 with its 95 % interval against one of the ratios, a line per method.

    Args:
        ax: where to draw.
        sweep: columns method, top1, top1_low, top1_high and the ratio; one row of method "unmerged".
        column: macs_ratio, tokens_ratio or bytes_ratio.
    """
    quantity = {"macs_ratio": "MACs", "tokens_ratio": "tokens left", "bytes_ratio": "payload bytes"}[column]
    labels = {"threshold": "one threshold (per image)", "fixed r": "fixed r (ToMe)"}
    for method, part in sweep[sweep.method != "unmerged"].groupby("method", sort=False):
        error = 100 * np.array([part.top1 - part.top1_low, part.top1_high - part.top1])
        ax.errorbar(
            part[column], 100 * part.top1, error, fmt="o-", ms=4, lw=1.3, elinewidth=0.7, capsize=2,
            color=COLORS[str(method)], label=labels[str(method)],
        )  # fmt: skip
    top1 = sweep[sweep.method == "unmerged"].top1.item()
    ax.axhline(100 * top1, color=COLORS["unmerged"], lw=0.9, ls="--", label="unmerged")
    ax.set(xlabel=f"{quantity}, merged / unmerged", xlim=(0, 1.02))
