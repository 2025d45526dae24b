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


COLUMNS = ["kl", "macs_ratio", "bytes_ratio"]


def test_draw_front_shows_three_projections_with_the_grids():
    trials = pd.DataFrame([[0.05, 0.5, 0.3], [0.02, 0.7, 0.6], [0.09, 0.9, 0.8]], columns=COLUMNS)
    grids = pd.DataFrame([[0.03, 0.8, 0.7], [0.06, 0.6, 0.5]], columns=COLUMNS).assign(method="uniform")
    fig, axes = plt.subplots(1, 3)
    plots.draw_front(axes, trials, trials[:2], grids, "kl", worst=0.1)
    tried, front = axes[1].collections
    assert tried.get_offsets().tolist() == trials[["bytes_ratio", "kl"]].to_numpy().tolist()
    assert front.get_offsets().tolist() == trials[["bytes_ratio", "kl"]][:2].to_numpy().tolist()
    assert axes[0].lines[0].get_xdata().tolist() == [0.6, 0.8], "a grid is joined in order of MACs"
    assert axes[0].get_ylim() == (0, 0.1)
    assert [text.get_text() for text in axes[0].get_legend().get_texts()] == ["trials", "one threshold", "Pareto front"]
    plt.close(fig)


def test_draw_profile_has_a_line_per_point():
    fig, ax = plt.subplots()
    plots.draw_profile(ax, pd.DataFrame({"label": ["a", "b"], "thresholds": [[0.9, 0.8, 1.0], [0.7, -1.0, 0.5]]}))
    bottom = pytest.approx(0.4)
    lines = [list(line.get_ydata()) for line in ax.lines]
    assert lines == [[0.9, 0.8, 1.0], [], [0.7, bottom, 0.5], [bottom]], "where all merges, a mark below the others"
    assert list(ax.lines[3].get_xdata()) == [1]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]
    plt.close(fig)


def test_draw_hypervolume_shows_what_is_missing_to_the_median_over_seeds():
    traces = pd.DataFrame(
        [("ax", seed, n, 0.1 * seed + 0.2 * n) for seed in (0, 1, 2) for n in (1, 2)] + [("sobol", 0, 1, 0.4)],
        columns=["method", "seed", "evaluation", "fraction"],
    )
    fig, ax = plt.subplots()
    plots.draw_hypervolume(ax, traces)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["sobol", "ax"]
    np.testing.assert_allclose(ax.lines[1].get_ydata(), [70, 50])
    plt.close(fig)


def test_draw_methods_has_a_colour_per_method_and_the_limit():
    points = pd.DataFrame(
        [
            ("threshold", "ours", True, 0.001, 0.002, 0.4),
            ("threshold", "ours", True, 0.004, 0.002, 0.3),
            ("DyMU", "peer", False, 0.01, 0.003, 0.5),
        ],
        columns=["method", "kind", "searched", "top1_drop", "top1_drop_sem", "macs_ratio"],
    )
    fig, ax = plt.subplots()
    plots.draw_methods(ax, points, "macs_ratio")
    ours, other = (container.lines[0] for container in ax.containers)
    np.testing.assert_allclose(ours.get_xydata(), [[0.4, 0.1], [0.3, 0.4]])
    assert (ours.get_marker(), other.get_marker()) == ("o", "s")
    assert tuple(ours.get_color()) != tuple(other.get_color())
    assert ax.lines[-1].get_ydata()[0] == 0.5
    plt.close(fig)


def test_a_link_figure_has_a_line_and_a_band_per_family():
    rows = [(snr, family, 0.5, 0.1) for family in ("unmerged", "adaptive") for snr in (5.0, -5.0)]
    table = pd.DataFrame(rows, columns=["snr_db", "family", "top1", "top1_half"])
    _, ax = plt.subplots()
    plots.draw_link(ax, table)
    assert [line.get_label() for line in ax.lines] == ["unmerged", "adaptive"]
    assert list(ax.lines[0].get_xdata()) == [-5.0, 5.0]
    assert len(ax.collections) == 2
    plots.draw_link(ax, table, ["adaptive"])
    assert len(ax.lines) == 3
    plt.close("all")


def test_a_trace_figure_tells_policies_from_fixed_choices():
    table = pd.DataFrame(
        {
            "kind": ["policy", "fixed", "fixed"],
            "choice": ["adaptive", "a", "b"],
            "top1": 0.9,
            "latency_s": [0.1, 0.2, 0.3],
        }
    )
    _, ax = plt.subplots()
    plots.draw_trace(ax, table)
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["fixed choices", "adaptive"]
    assert len(ax.collections[0].get_offsets()) == 2
    plt.close("all")


def test_painted_merge_map_by_hand():
    image = np.array([[0.0, 0.5], [1.0, 0.25]])
    groups = np.array([[0, 0], [1, 2]])
    picture = plots.paint_merge_map(image, groups, cell=3)
    assert picture.shape == (6, 6, 3)
    assert picture.dtype == np.uint8
    tint = plots.tints(groups)
    assert (tint[1] == 0).all(), "patches on their own have no tint"
    expected = 0.5 * (1 - tint[0, 1, 3]) + tint[0, 1, :3] * tint[0, 1, 3]
    assert np.array_equal(picture[1, 4], (expected * 255).round().astype(np.uint8))
    assert (picture[3] == 255).all(), "a border above the second row"
    assert (picture[4, 3] == 255).all()
    assert (picture[4, 4] == 64).all()
    assert not (picture[0:3, 3] == 255).all(), "none inside a group"
