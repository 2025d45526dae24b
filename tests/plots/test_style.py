import matplotlib.pyplot as plt
import pytest
from tokmerge.plots.style import legend_outside, save_figure, shades, shared_legend, style


def test_saved_figures_are_the_same_bytes_at_every_run(tmp_path):
    style()
    for run in ("a", "b"):
        fig, ax = plt.subplots()
        ax.plot([0, 1], [0, 1], label="x")
        ax.set_title("ten numbers of a data set")
        legend_outside(ax)
        shared_legend(fig.axes, columns=1)
        save_figure(fig, tmp_path / run, "data set")
    for suffix in (".svg", ".png"):
        first, second = ((tmp_path / f"{run}{suffix}").read_bytes() for run in ("a", "b"))
        assert first == second
        assert len(first) > 1000


def test_figures_name_their_data_and_keep_legends_off_it(tmp_path):
    fig, ax = plt.subplots()
    ax.plot([0, 1], [0, 1], label="x")
    with pytest.raises(ValueError, match="figure one does not say that it shows Fashion-MNIST"):
        save_figure(fig, tmp_path / "one", "Fashion-MNIST")
    fig.suptitle("Fashion-MNIST")
    ax.legend()
    with pytest.raises(ValueError, match="figure one has a legend on its axes"):
        save_figure(fig, tmp_path / "one", "Fashion-MNIST")
    assert not list(tmp_path.iterdir())


def test_a_name_keeps_its_shade_and_the_palette_begins_again():
    colors = shades(["b", "a", "b", *range(20)])
    assert list(colors)[:3] == ["b", "a", 0]
    assert tuple(colors["b"]) != tuple(colors["a"])
    assert tuple(colors[18]) == tuple(colors["b"]), "the twenty-first"
