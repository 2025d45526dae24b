"""Figures of image classification: what merging buys, who costs what, and where to cut the model."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from tokmerge.plots.style import AXIS_LABELS, COLORS, legend_outside, shared_legend

# Methods of images; those that are cut after some block are ours, too.
OURS = ("threshold", "size-aware threshold", "calibrated threshold", "confidence threshold", "capped threshold",
        "relative threshold")  # fmt: skip
GROUPS = {
    "ours": OURS,
    "published": ("ToMe", "PiToMe", "ToFu", "AdaMerge", "DiffRate", "attention pruning", "DyMU"),
    "simple": ("ToMe on tokens", "size-aware ToMe", "one threshold", "fixed r", "window pooling", "keep rates",
               "random pruning"),
}  # fmt: skip


def draw_similarity(ax: Axes, similarity: pd.DataFrame) -> None:
    """Best-match similarity over the layers: columns layer, quantile (0.05, 0.25, 0.5, 0.75, 0.95), similarity."""
    wide = similarity.pivot(index="layer", columns="quantile", values="similarity")
    for low, high, alpha in ((0.05, 0.95, 0.15), (0.25, 0.75, 0.3)):
        label = f"{low:.0%} to {high:.0%}"
        ax.fill_between(wide.index, wide[low], wide[high], color=COLORS["threshold"], alpha=alpha, lw=0, label=label)
    ax.plot(wide.index, wide[0.5], "o-", color=COLORS["threshold"], ms=3.5, label="median")
    ax.set(xlabel="layer", ylabel="cosine with best match", xticks=wide.index)
    legend_outside(ax, columns=3)


def draw_sweep(ax: Axes, sweep: pd.DataFrame, column: str) -> None:
    """The score with its 95 % interval against a ratio, a line per method; one row is of method "unmerged".

    Columns method, score, score_low, score_high and the ratio, ``column``.
    """
    labels = {"threshold": "one threshold (per image)", "fixed r": "fixed r (ToMe)"}
    for method, part in sweep[sweep.method != "unmerged"].groupby("method", sort=False):
        error = 100 * np.array([part.score - part.score_low, part.score_high - part.score])
        ax.errorbar(
            part[column], 100 * part.score, error, fmt="o-", ms=4, lw=1.3, elinewidth=0.7, capsize=2,
            color=COLORS[str(method)], label=labels[str(method)],
        )  # fmt: skip
    score = sweep[sweep.method == "unmerged"].score.item()
    ax.axhline(100 * score, color=COLORS["unmerged"], lw=0.9, ls="--", label="unmerged")
    ax.set(xlabel=AXIS_LABELS[column], xlim=(0, 1.02))


def draw_tradeoffs(sweep: pd.DataFrame, score_name: str, where: str) -> Figure:
    """`draw_sweep` against MACs, tokens and bytes; the title says who needs how little within a point."""
    fig, axes = plt.subplots(1, 3, figsize=(10.5, 3.2), sharey=True)
    for ax, column in zip(axes, ("macs_ratio", "tokens_ratio", "bytes_ratio"), strict=True):
        draw_sweep(ax, sweep, column)
    within = sweep[sweep.score >= sweep[sweep.method == "unmerged"].score.item() - 0.01]
    costs = within.groupby("method")[["macs_ratio", "bytes_ratio"]]
    least = costs.min().reindex(["threshold", "fixed r"], fill_value=1.0).itertuples(index=False)
    axes[0].set_ylabel(f"{score_name} (%)")
    said = [f"{name} takes {macs:.2f} of the MACs and {sent:.2f} of the bytes at least"
            for name, (macs, sent) in zip(("one threshold", "fixed r"), least, strict=True)]  # fmt: skip
    fig.suptitle(f"{where}, within 1 point:\n{', '.join(said)}", fontsize=10)
    fig.tight_layout()
    shared_legend(axes, columns=3)
    return fig


def draw_answer(
    ax: Axes, image: Image.Image, logits: np.ndarray, truth: str, classes: Sequence[str], mask: np.ndarray | None = None
) -> None:
    """An image and what a model made of it: logits of classes, or (H, W) of a map whose outline lies on the mask's."""
    ax.imshow(image, cmap="gray" if image.mode == "L" else None)
    ax.axis("off")
    if logits.ndim == 1:
        ax.set_title(f"{classes[int(logits.argmax())]}?\n({truth})", fontsize=7)
        return
    ax.set_title(truth, fontsize=7)
    for inside, color in ((mask, COLORS["threshold"]), (logits > 0, COLORS["fixed r"])):
        if inside is not None and 0 < np.mean(inside) < 1:
            size = (0, image.width, image.height, 0)
            ax.contour(inside, levels=[0.5], colors=[color], linewidths=1, extent=size, origin="upper")


def draw_adaptivity(
    axes: Sequence[Axes], mine: pd.DataFrame, fixed: pd.DataFrame, unmerged: pd.DataFrame, where: str = "images",
    rival: str = "fixed",
) -> None:  # fmt: skip
    """What images cost, on three axes: how it spreads, how it follows the model's doubt, what it loses.

    Each table has a row per image, in the same order: columns macs and score, of ``unmerged`` also confidence.
    ``rival`` names the method of ``fixed``, whose mean is not that of ``mine``.
    """
    tenth = 1 + pd.qcut(unmerged.confidence.rank(method="first"), min(10, len(unmerged)), labels=False)
    for label, frame, color in (("adaptive", mine, "threshold"), (rival, fixed, "fixed r")):
        ratio, lost = frame.macs / unmerged.macs, 100 * (unmerged.score - frame.score)
        look: dict[str, Any] = {"color": COLORS[color], "label": label}
        if label == "adaptive":
            axes[0].hist(ratio, bins=40, **look)
        else:
            axes[0].axvline(ratio.mean(), ls="--", lw=1.2, **look)
        groups = ratio.groupby(tenth)
        low, high = (groups.quantile(share) for share in (0.1, 0.9))
        axes[1].fill_between(low.index, low, high, color=COLORS[color], alpha=0.2, lw=0)
        axes[1].plot(groups.mean(), "o-", ms=3.5, **look)
        axes[2].plot(lost.groupby(tenth).mean(), "o-", ms=3.5, **look)
    low, high = (mine.macs / unmerged.macs).quantile([0.1, 0.9])
    axes[0].set(xlabel=AXIS_LABELS["macs_ratio"], ylabel="images")
    axes[0].set_title(f"{where}: four of five\ntake {low:.2f} to {high:.2f} of the MACs", fontsize=9)
    tenths = "tenths of images, least confident first"
    axes[1].set(xlabel=tenths, ylabel=AXIS_LABELS["macs_ratio"])
    axes[2].set(xlabel=tenths, ylabel="score lost (points)")
    legend_outside(axes[1], columns=2)


def draw_splits(axes: Sequence[Axes], splits: pd.DataFrame, sent: pd.DataFrame, where: str = "images") -> None:
    """What every split sends, beside what else could be sent; and what it costs device and server.

    Splits: columns method ("unmerged" or "ours"), precision, split_layer, edge_macs, server_macs, payload_bytes. Sent:
    columns sent ("jpeg", "webp", ...), payload_bytes, score_drop.
    """
    colors = {"ours": COLORS["threshold"], "unmerged": COLORS["unmerged"]}
    styles = {"float16": "-", "int8": "--", "int4": ":"}
    for (method, precision), part in splits.groupby(["method", "precision"], sort=False):
        line, color, label = styles[str(precision)], colors[str(method)], f"{method}, {precision}"
        axes[0].semilogy(part.split_layer, part.payload_bytes, line, color=color, label=label)
    for ending, label, color in (("jpeg", "JPEG", COLORS["fixed r"]), ("webp", "WebP", COLORS["accent"])):
        fine = sent[(sent.sent == ending) & (sent.score_drop <= 0.005)]
        if len(fine):
            fewest, label = fine.payload_bytes.min(), f"{label}, within 0.5 points"
            axes[0].axhline(fewest, lw=1, ls="-.", color=color, label=label)
    axes[0].set_title(f"{where}: the point of fewest MACs", fontsize=9)
    axes[0].set(xlabel="blocks on the device", ylabel="bytes per image")
    legend_outside(axes[0], columns=3)
    for method, part in splits[splits.precision == "float16"].groupby("method", sort=False):
        for side, macs, marker in (("device", part.edge_macs, "o-"), ("server", part.server_macs, "s--")):
            color, label = colors[str(method)], f"{method}, {side}"
            axes[1].plot(part.split_layer, macs / 1e6, marker, ms=3, color=color, label=label)
    axes[1].set(xlabel="blocks on the device", ylabel="million MACs per image")
    legend_outside(axes[1], columns=2)


def draw_chosen(axes: Sequence[Axes], chosen: pd.DataFrame, groups: Mapping[str, Sequence[str]]) -> None:
    """What each method's chosen points cost: the median over seeds and the range; beside it the loss on test images.

    Args:
        axes: one for each cost.
        chosen: rows of `tokmerge.evaluation.selection.summarise` with columns merged, score_drop and drop_ci95.
        groups: methods by the name of their group.
    """
    looks = dict(zip(groups, ((COLORS["threshold"], "o"), (COLORS["fixed r"], "s"), ("0.45", "^")), strict=False))
    for ax, (cost, part) in zip(axes, chosen.groupby("cost", sort=False), strict=True):
        ranked = pd.concat([part[part.method.isin(names)].sort_values("value") for names in groups.values()])
        for place, row in enumerate(ranked.itertuples()):
            group = next(name for name, names in groups.items() if row.method in names)
            color, marker = looks[group]
            ax.plot([row.low, row.high], [place, place], color=color, lw=2.5, alpha=0.35, solid_capstyle="butt")
            ax.plot(row.value, place, marker, color=color, ms=6, label=group)
            lost = round(100 * row.score_drop, 1) + 0.0  # no minus before a zero
            loss = f"{lost:.1f} ± {100 * row.drop_ci95:.1f}" if row.merged else "not within"
            ax.annotate(loss, (1.01, place), xycoords=("axes fraction", "data"), va="center", fontsize=7)
        ax.set(yticks=range(len(ranked)), xlabel=AXIS_LABELS[str(cost)])
        ax.set_yticklabels(ranked.method, fontsize=8)
        ax.invert_yaxis()
        best = part.loc[part.value.idxmin()]
        ax.set_title(f"fewest: {best.method}, {best.value:.2g}", fontsize=9)
        ax.annotate("loss on test\n(points)", (1.01, 1.0), xycoords="axes fraction", va="bottom", fontsize=7)
    axes[-1].set_xscale("log")
    low, high = axes[-1].get_xlim()
    ticks = [tick for tick in (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0) if low <= tick <= high]
    axes[-1].set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes[-1].set_xticks([], minor=True)
    shared_legend(axes, columns=len(groups))


def draw_gains(ax: Axes, gains: pd.DataFrame, score_name: str = "accuracy") -> None:
    """What adaptivity buys, with its 95 % interval: columns method, cost, against, gain and gain_ci95 (as shares)."""
    looks = {"same counts": (COLORS["threshold"], "o"), "window pooling": (COLORS["fixed r"], "s")}
    kept = {"macs_ratio": "fewest MACs", "bytes_ratio": "fewest bytes"}
    labels = list(dict.fromkeys(zip(gains.method, gains.cost, strict=True)))
    for shift, (against, (color, marker)) in zip((-0.12, 0.12), looks.items(), strict=True):
        part = gains[gains.against == against]
        above, below = (part.gain > part.gain_ci95).sum(), (part.gain < -part.gain_ci95).sum()
        pays = f"interval above 0 at {above}, below at {below} of {len(part)}"
        places = [labels.index(label) + shift for label in zip(part.method, part.cost, strict=True)]
        ax.errorbar(
            100 * part.gain, places, xerr=100 * part.gain_ci95, fmt=marker, color=color, ms=5, lw=1.2,
            label=f"against {against}: {pays}",
        )  # fmt: skip
    ax.axvline(0, color=COLORS["unmerged"], lw=0.8, ls="--")
    ax.set(yticks=range(len(labels)), xlabel=f"gain of adaptivity (points of {score_name})")
    ax.set_yticklabels([f"{method}, {kept[cost]}" for method, cost in labels], fontsize=8)
    ax.invert_yaxis()
    legend_outside(ax)


def draw_budgets(ax: Axes, budgets: pd.DataFrame, score_name: str = "accuracy") -> None:
    """What adaptivity buys as budgets shrink: columns method, macs_ratio, gain and gain_ci95 (as shares)."""
    colors = (COLORS["threshold"], COLORS["fixed r"], COLORS["accent"])
    for (method, part), color, marker in zip(budgets.groupby("method", sort=False), colors, "osD", strict=False):
        part = part.sort_values("macs_ratio")
        ax.errorbar(
            part.macs_ratio, 100 * part.gain, 100 * part.gain_ci95, fmt=f"{marker}-", color=color, ms=5, lw=1.2,
            label=method,
        )  # fmt: skip
    ax.axhline(0, color=COLORS["unmerged"], lw=0.8, ls="--")
    ax.set(xlabel=AXIS_LABELS["macs_ratio"], ylabel=f"gain over same counts\n(points of {score_name})")
    legend_outside(ax, columns=2)
