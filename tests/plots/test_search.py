import numpy as np
import pandas as pd
import pytest
from tokmerge.plots.search import draw_choices, draw_front, draw_hypervolume, draw_profile

COLUMNS = ["kl", "macs_ratio", "bytes_ratio"]


def test_draw_front_shows_three_projections_with_the_grids(axes):
    trials = pd.DataFrame([[0.05, 0.5, 0.3], [0.02, 0.7, 0.6], [0.09, 0.9, 0.8]], columns=COLUMNS)
    grids = pd.DataFrame([[0.03, 0.8, 0.7], [0.06, 0.6, 0.5]], columns=COLUMNS).assign(method="one threshold")
    draw_front(axes, trials, trials[:2], grids, "kl", worst=0.1)
    tried, front = axes[1].collections
    assert tried.get_offsets().tolist() == trials[["bytes_ratio", "kl"]].to_numpy().tolist()
    assert front.get_offsets().tolist() == trials[["bytes_ratio", "kl"]][:2].to_numpy().tolist()
    assert axes[0].lines[0].get_xdata().tolist() == [0.6, 0.8], "a grid is joined in order of MACs"
    assert axes[0].get_ylim() == (0, 0.1)
    named = [text.get_text() for text in axes[0].figure.legends[0].get_texts()]
    assert named == ["trials", "one threshold", "Pareto front"]


def test_draw_profile_has_a_line_per_point(ax):
    draw_profile(ax, pd.DataFrame({"label": ["a", "b"], "thresholds": [[0.9, 0.8, 1.0], [0.7, -1.0, 0.5]]}))
    bottom = pytest.approx(0.4)
    lines = [list(line.get_ydata()) for line in ax.lines]
    assert lines == [[0.9, 0.8, 1.0], [], [0.7, bottom, 0.5], [bottom]], "where all merges, a mark below the others"
    assert list(ax.lines[3].get_xdata()) == [1]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]


def test_draw_hypervolume_shows_what_is_missing_to_the_median_over_seeds(ax):
    traces = pd.DataFrame(
        [("ax", seed, n, 0.1 * seed + 0.2 * n) for seed in (0, 1, 2) for n in (1, 2)] + [("sobol", 0, 1, 0.4)],
        columns=["method", "seed", "evaluation", "fraction"],
    )
    draw_hypervolume(ax, traces)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["sobol", "ax"]
    np.testing.assert_allclose(ax.lines[1].get_ydata(), [70, 50])


def test_draw_choices_shows_what_was_promised_beside_what_is_kept(axes):
    rows = [(method, seed, "macs_ratio", rule, value + 0.1 * seed, drop)
            for method, value in (("sobol", 0.6), ("ax", 0.5)) for seed in (0, 1)
            for rule, drop in (("chosen", 0.004), ("promised", 0.01))]  # fmt: skip
    columns = ["method", "seed", "cost", "rule", "value", "score_drop"]
    draw_choices(axes[:2], pd.DataFrame(rows, columns=columns), 0.005)
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["ax", "sobol"]
    assert [line.get_xdata().tolist() for line in axes[1].lines[:2]] == [[0.4, 0.4], [1.0, 1.0]]
    assert axes[1].lines[2].get_xdata()[0] == 0.5
