import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from tokmerge import plots

mpl.use("Agg")
import matplotlib.pyplot as plt


def test_merge_map_drops_the_protected_tokens():
    source = np.array([0, 1, 2, 2, 1])
    assert plots.merge_map(source, protected=1).tolist() == [[1, 2], [2, 1]]
    with pytest.raises(ValueError, match="3 patches"):
        plots.merge_map(np.arange(4), protected=1)


def test_draw_merge_map_separates_groups_and_tints_the_merged_ones():
    fig, ax = plt.subplots()
    groups = np.array([[1, 1], [1, 2]])
    plots.draw_merge_map(ax, np.zeros((4, 4)), groups)
    image, tint = ax.images
    assert image.get_extent() == [0, 2, 2, 0]
    alpha = tint.get_array()[..., 3]
    assert (alpha > 0).tolist() == [[True, True], [True, False]]
    segments = sum(len(collection.get_segments()) for collection in ax.collections)
    assert segments == 2  # one border above the odd patch, one to its left
    plt.close(fig)


def test_saved_figures_are_the_same_bytes_at_every_run(tmp_path):
    plots.style()
    for run in ("a", "b"):
        fig, ax = plt.subplots()
        ax.plot([0, 1], [0, 1], label="x")
        ax.legend()
        plots.save(fig, tmp_path / run)
        plt.close(fig)
    for suffix in (".svg", ".png"):
        first, second = ((tmp_path / f"{run}{suffix}").read_bytes() for run in ("a", "b"))
        assert first == second
        assert len(first) > 1000


def test_draw_sweep_shows_every_method_and_the_unmerged_accuracy():
    sweep = pd.DataFrame(
        [("unmerged", 0.9, 1.0), ("threshold", 0.8, 0.3), ("threshold", 0.85, 0.6), ("fixed r", 0.7, 0.2)],
        columns=["method", "top1", "macs_ratio"],
    )
    sweep = sweep.assign(top1_low=sweep.top1 - 0.01, top1_high=sweep.top1 + 0.02)
    fig, ax = plt.subplots()
    plots.draw_sweep(ax, sweep, "macs_ratio")
    (threshold, _, (bars,)), (fixed, _, _) = ax.containers
    assert threshold.get_xydata().tolist() == [[0.3, 80.0], [0.6, 85.0]]
    assert fixed.get_xydata().tolist() == [[0.2, 70.0]]
    assert bars.get_segments()[0][:, 1].tolist() == pytest.approx([79.0, 82.0])
    assert ax.get_xlabel() == "MACs, merged / unmerged"
    assert 90.0 in [line.get_ydata()[0] for line in ax.lines]
    plt.close(fig)


def test_draw_similarity_has_the_layers_median():
    rows = [(layer, q, 0.5 + layer / 10 + q / 100) for layer in (0, 1) for q in (0.05, 0.25, 0.5, 0.75, 0.95)]
    fig, ax = plt.subplots()
    plots.draw_similarity(ax, pd.DataFrame(rows, columns=["layer", "quantile", "similarity"]))
    assert ax.lines[0].get_ydata().tolist() == pytest.approx([0.505, 0.605])
    assert len(ax.collections) == 2
    plt.close(fig)
