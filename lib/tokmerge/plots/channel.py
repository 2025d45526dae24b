"""Figures of the channel: accuracy against SNR, and the policy over a fading trace."""

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tokmerge.plots.style import legend_outside, shared_legend

NAMES = {"jpeg": "JPEG", "webp": "WebP", "awgn": "AWGN", "rayleigh": "Rayleigh", "rician": "Rician", "vqa": "VQA"}
SCHEME_STYLES = {
    "unmerged": ("#333333", "-", "*"),
    "cut off": ("#999999", "--", "x"),
    "fixed ratio": ("#E69F00", "-", "s"),
    "adaptive": ("#0072B2", "-", "o"),
    "jpeg": ("#CC79A7", ":", "^"),
    "webp": ("#882255", ":", "v"),
    "analog cut off": ("#D55E00", "--", "P"),
    "analog adaptive": ("#009E73", "-", "D"),
    "learned adaptive": ("#56B4E9", "-.", "h"),
}


def _spell(name: str) -> str:
    """As names are written: "analog Rayleigh"."""
    return " ".join(NAMES.get(word, word) for word in name.split())


def draw_link(ax: Axes, table: pd.DataFrame, score_name: str = "top-1", legend: bool = True) -> None:
    """Accuracy against SNR with 95 % bands: columns snr_db, family, score, score_half."""
    for family in dict.fromkeys(table.family):
        part = table[table.family == family].sort_values("snr_db")
        color, line, marker = SCHEME_STYLES[family]
        ax.plot(part.snr_db, 100 * part.score, line, color=color, label=_spell(family), marker=marker, ms=4)
        low, high = 100 * (part.score - part.score_half), 100 * (part.score + part.score_half)
        ax.fill_between(part.snr_db, low, high, color=color, alpha=0.12)
    ax.set(xlabel="SNR (dB)", ylabel=f"{score_name} (%)")
    if legend:
        legend_outside(ax, columns=3)


def draw_trace(ax: Axes, table: pd.DataFrame, score_name: str = "top-1") -> None:
    """Accuracy against latency of every choice over a fading trace: columns kind, choice, score, latency_s."""
    fixed = table[table.kind == "fixed"]
    ax.scatter(1e3 * fixed.latency_s, 100 * fixed.score, s=14, color="#999999", label="fixed choices")
    for color, row in zip(("#0072B2", "#D55E00", "#E69F00"), table[table.kind == "policy"].itertuples(), strict=False):
        ax.scatter(1e3 * row.latency_s, 100 * row.score, s=60, marker="*", color=color, label=row.choice)
    ax.set(xlabel="mean latency (ms)", ylabel=f"{score_name} over the trace (%)")
    legend_outside(ax, columns=2)


def draw_channel(
    link: pd.DataFrame, trace: pd.DataFrame, facts: Mapping[str, Any], score_name: str = "top-1"
) -> Figure:
    """`draw_link` beside `draw_trace`, with what they say in the titles; facts are those of both."""

    def said(gain: Mapping[str, Any]) -> str:
        return f"{gain['db']:+.1f} dB ({gain['low']:+.1f} to {gain['high']:+.1f})"

    fig, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.8))
    draw_link(left, link, score_name)
    left.set_title(
        f"{facts['dataset']}, {facts['n_images']:,} test images, {facts['uses']:,} channel uses each: adaptive\n"
        f"{said(facts['gains']['adaptive'])} over unmerged,\n{said(facts['gain_over_cut_off'])} over cut off",
        fontsize=9,
    )
    draw_trace(right, trace, score_name)
    gain, half = facts["policy_gains_pp"]["SNR known"]
    right.set_title(
        "a fading trace, one test image per slot: by the lookup table,\nSNR known, "
        f"{gain:+.1f} ± {half:.1f} points over the best fixed choice", fontsize=9,
    )  # fmt: skip
    fig.tight_layout()
    return fig


def draw_sweeps(
    sweeps: pd.DataFrame, title: str, score_name: str = "top-1", names_of: Mapping[str, tuple[str, str]] | None = None
) -> Figure:
    """`draw_link` of up to nine sweeps, a panel each: columns sweep and uses (0: not one number) as well.

    ``names_of`` has the title and the score's name of sweeps that say something else than their own and ``score_name``.
    """
    names = sweeps.sweep.unique()
    rows = -(-len(names) // 3)
    fig, axes = plt.subplots(rows, 3, figsize=(13, 3.2 * rows), sharex=True, sharey=True, squeeze=False)
    for ax in axes.flat[len(names) :]:
        ax.remove()
    for ax, name in zip(axes.flat, names, strict=False):
        part = sweeps[sweeps.sweep == name]
        uses = part.uses.iloc[0]
        said, score = (names_of or {}).get(name, (_spell(name.removesuffix(f" {uses}")), score_name))
        draw_link(ax, part, score, legend=False)
        ax.set_title(f"{said}, {uses:,} uses" if uses else said, fontsize=9)
        ax.xaxis.set_tick_params(labelbottom=True)
    fig.suptitle(title, fontsize=10)
    fig.tight_layout()
    shared_legend(fig.axes, columns=5)
    return fig
