"""Figures of the search: fronts, profiles over the depth, hypervolume against evaluations."""

from collections.abc import Sequence
from itertools import cycle

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes

from tokmerge.plots.style import AXIS_LABELS, COLORS, legend_outside, shared_legend


def draw_front(
    axes: Sequence[Axes], trials: pd.DataFrame, front: pd.DataFrame, grids: pd.DataFrame, axis: str, worst: float,
    where: str = "trials",
) -> None:  # fmt: skip
    """A front in its three pairwise projections, with all completed trials and with the grid baselines.

    Columns macs_ratio, bytes_ratio and the accuracy axis, which is drawn up to its ``worst`` value; grids also have
    method ("one threshold" or "fixed r").
    """
    projections = (("macs_ratio", axis), ("bytes_ratio", axis), ("macs_ratio", "bytes_ratio"))
    names = {"one threshold": "one threshold", "fixed r": "fixed r (ToMe)"}
    for ax, (x, y) in zip(axes, projections, strict=True):
        ax.scatter(trials[x], trials[y], s=9, color="0.75", label="trials")
        for method, part in grids.groupby("method", sort=False):
            part = part.sort_values("macs_ratio")
            ax.plot(part[x], part[y], "o-", ms=2.8, lw=0.9, color=COLORS[str(method)], label=names[str(method)])
        ax.scatter(front[x], front[y], s=22, color=COLORS["search"], label="Pareto front", zorder=3)
        ax.set(xlabel=AXIS_LABELS[x], ylabel=AXIS_LABELS[y], xlim=(0, 1.02))
        ax.set_ylim(0, worst if y == axis else 1.02)
    axes[0].set_title(where)
    shared_legend(axes, columns=4)


def draw_profile(ax: Axes, points: pd.DataFrame) -> None:
    """How thresholds run over the depth: columns label and thresholds (one per block), a line per row.

    A triangle at the bottom: all of set A merges.
    """
    shades = colormaps["viridis"](np.linspace(0.05, 0.85, len(points)))
    thresholds = np.array(points.thresholds.tolist(), float)
    bottom = min(thresholds[thresholds > -1].min(initial=1.0), 0.9) - 0.1
    for shade, label, row in zip(shades, points.label, thresholds, strict=True):
        shown = np.maximum(row, bottom)
        ax.plot(range(len(row)), shown, "o-", ms=3.5, lw=1.3, color=shade, label=label)
        everything = np.flatnonzero(row <= -1)
        ax.plot(everything, shown[everything], "v", ms=7, color=shade)
    ax.set(xlabel="layer", ylabel="cosine threshold (1: off)", xticks=range(thresholds.shape[1]))
    legend_outside(ax, beside=True)


def draw_hypervolume(ax: Axes, traces: pd.DataFrame, where: str = "trials") -> None:
    """The hypervolume that is missing after n evaluations: the median over the seeds, and all of them as a band.

    Columns method, seed, evaluation (from 1), fraction (of the reference front's hypervolume). Methods stand in the
    legend in the order they end in, the best one last, as the lines do.
    """
    missing = traces.assign(percent=100 * (1 - traces.fraction))
    ends = missing.groupby(["method", "evaluation"]).percent.median().groupby("method").min()
    for method, marker in zip(ends.sort_values(ascending=False).index, cycle("osD^v<>PXph*"), strict=False):
        over = missing[missing.method == method].groupby("evaluation").percent
        middle, color = over.median(), COLORS.get(str(method), "0.4")
        ax.fill_between(middle.index, over.min(), over.max(), color=color, alpha=0.12, lw=0)
        ax.plot(middle.index, middle, lw=1.4, color=color, label=str(method), marker=marker, ms=4, markevery=12)
    ax.set(xlabel="evaluations", ylabel="hypervolume missing (%)", yscale="log", yticks=[3, 10, 30, 100])
    ax.set_title(f"{where}: {ends.idxmin()} misses least, {ends.min():.0f} %")
    ax.yaxis.set_major_formatter("{x:g}")
    legend_outside(ax, beside=True)


def draw_choices(axes: Sequence[Axes], choices: pd.DataFrame, max_drop: float, where: str = "images") -> None:
    """What a search is worth on images it did not see: MACs of each method's choice, and what it loses there.

    Columns method, seed, cost, rule, value, score_drop: by the rule "chosen" a point is chosen on those images, by
    "promised" on the search's own, so as to lose at most ``max_drop``. The median over the seeds and the range.
    """
    rows = choices[choices.cost == "macs_ratio"]
    order = rows[rows.rule == "chosen"].groupby("method").value.median().sort_values().index
    looks = {"chosen": ("chosen on select images", COLORS["search"], "o"),
             "promised": ("chosen on search images alone", COLORS["fixed r"], "s")}  # fmt: skip
    for ax, column, scale in zip(axes, ("value", "score_drop"), (1, 100), strict=True):
        for shift, (rule, (label, color, marker)) in zip((-0.15, 0.15), looks.items(), strict=True):
            over = rows[rows.rule == rule].groupby("method")[column].agg(["median", "min", "max"]).loc[order] * scale
            places = np.arange(len(order)) + shift
            ax.hlines(places, over["min"], over["max"], color=color, lw=2.5, alpha=0.35)
            ax.plot(over["median"], places, marker, color=color, ms=5, label=label)
        ax.set(yticks=range(len(order)), yticklabels=order)
        ax.invert_yaxis()
    lost = 100 * rows[rows.rule == "promised"].score_drop.median()
    axes[0].set_title(f"{where}: fewest MACs within {100 * max_drop:g} points", fontsize=10)
    axes[1].set_title(f"chosen on search images alone they lose {lost:.1f} points (median of all)", fontsize=10)
    axes[0].set_xlabel(AXIS_LABELS["macs_ratio"])
    axes[1].axvline(100 * max_drop, color=COLORS["unmerged"], lw=0.8, ls="--")
    axes[1].set_xlabel("loss on select images (points)")
    shared_legend(axes, columns=2)
