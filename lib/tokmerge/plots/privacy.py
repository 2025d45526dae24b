"""Figures of what leaks, from the saved tables of the privacy notebooks."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tokmerge.plots.style import COLORS, legend_outside, shades

LEAKAGE_LABELS = {
    "ssim": "SSIM of the reconstruction",
    "psnr": "PSNR of the reconstruction (dB)",
    "haarpsi": "HaarPSI of the reconstruction",
    "fsim": "FSIM of the reconstruction",
    "distance": "distance in the ViT's features",
    "relative": "task accuracy on reconstructions / clean",
    "identified": "original found among its class",
    "bytes": "payload bytes per image",
    "server_hit": "the server's top-1",
}
# One marker per family of defences; the name decides, so that a table needs no further column.
DEFENCE_STYLES = (
    ("merged, ", "^", COLORS["threshold"]),
    ("merged", "o", COLORS["threshold"]),
    ("same counts", "s", COLORS["fixed r"]),
    ("pruned", "v", COLORS["accent"]),
    ("class token", "D", COLORS["search"]),
    ("cut off", "x", "0.5"),
    ("unmerged", "*", COLORS["unmerged"]),
)


def defence_style(defence: str) -> tuple[str, str]:
    """Marker and colour of a defence.

    >>> defence_style("merged, int4")[0], defence_style("merged 2")[0]
    ('^', 'o')

    Raises:
        ValueError: a name of no family.
    """
    for start, marker, color in DEFENCE_STYLES:
        if defence.startswith(start):
            return marker, color
    raise ValueError(f"{defence!r} is of no known family of defences")


def draw_reconstructions(rebuilt: pd.DataFrame, defences: Sequence[str], notes: dict[str, str] | None = None) -> Figure:
    """What was rebuilt: a row per defence, from top to bottom, with a note below its name; a column per image.

    Columns defence, image, shape (C, H, W) and pixels (uint8).
    """
    images = sorted(rebuilt.image.unique())
    inches = max(0.8, rebuilt["shape"].str[-1].max() / 80)
    size = (inches * len(images) + 1.6, inches * len(defences))
    fig, axes = plt.subplots(len(defences), len(images), figsize=size, squeeze=False)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.grid(False)
        ax.spines[:].set_visible(False)
    for row, defence in enumerate(defences):
        part = rebuilt[rebuilt.defence == defence]
        for entry in part.itertuples():
            channels, height, width = entry.shape
            picture = np.asarray(entry.pixels, np.uint8).reshape(channels, height, width).transpose(1, 2, 0)
            picture = picture.repeat(3, axis=2) if channels == 1 else picture
            axes[row, images.index(entry.image)].imshow(picture, interpolation="nearest")
        note = (notes or {}).get(defence)
        label = f"{defence}\n{note}" if note else defence
        axes[row, 0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    fig.subplots_adjust(wspace=0.05, hspace=0.05)
    return fig


def draw_leakage(ax: Axes, table: pd.DataFrame, x: str, y: str) -> None:
    """One metric against another, with 95 % intervals; numbers tell defences apart, the legend names them.

    Columns defence, metric, value, low, high; one row per defence and metric.
    """
    wide = table.pivot(index="defence", columns="metric", values=["value", "low", "high"])
    for number, (defence, row) in enumerate(wide.iterrows(), start=1):
        marker, color = defence_style(str(defence))
        (across, up), low, high = ((row[part, x], row[part, y]) for part in ("value", "low", "high"))
        ax.errorbar(
            across, up, [[up - low[1]], [high[1] - up]], [[across - low[0]], [high[0] - across]],
            fmt=marker, color=color, ms=6, elinewidth=0.7, markerfacecolor="none", label=f"{number}  {defence}",
            zorder=4 if defence == "merged" else 3,
        )  # fmt: skip
        # Neighbours in the list are often neighbours in the picture.
        where = ((6, 4), (-6, -10), (6, -10), (-6, 4))[number % 4]
        ax.annotate(str(number), (across, up), where, textcoords="offset points", fontsize=7, ha="center", color=color)
    ax.set(xlabel=LEAKAGE_LABELS[x], ylabel=LEAKAGE_LABELS[y])
    if x == "bytes":
        ax.set_xscale("log")


def draw_worst(ax: Axes, table: pd.DataFrame, metric: str, defences: Sequence[str]) -> None:
    """A metric over all images and over the 5 % that are rebuilt best, a pair of bars per defence, from left to right.

    Columns defence, metric, images ("all" or "worst"), value, low, high.
    """
    places = np.arange(len(defences))
    for offset, which, color in ((-0.2, "all", COLORS["threshold"]), (0.2, "worst", COLORS["accent"])):
        part = table[(table.metric == metric) & (table.images == which)].set_index("defence").loc[list(defences)]
        error = np.array([part.value - part.low, part.high - part.value])
        label = "all images" if which == "all" else "the 5 % rebuilt best"
        ax.bar(places + offset, part.value, 0.38, yerr=error, color=color, label=label, error_kw={"elinewidth": 0.7})
    ax.set_xticks(places, list(defences), rotation=35, ha="right", fontsize=8)
    ax.set_ylabel(LEAKAGE_LABELS[metric])
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=7.5)


def draw_convergence(ax: Axes, curves: pd.DataFrame) -> None:
    """The attackers' loss on held-out images, a line each: columns attacker, defence, step, loss."""
    styles = {"map": "-", "grid": "--", "sequence": ":"}
    trained = curves[curves.attacker.isin(styles)]
    colors = shades(trained.defence)
    for (attacker, defence), part in trained.groupby(["attacker", "defence"], sort=False):
        label = defence if attacker == "map" else None
        ax.plot(part.step, part.loss, styles[str(attacker)], color=colors[defence], lw=1.2, label=label)
    ax.set(xlabel="training steps", ylabel="loss on held-out images", yscale="log")
    legend_outside(ax, beside=True)
