"""Figures of image classification: what merging buys, who costs what, and where to cut the model."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from tokmerge.plots.style import AXIS_LABELS, COLORS, draw_points, shades


def draw_similarity(ax: Axes, similarity: pd.DataFrame) -> None:
    """Best-match similarity over the layers: columns layer, quantile (0.05, 0.25, 0.5, 0.75, 0.95), similarity."""
    wide = similarity.pivot(index="layer", columns="quantile", values="similarity")
    for low, high, alpha in ((0.05, 0.95, 0.15), (0.25, 0.75, 0.3)):
        label = f"{low:.0%} to {high:.0%}"
        ax.fill_between(wide.index, wide[low], wide[high], color=COLORS["threshold"], alpha=alpha, lw=0, label=label)
    ax.plot(wide.index, wide[0.5], "o-", color=COLORS["threshold"], ms=3.5, label="median")
    ax.set(xlabel="layer", ylabel="cosine with best match", xticks=wide.index)
    ax.legend(loc="lower right", ncols=3)


def draw_sweep(ax: Axes, sweep: pd.DataFrame, column: str) -> None:
    """Top-1 with its 95 % interval against a ratio, a line per method; one row is of method "unmerged".

    Columns method, top1, top1_low, top1_high and the ratio, ``column``.
    """
    labels = {"threshold": "one threshold (per image)", "fixed r": "fixed r (ToMe)"}
    for method, part in sweep[sweep.method != "unmerged"].groupby("method", sort=False):
        error = 100 * np.array([part.top1 - part.top1_low, part.top1_high - part.top1])
        ax.errorbar(
            part[column], 100 * part.top1, error, fmt="o-", ms=4, lw=1.3, elinewidth=0.7, capsize=2,
            color=COLORS[str(method)], label=labels[str(method)],
        )  # fmt: skip
    top1 = sweep[sweep.method == "unmerged"].top1.item()
    ax.axhline(100 * top1, color=COLORS["unmerged"], lw=0.9, ls="--", label="unmerged")
    ax.set(xlabel=AXIS_LABELS[column], xlim=(0, 1.02))


def draw_methods(ax: Axes, points: pd.DataFrame, column: str) -> None:
    """The drop of top-1 against a ratio of costs, a colour per method; ours in front.

    Columns method, kind ("ours" or other), searched (or a grid of its one number), top1_drop, top1_drop_sem and the
    ratio, ``column``.
    """
    for method, shade in shades(points.method).items():
        part = points[points.method == method]
        draw_points(
            ax, part[column], 100 * part.top1_drop, 196 * part.top1_drop_sem, part.kind.iloc[0] == "ours", small=4,
            label=method, color=shade, fmt="o" if part.searched.iloc[0] else "s",
        )  # fmt: skip
    ax.axhline(0.5, color=COLORS["unmerged"], lw=0.8, ls="--")
    ax.set(xlabel=AXIS_LABELS[column], xlim=(0, None))


def draw_adaptivity(axes: Sequence[Axes], mine: pd.DataFrame, fixed: pd.DataFrame, unmerged: pd.DataFrame) -> None:
    """What images cost, on three axes: how it spreads, how it follows the model's doubt, where predictions change.

    Each table has a row per image, in the same order: columns macs and prediction, of ``unmerged`` also confidence.
    """
    tenth = 1 + pd.qcut(unmerged.confidence.rank(method="first"), min(10, len(unmerged)), labels=False)
    for label, frame, color in (("adaptive", mine, "threshold"), ("fixed", fixed, "fixed r")):
        ratio, changed = frame.macs / unmerged.macs, 100 * (frame.prediction != unmerged.prediction)
        look: dict[str, Any] = {"color": COLORS[color], "label": label}
        if label == "adaptive":
            axes[0].hist(ratio, bins=40, **look)
        else:
            axes[0].axvline(ratio.mean(), ls="--", lw=1.2, **look)
        groups = ratio.groupby(tenth)
        low, high = (groups.quantile(share) for share in (0.1, 0.9))
        axes[1].fill_between(low.index, low, high, color=COLORS[color], alpha=0.2, lw=0)
        axes[1].plot(groups.mean(), "o-", ms=3.5, **look)
        axes[2].plot(changed.groupby(tenth).mean(), "o-", ms=3.5, **look)
    axes[0].set(xlabel=AXIS_LABELS["macs_ratio"], ylabel="images")
    axes[1].set(xlabel="tenths of images, by unmerged confidence", ylabel=AXIS_LABELS["macs_ratio"])
    axes[2].set(xlabel="tenths of images, by unmerged confidence", ylabel="predictions changed (%)")
    axes[2].legend()


def draw_splits(axes: Sequence[Axes], splits: pd.DataFrame, sent: pd.DataFrame) -> None:
    """What every split sends, beside what else could be sent; and what it costs device and server.

    Splits: columns method ("unmerged" or "ours"), precision, split_layer, edge_macs, server_macs, payload_bytes. Sent:
    columns sent ("jpeg", "webp", ...), payload_bytes, top1_drop.
    """
    colors = {"ours": COLORS["threshold"], "unmerged": COLORS["unmerged"]}
    styles = {"float16": "-", "int8": "--", "int4": ":"}
    for (method, precision), part in splits.groupby(["method", "precision"], sort=False):
        look: dict[str, Any] = {"color": colors[str(method)], "label": f"{method}, {precision}"}
        axes[0].semilogy(part.split_layer, part.payload_bytes, styles[str(precision)], **look)
    for ending, color in (("jpeg", COLORS["fixed r"]), ("webp", COLORS["accent"])):
        fine = sent[(sent.sent == ending) & (sent.top1_drop <= 0.005)]
        if len(fine):
            look = {"color": color, "label": f"{ending}, top-1 within 0.5 points"}
            axes[0].axhline(fine.payload_bytes.min(), lw=1, ls="-.", **look)
    axes[0].set(xlabel="blocks on the device", ylabel="bytes per image")
    axes[0].legend(fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    for method, part in splits[splits.precision == "float16"].groupby("method", sort=False):
        for where, macs, marker in (("device", part.edge_macs, "o-"), ("server", part.server_macs, "s--")):
            look = {"color": colors[str(method)], "label": f"{method}, {where}"}
            axes[1].plot(part.split_layer, macs / 1e6, marker, ms=3, **look)
    axes[1].set(xlabel="blocks on the device", ylabel="million MACs per image")
    axes[1].legend(fontsize=7)
