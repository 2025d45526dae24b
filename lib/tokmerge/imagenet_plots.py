"""Figures of 40_imagenet: who costs what, and where to cut the model. Drawn from tables only, like `tokmerge.plots`."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from tokmerge.plots import COLORS, LABELS


def draw_adaptivity(axes: Sequence[Axes], mine: pd.DataFrame, fixed: pd.DataFrame, unmerged: pd.DataFrame) -> None:
    """Draw what images cost: how it spreads, how it follows the model's doubt, and where predictions change.

    Args:
        axes: three.
        mine: one row per image under an adaptive policy; columns macs, prediction.
        fixed: the same images under a schedule that is the same for all.
        unmerged: the same images unmerged; columns macs, prediction, confidence.
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
    axes[0].set(xlabel=LABELS["macs_ratio"], ylabel="images")
    axes[1].set(xlabel="tenths of images, by unmerged confidence", ylabel=LABELS["macs_ratio"])
    axes[2].set(xlabel="tenths of images, by unmerged confidence", ylabel="predictions changed (%)")
    axes[2].legend()


def draw_splits(axes: Sequence[Axes], splits: pd.DataFrame, sent: pd.DataFrame) -> None:
    """Draw what every split sends and what it costs device and server.

    Args:
        axes: two.
        splits: columns method ("unmerged" or "ours"), precision, split_layer, edge_macs, server_macs, payload_bytes.
        sent: what else could be sent; columns sent ("jpeg", "webp", ...), payload_bytes, top1_drop.
    """
    styles = {"float16": "-", "int8": "--", "int4": ":"}
    for (method, precision), part in splits.groupby(["method", "precision"], sort=False):
        color = COLORS["threshold" if method == "ours" else "unmerged"]
        label = f"{method}, {precision}"
        axes[0].semilogy(part.split_layer, part.payload_bytes, styles[str(precision)], color=color, label=label)
    for ending, color in (("jpeg", COLORS["fixed r"]), ("webp", COLORS["accent"])):
        fine = sent[(sent.sent == ending) & (sent.top1_drop <= 0.005)]
        if len(fine):
            label = f"{ending}, top-1 within 0.5 points"
            axes[0].axhline(fine.payload_bytes.min(), color=color, lw=1, ls="-.", label=label)
    axes[0].set(xlabel="blocks on the device", ylabel="bytes per image")
    axes[0].legend(fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    for method, part in splits[splits.precision == "float16"].groupby("method", sort=False):
        color = COLORS["threshold" if method == "ours" else "unmerged"]
        axes[1].plot(part.split_layer, part.edge_macs / 1e6, "o-", ms=3, color=color, label=f"{method}, device")
        axes[1].plot(part.split_layer, part.server_macs / 1e6, "s--", ms=3, color=color, label=f"{method}, server")
    axes[1].set(xlabel="blocks on the device", ylabel="million MACs per image")
    axes[1].legend(fontsize=7)
