import matplotlib as mpl
import numpy as np
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
