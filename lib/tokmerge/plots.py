"""How figures look: one palette, one size grid, the same bytes at every run."""

from collections.abc import Sequence
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
    "search": "#009E73",
    "ax": "#009E73",
    "ax schedule": "#56B4E9",
    "ax per block": "#332288",
    "ax curve start": "#F0E442",
    "ax keys": "#117733",
    "ax shares": "#999999",
    "ax kl": "#882255",
    "ax top-1": "#44AA99",
    "sobol": "#CC79A7",
    "nsga2": "#D55E00",
    "uniform": "#0072B2",
}
LABELS = {
    "kl": "KL(unmerged || merged)",
    "root_kl": "root of KL(unmerged || merged)",
    "loss_rise": "rise of the log-loss",
    "top1_drop": "drop of top-1",
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


def draw_merge_map(ax: Axes, image: np.ndarray, groups: np.ndarray) -> None:
    """Draw an image, the borders between merged groups, and a tint on every group of several patches.

    Args:
        ax: where to draw.
        image: (H, W), (H, W, 1) or (H, W, 3) in [0, 1].
        groups: (rows, columns) group of each patch, such as `merge_map` gives.
    """
    rows, columns = groups.shape
    ax.imshow(image, extent=(0, columns, rows, 0), vmin=0, vmax=1, interpolation="nearest")
    ax.imshow(tints(groups), extent=(0, columns, rows, 0), interpolation="nearest")
    vertical = np.argwhere(groups[:, 1:] != groups[:, :-1])
    horizontal = np.argwhere(groups[1:] != groups[:-1])
    ax.vlines(vertical[:, 1] + 1, vertical[:, 0], vertical[:, 0] + 1, color="white", lw=0.6, rasterized=True)
    ax.hlines(horizontal[:, 0] + 1, horizontal[:, 1], horizontal[:, 1] + 1, color="white", lw=0.6, rasterized=True)
    ax.set(xticks=[], yticks=[], xlim=(0, columns), ylim=(rows, 0))
    ax.grid(False)


def tints(groups: np.ndarray) -> np.ndarray:
    """A colour on every group of several patches: (rows, columns) groups -> (rows, columns, 4) in [0, 1]."""
    tint = np.zeros((*groups.shape, 4))
    # Groups are numbered in reading order; a large odd stride gives neighbours different hues.
    hues = colormaps["hsv"](np.arange(groups.max() + 1) * 0.381966 % 1.0)
    for group, size in zip(*(part.tolist() for part in np.unique(groups, return_counts=True)), strict=True):
        if size > 1:
            tint[groups == group] = (*hues[group][:3], 0.42)
    return tint


def paint_merge_map(image: np.ndarray, groups: np.ndarray, cell: int = 16) -> np.ndarray:
    """What `draw_merge_map` draws, as plain pixels: for pictures that must follow a hand, figures take too long.

    Args:
        image: (H, W), (H, W, 1) or (H, W, 3) in [0, 1].
        groups: (rows, columns) group of each patch.
        cell: pixels along the side of a patch.

    Returns:
        (rows * cell, columns * cell, 3) uint8.
    """
    rows, columns = groups.shape
    y, x = (np.arange(n * cell) * size // (n * cell) for n, size in zip((rows, columns), image.shape, strict=False))
    picture = np.broadcast_to(image.reshape(*image.shape[:2], -1)[y[:, None], x], (len(y), len(x), 3))
    block = np.ones((cell, cell), int)
    tint = np.kron(tints(groups), block[..., None])
    picture = picture * (1 - tint[..., 3:]) + tint[..., :3] * tint[..., 3:]
    large = np.kron(groups, block)
    picture[:, 1:][large[:, 1:] != large[:, :-1]] = 1
    picture[1:][large[1:] != large[:-1]] = 1
    return (picture * 255).round().astype(np.uint8)


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
    labels = {"threshold": "one threshold (per image)", "fixed r": "fixed r (ToMe)"}
    for method, part in sweep[sweep.method != "unmerged"].groupby("method", sort=False):
        error = 100 * np.array([part.top1 - part.top1_low, part.top1_high - part.top1])
        ax.errorbar(
            part[column], 100 * part.top1, error, fmt="o-", ms=4, lw=1.3, elinewidth=0.7, capsize=2,
            color=COLORS[str(method)], label=labels[str(method)],
        )  # fmt: skip
    top1 = sweep[sweep.method == "unmerged"].top1.item()
    ax.axhline(100 * top1, color=COLORS["unmerged"], lw=0.9, ls="--", label="unmerged")
    ax.set(xlabel=LABELS[column], xlim=(0, 1.02))


def draw_front(
    axes: Sequence[Axes], trials: pd.DataFrame, front: pd.DataFrame, grids: pd.DataFrame, axis: str, worst: float
) -> None:
    """Draw a front in its three pairwise projections, with what was tried and with the grid baselines.

    Args:
        axes: three.
        trials: every completed trial of the search; columns axis, macs_ratio, bytes_ratio.
        front: those on the front; the same columns.
        grids: the baselines; the same columns and method ("uniform" or "fixed r").
        axis: the accuracy axis.
        worst: its end in the picture, the reference point's value.
    """
    projections = (("macs_ratio", axis), ("bytes_ratio", axis), ("macs_ratio", "bytes_ratio"))
    names = {"uniform": "one threshold", "fixed r": "fixed r (ToMe)"}
    for ax, (x, y) in zip(axes, projections, strict=True):
        ax.scatter(trials[x], trials[y], s=9, color="0.75", label="trials")
        for method, part in grids.groupby("method", sort=False):
            part = part.sort_values("macs_ratio")
            ax.plot(part[x], part[y], "o-", ms=2.8, lw=0.9, color=COLORS[str(method)], label=names[str(method)])
        ax.scatter(front[x], front[y], s=22, color=COLORS["search"], label="Pareto front", zorder=3)
        ax.set(xlabel=LABELS[x], ylabel=LABELS[y], xlim=(0, 1.02))
        ax.set_ylim(0, worst if y == axis else 1.02)
    axes[0].legend(loc="upper right")


def draw_profile(ax: Axes, points: pd.DataFrame) -> None:
    """Draw how thresholds run over the depth, a line per point; a triangle at the bottom: all of set A merges.

    Args:
        ax: where to draw.
        points: columns label and thresholds (one per block).
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
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))


def draw_hypervolume(ax: Axes, traces: pd.DataFrame) -> None:
    """Draw the hypervolume that is missing after n evaluations: the median over the seeds, and all of them as a band.

    Methods stand in the legend in the order they end in, the best one last, as the lines do.

    Args:
        ax: where to draw.
        traces: columns method, seed, evaluation (from 1), fraction (of the reference front's hypervolume).
    """
    missing = traces.assign(percent=100 * (1 - traces.fraction))
    ends = missing.groupby(["method", "evaluation"]).percent.median().groupby("method").min()
    for method in ends.sort_values(ascending=False).index:
        over = missing[missing.method == method].groupby("evaluation").percent
        middle, color = over.median(), COLORS.get(str(method), "0.4")
        ax.fill_between(middle.index, over.min(), over.max(), color=color, alpha=0.12, lw=0)
        ax.plot(middle.index, middle, lw=1.4, color=color, label=str(method))
    ax.set(xlabel="evaluations", ylabel="hypervolume missing (%)", yscale="log", yticks=[3, 10, 30, 100])
    ax.yaxis.set_major_formatter("{x:g}")
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))


def draw_methods(ax: Axes, points: pd.DataFrame, column: str) -> None:
    """Draw the drop of top-1 against one of the cost ratios, a colour per method; ours in front.

    Args:
        ax: where to draw.
        points: columns method, kind ("ours" or other), searched (or a grid of its one number), top1_drop, top1_drop_sem
            and the ratio.
        column: macs_ratio, tokens_ratio or bytes_ratio.
    """
    methods = list(dict.fromkeys(points.method))
    shades = colormaps["tab20"](np.arange(len(methods)) % 20)
    for method, shade in zip(methods, shades, strict=True):
        part = points[points.method == method]
        ours = part.kind.iloc[0] == "ours"
        ax.errorbar(
            part[column], 100 * part.top1_drop, 196 * part.top1_drop_sem, label=method, color=shade,
            fmt="o" if part.searched.iloc[0] else "s", elinewidth=0.6, ms=6 if ours else 4,
            mec="black" if ours else "none", mew=0.7, zorder=3 if ours else 2,
        )  # fmt: skip
    ax.axhline(0.5, color=COLORS["unmerged"], lw=0.8, ls="--")
    ax.set(xlabel=LABELS[column], xlim=(0, None))


FAMILIES = {
    "unmerged": ("#333333", "-"),
    "cut off": ("#999999", "--"),
    "fixed ratio": ("#E69F00", "-"),
    "adaptive": ("#0072B2", "-"),
    "jpeg": ("#CC79A7", ":"),
    "webp": ("#882255", ":"),
    "analog cut off": ("#D55E00", "--"),
    "analog adaptive": ("#009E73", "-"),
    "learned adaptive": ("#56B4E9", "-"),
}


def draw_link(ax: Axes, table: pd.DataFrame, families: Sequence[str] | None = None) -> None:
    """Accuracy against SNR with 95 % bands: columns snr_db, family, top1, top1_half."""
    for family in families or list(dict.fromkeys(table.family)):
        part = table[table.family == family].sort_values("snr_db")
        color, line = FAMILIES[family]
        ax.plot(part.snr_db, 100 * part.top1, line, color=color, label=family, marker=".")
        ax.fill_between(
            part.snr_db, 100 * (part.top1 - part.top1_half), 100 * (part.top1 + part.top1_half), color=color, alpha=0.12
        )
    ax.set_xlabel("SNR (dB)")
    ax.set_ylabel("top-1 (%)")
    ax.legend(fontsize=7, ncols=2)


def draw_trace(ax: Axes, table: pd.DataFrame) -> None:
    """Accuracy against latency of every choice over a fading trace: columns kind, choice, top1, latency_s."""
    fixed = table[table.kind == "fixed"]
    ax.scatter(1e3 * fixed.latency_s, 100 * fixed.top1, s=14, color="#999999", label="fixed choices")
    for color, row in zip(("#0072B2", "#D55E00", "#E69F00"), table[table.kind == "policy"].itertuples(), strict=False):
        ax.scatter(1e3 * row.latency_s, 100 * row.top1, s=60, marker="*", color=color, label=row.choice)
    ax.set_xlabel("mean latency (ms)")
    ax.set_ylabel("top-1 over the trace (%)")
    ax.legend(fontsize=7)
