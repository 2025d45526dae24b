"""How figures look: one palette, one size grid, the same bytes at every run."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import offset_copy

from tokmerge.io import store

# Okabe and Ito's colour-blind-safe palette; one colour per method, everywhere.
COLORS = {
    "threshold": "#0072B2",
    "fixed r": "#E69F00",
    "unmerged": "#333333",
    "accent": "#D55E00",
    "search": "#009E73",
    "ax": "#009E73",
    "three knots": "#56B4E9",
    "per block": "#332288",
    "keys": "#117733",
    "kl": "#882255",
    "margin": "#F0E442",
    "disagreement": "#999999",
    "top-1": "#44AA99",
    "sobol": "#CC79A7",
    "nsga2": "#D55E00",
    "one threshold": "#0072B2",
}
AXIS_LABELS = {
    "kl": "KL(unmerged || merged)",
    "root_kl": "root of KL(unmerged || merged)",
    "loss_rise": "rise of the log-loss",
    "score_drop": "drop of top-1",
    "macs_ratio": "MACs, merged / unmerged",
    "tokens_ratio": "tokens left, merged / unmerged",
    "bytes_ratio": "payload bytes, merged / unmerged",
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


def shades(names: Iterable[Any]) -> dict[Any, np.ndarray]:
    """A colour for each of many names, in the order in which they first appear."""
    once = list(dict.fromkeys(names))
    return dict(zip(once, colormaps["tab20"](np.arange(len(once)) % 20), strict=True))


def legend_outside(ax: Axes, beside: bool = False, columns: int = 1) -> None:
    """A legend where no data can lie under it: below the label of the x axis, or to the right."""
    below = offset_copy(ax.transAxes, ax.get_figure(root=True), y=-32, units="points")
    place: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "bbox_transform": below}
    if beside:
        place = {"loc": "upper left", "bbox_to_anchor": (1, 1)}
    ax.legend(fontsize=7.5, ncols=columns, **place)


def shared_legend(axes: Iterable[Axes], columns: int) -> None:
    """One legend below a figure, for all that its axes show."""
    axes = list(axes)
    found = [ax.get_legend_handles_labels() for ax in axes]
    once = {label: handle for handles, labels in found for handle, label in zip(handles, labels, strict=True)}
    axes[0].figure.legend(once.values(), once, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=columns, fontsize=8.5)


def save_figure(figure: Figure, path: Path, data: str) -> None:
    """Write ``path`` as both SVG and PNG, without dates, so that equal figures are equal files.

    Raises:
        ValueError: no text says what ``data`` it shows, or a legend lies on axes.
    """
    if not any(data in text.get_text() for text in figure.findobj(Text)):
        raise ValueError(f"figure {path.name} does not say that it shows {data}")
    figure.draw_without_rendering()
    legends = [ax.get_legend() for ax in figure.axes]
    boxes = [legend.get_window_extent() for legend in [*legends, *figure.legends] if legend is not None]
    if any(box.overlaps(ax.bbox) for box in boxes for ax in figure.axes):
        raise ValueError(f"figure {path.name} has a legend on its axes, where data may be")
    for suffix, metadata in ((".svg", {"Date": None}), (".png", {"Software": None})):
        with store.writing(path.with_suffix(suffix)) as temporary:
            figure.savefig(temporary, metadata=metadata)
