"""Figures of visual question answering; styles and colours are those of `tokmerge.plots`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes

from tokmerge.plots import COLORS, LABELS, draw_merge_map

# Methods with a threshold for every layer; "one threshold" for all of them is a peer.
OURS = ("threshold", "local threshold")


def draw_answering(axes: Sequence[Axes], points: pd.DataFrame, limit: float) -> None:
    """Draw the loss of accuracy against MACs and against bytes, a colour per method; ours with a black edge.

    Args:
        axes: two, sharing their y.
        points: columns method, precision, drop, drop_ci95, macs_ratio, bytes_ratio; of one set.
        limit: loss in points that a line marks.
    """
    methods = list(dict.fromkeys(points.method))
    shades = colormaps["tab20"](np.arange(len(methods)) % 20)
    for ax, cost in zip(axes, ("macs_ratio", "bytes_ratio"), strict=True):
        for method, shade in zip(methods, shades, strict=True):
            part, ours = points[points.method == method], method in OURS
            for few, rows in part.groupby(part.precision.isin(["int8", "int4"])):
                ax.errorbar(
                    rows[cost], 100 * rows["drop"], 100 * rows.drop_ci95, label=None if few else method, color=shade,
                    fmt="v" if few else "o", elinewidth=0.6, ms=6 if ours else 4.5, mec="black" if ours else "none",
                    mew=0.7, zorder=3 if ours else 2,
                )  # fmt: skip
        ax.axhline(limit, color=COLORS["unmerged"], lw=0.8, ls="--")
        ax.set_xlabel(LABELS[cost])
    axes[0].set_xlim(0, 1.05)
    axes[1].set_xscale("log")
    axes[0].set_ylabel("loss of accuracy (points)")
    axes[1].legend(fontsize=7, title="triangles: int8, int4", title_fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))


def draw_answered(axes: Sequence[Axes], maps: pd.DataFrame) -> None:
    """Draw one image's merge map at several points, with what was answered; wrong answers in red.

    Args:
        axes: one per point.
        maps: columns pixels, height, width, source, tokens, macs_ratio, questions, answers, truth; of one image.
    """
    for column, (ax, row) in enumerate(zip(axes, maps.itertuples(), strict=True)):
        side = int(len(row.source) ** 0.5)
        image = np.array(row.pixels).reshape(row.height, row.width, -1) / 255
        draw_merge_map(ax, image, np.array(row.source).reshape(side, side))
        ax.set_title(f"{row.tokens} tokens, MACs {row.macs_ratio:.2f}", fontsize=9)
        for line, (question, said, true) in enumerate(zip(row.questions[:6], row.answers, row.truth, strict=False)):
            place: dict[str, Any] = {"transform": ax.transAxes, "fontsize": 7, "va": "top"}
            if column == 0:
                ax.text(-0.05, -0.06 - 0.085 * line, question, ha="right", **place)
            ax.text(0.5, -0.06 - 0.085 * line, said, ha="center", color="0.1" if said == true else "#D50000", **place)


def draw_per_photo(axes: Sequence[Axes], table: pd.DataFrame) -> None:
    """Draw the visual tokens read and the multiply-accumulates against the photos in the scene, a line per point.

    Args:
        axes: two.
        table: columns photos, tokens, macs, method, point.
    """
    methods = list(dict.fromkeys(table.method))
    shades = colormaps["tab20"](np.arange(len(methods)) % 20)
    for ax, (values, label) in zip(
        axes, ((table.tokens, "visual tokens read"), (table.macs / 1e6, "M multiply-accumulates")), strict=True
    ):
        for point, part in table.assign(value=values).groupby("point", sort=False):
            method = part.method.iloc[0]
            first = point == table[table.method == method].point.iloc[0]
            ours = method in OURS
            ax.plot(
                part.photos, part.value, "o-" if ours else "s--", ms=3, lw=1.4 if ours else 0.8,
                color=shades[methods.index(method)], label=method if first else None,
            )  # fmt: skip
        ax.set(xlabel="photos in the scene", ylabel=label, xticks=sorted(set(table.photos)))
        ax.set_ylim(0, None)
    axes[-1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
