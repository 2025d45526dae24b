import numpy as np
import pandas as pd
import pytest
from tokmerge.plots import images


def test_draw_adaptivity_compares_tenths_of_confidence(axes):
    unmerged = pd.DataFrame({"macs": 100.0, "confidence": np.linspace(0, 1, 200), "score": 1.0})
    mine = pd.DataFrame({"macs": 60 - 40 * unmerged.confidence, "score": 1.0})
    fixed = pd.DataFrame({"macs": 40.0, "score": [0.0] * 10 + [1.0] * 190})
    images.draw_adaptivity(axes, mine, fixed, unmerged, "200 photos")
    low, high = (mine.macs / 100).quantile([0.1, 0.9])
    title = axes[0].get_title(loc="left") + axes[0].get_title()
    assert title == f"200 photos: four of five\ntake {low:.2f} to {high:.2f} of the MACs"
    expected = [(mine.macs / 100)[start : start + 20].mean() for start in range(0, 200, 20)]
    np.testing.assert_allclose(axes[1].lines[0].get_ydata(), expected)
    np.testing.assert_allclose(axes[1].lines[1].get_ydata(), [0.4] * 10)
    assert list(axes[2].lines[0].get_ydata()) == [0] * 10
    assert list(axes[2].lines[1].get_ydata()) == [50] + [0] * 9
    assert sum(bar.get_height() for bar in axes[0].patches) == 200


def test_draw_splits_has_a_line_per_method_and_the_smallest_good_image(axes):
    columns = ["method", "precision", "split_layer", "edge_macs", "server_macs", "payload_bytes"]
    rows = [
        (method, precision, split, 1e6 * split, 1e6 * (2 - split), scale * split + 1)
        for method, scale in (("unmerged", 100), ("ours", 10))
        for precision in ("float16", "int4")
        for split in range(3)
    ]
    sent = pd.DataFrame({"sent": ["jpeg"] * 3, "payload_bytes": [50, 80, 120], "score_drop": [0.2, 0.004, 0.0]})
    images.draw_splits(axes[:2], pd.DataFrame(rows, columns=columns), sent, "photos")
    title = axes[0].get_title(loc="left") + axes[0].get_title()
    assert title == "photos: the point of fewest MACs"
    assert [list(line.get_ydata()) for line in axes[0].lines[:4]] == [[1, 101, 201]] * 2 + [[1, 11, 21]] * 2
    assert axes[0].lines[4].get_ydata()[0] == 80
    assert len(axes[0].lines) == 5
    np.testing.assert_allclose(axes[1].lines[1].get_ydata(), [2, 1, 0])


def test_draw_sweep_shows_every_method_and_the_unmerged_accuracy(ax):
    sweep = pd.DataFrame(
        [("unmerged", 0.9, 1.0), ("threshold", 0.8, 0.3), ("threshold", 0.85, 0.6), ("fixed r", 0.7, 0.2)],
        columns=["method", "score", "macs_ratio"],
    )
    sweep = sweep.assign(score_low=sweep.score - 0.01, score_high=sweep.score + 0.02)
    images.draw_sweep(ax, sweep, "macs_ratio")
    (threshold, _, (bars,)), (fixed, _, _) = ax.containers
    assert threshold.get_xydata().tolist() == [[0.3, 80.0], [0.6, 85.0]]
    assert fixed.get_xydata().tolist() == [[0.2, 70.0]]
    assert bars.get_segments()[0][:, 1].tolist() == pytest.approx([79.0, 82.0])
    assert ax.get_xlabel() == "MACs, merged / unmerged"
    assert 90.0 in [line.get_ydata()[0] for line in ax.lines]


def test_the_title_of_tradeoffs_says_who_needs_least_within_a_point():
    rows = [("unmerged", 0.9, 1.0), ("threshold", 0.8, 0.3), ("threshold", 0.895, 0.6), ("fixed r", 0.88, 0.2)]
    sweep = pd.DataFrame(rows, columns=["method", "score", "macs_ratio"])
    sweep = sweep.assign(score_low=sweep.score, score_high=sweep.score, tokens_ratio=0.5, bytes_ratio=0.5)
    fig = images.draw_tradeoffs(sweep, "top-1", "ten photos")
    assert fig.get_suptitle() == (
        "ten photos, within 1 point:\none threshold takes 0.60 of the MACs and 0.50 of the bytes at least, "
        "fixed r takes 1.00 of the MACs and 1.00 of the bytes at least"
    )
    assert len(fig.axes) == 3


def test_draw_similarity_has_the_layers_median(ax):
    rows = [(layer, q, 0.5 + layer / 10 + q / 100) for layer in (0, 1) for q in (0.05, 0.25, 0.5, 0.75, 0.95)]
    images.draw_similarity(ax, pd.DataFrame(rows, columns=["layer", "quantile", "similarity"]))
    assert ax.lines[0].get_ydata().tolist() == pytest.approx([0.505, 0.605])
    assert len(ax.collections) == 2


def test_draw_chosen_groups_methods_and_says_what_they_lose(axes):
    rows = [(method, cost, value, value - 0.1, value + 0.1, 0.004, 0.003)
            for cost in ("macs_ratio", "bytes_ratio")
            for method, value in (("ToMe", 0.5), ("threshold", 0.4), ("fixed r", 1.0))]  # fmt: skip
    columns = ["method", "cost", "value", "low", "high", "score_drop", "drop_ci95"]
    chosen = pd.DataFrame(rows, columns=columns)
    images.draw_chosen(axes[:2], chosen.assign(merged=chosen.value < 1), images.GROUPS)
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["threshold", "ToMe", "fixed r"]
    assert [line.get_xdata()[0] for line in axes[0].lines[1::2]] == [0.4, 0.5, 1.0]
    assert [text.get_text() for text in axes[0].texts[:3]] == ["0.4 ± 0.3", "0.4 ± 0.3", "not within"]


def test_draw_gains_has_a_point_per_rival(ax):
    gains = pd.DataFrame({
        "method": ["threshold"] * 2, "cost": ["macs_ratio"] * 2, "against": ["same counts", "window pooling"],
        "gain": [0.01, -0.02], "gain_ci95": [0.005, 0.004]})  # fmt: skip
    images.draw_gains(ax, gains)
    assert [container.lines[0].get_xdata().tolist() for container in ax.containers] == [[1.0], [-2.0]]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["threshold, fewest MACs"]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "against same counts: interval above 0 at 1, below at 0 of 1",
        "against window pooling: interval above 0 at 0, below at 1 of 1",
    ]


def test_draw_budgets_runs_over_the_costs(ax):
    budgets = pd.DataFrame({
        "method": ["threshold", "threshold", "confidence threshold"], "macs_ratio": [0.3, 0.2, 0.25],
        "gain": [0.001, -0.02, 0.01], "gain_ci95": [0.005, 0.004, 0.003]})  # fmt: skip
    images.draw_budgets(ax, budgets)
    assert [container.lines[0].get_xdata().tolist() for container in ax.containers] == [[0.2, 0.3], [0.25]]
    assert [container.lines[0].get_ydata().tolist() for container in ax.containers] == [[-2.0, 0.1], [1.0]]
    assert [text.get_text() for text in ax.get_legend().texts] == ["threshold", "confidence threshold"]
