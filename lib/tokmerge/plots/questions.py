"""Figures of visual question answering."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from tokmerge.plots.merge_maps import draw_saved_map
from tokmerge.plots.style import legend_outside, shades

# Methods with a threshold for every layer; "one threshold" for all of them is a peer.
QUESTION_OURS = ("threshold", "local threshold")
QUESTION_GROUPS = {
    "ours": QUESTION_OURS,
    "published": ("ToMe", "ToMe constant", "PiToMe", "DyMU", "PruMerge", "PruMerge+", "VisionZip", "FastV"),
    "simple": ("ToMe on tokens", "one threshold", "window pooling", "attention pruning", "attention, last layer",
              "random pruning"),
}  # fmt: skip


def draw_answered(axes: Sequence[Axes], maps: pd.DataFrame) -> None:
    """One image's merge map at several points, with what was answered there; wrong answers in red.

    Columns method, tokens, macs_ratio, questions, answers, truth and those of `draw_saved_map`; a row per point.
    """
    for column, (ax, row) in enumerate(zip(axes, maps.itertuples(), strict=True)):
        draw_saved_map(ax, row, protected=0)
        ax.set_title(f"{row.method}\n{row.tokens} tokens, MACs {row.macs_ratio:.2f}", fontsize=9)
        for line, (question, said, true) in enumerate(zip(row.questions[:6], row.answers, row.truth, strict=False)):
            place: dict[str, Any] = {"transform": ax.transAxes, "fontsize": 7, "va": "top"}
            if column == 0:
                ax.text(-0.05, -0.06 - 0.085 * line, question, ha="right", **place)
            ax.text(0.5, -0.06 - 0.085 * line, said, ha="center", color="0.1" if said == true else "#D50000", **place)


def draw_per_photo(axes: Sequence[Axes], table: pd.DataFrame) -> None:
    """Visual tokens and MACs against the photos in a scene, a line per point: columns photos, tokens, macs, method."""
    colors = shades(table.method)
    for ax, (values, label) in zip(
        axes, ((table.tokens, "visual tokens read"), (table.macs / 1e6, "M multiply-accumulates")), strict=True
    ):
        for method, points in table.assign(value=values).groupby("method", sort=False):
            first, marker = ("-", "o") if method in QUESTION_OURS else ("--", "s")
            for index, (_, part) in enumerate(points.groupby("point", sort=False)):
                ax.plot(
                    part.photos, part.value, ":" if index else first, marker=marker, ms=3, lw=1.2,
                    color=colors[method], label=f"{method}, {part.tokens.mean():.0f} tokens",
                )  # fmt: skip
        ax.set(xlabel="photos in the scene", ylabel=label, xticks=sorted(set(table.photos)))
        ax.set_ylim(0, None)
    legend_outside(axes[-1], beside=True)
