import numpy as np
import pandas as pd
import pytest
from tokmerge.plots.privacy import defence_style, draw_convergence, draw_leakage, draw_reconstructions, draw_worst


def rows(defences, metrics=("bytes", "ssim"), images=("all",)):
    values = enumerate(defences, 1)
    named = [(i, d, m, w) for i, d in values for m in metrics for w in images]
    table = pd.DataFrame(named, columns=["value", "defence", "metric", "images"])
    return table.assign(low=table.value - 0.5, high=table.value + 1.0)


def test_every_defence_belongs_to_one_family():
    assert defence_style("merged to 4.1%")[0] == "o"
    assert defence_style("cut off")[0] == "x"
    with pytest.raises(ValueError, match="'magic' is of no known family"):
        defence_style("magic")


def test_reconstructions_have_a_row_per_defence_and_a_column_per_image():
    rows = [("original", 0), ("original", 1), ("merged", 1), ("merged", 0)]
    pixels = [np.full(12, 10 * i, np.uint8) for i in range(4)]
    table = pd.DataFrame(rows, columns=["defence", "image"]).assign(shape=[[3, 2, 2]] * 4, pixels=pixels)
    fig = draw_reconstructions(table, ["original", "merged"], {"merged": "9 bytes"})
    shown = [[ax.images[0].get_array()[0, 0, 0] for ax in row] for row in np.reshape(fig.axes, (2, 2))]
    assert shown == [[0, 10], [30, 20]]
    assert fig.axes[2].get_ylabel() == "merged\n9 bytes"


def test_grey_reconstructions_are_shown_as_grey():
    table = pd.DataFrame([{"defence": "merged", "image": 0, "shape": [1, 2, 2], "pixels": [0, 85, 170, 255]}])
    fig = draw_reconstructions(table, ["merged"])
    assert fig.axes[0].images[0].get_array().tolist()[0] == [[0, 0, 0], [85, 85, 85]]


def test_leakage_shows_intervals_and_numbers_the_defences(ax):
    draw_leakage(ax, rows(["same counts", "merged to 4%", "merged"]), "bytes", "ssim")
    assert [container.get_label() for container in ax.containers] == ["1  merged", "2  merged to 4%", "3  same counts"]
    assert [text.get_text() for text in ax.texts] == ["1", "2", "3"]
    line, _, bars = ax.containers[0]
    assert line.get_xydata().tolist() == [[3.0, 3.0]]
    assert sorted(point for bar in bars for point in bar.get_segments()[0][:, 0].tolist()) == [2.5, 3.0, 3.0, 4.0]
    assert ax.get_xscale() == "log"


def test_the_worst_stand_beside_all_in_the_order_given(ax):
    table = rows(["same counts", "merged"], images=("all", "worst"))
    draw_worst(ax, table, "ssim", ["merged", "same counts"])
    every, worst = [container for container in ax.containers if hasattr(container, "patches")]
    assert [bar.get_height() for bar in every.patches] == [2.0, 1.0]
    assert every.get_label() == "all images"
    assert worst.patches[0].get_x() > every.patches[0].get_x()


def test_convergence_has_a_style_per_attacker_and_a_colour_per_defence(ax):
    rows = [("map", 1, 0.5), ("map", 2, 0.4), ("grid", 1, 0.6), ("gradient", 1, 9.0)]
    draw_convergence(ax, pd.DataFrame(rows, columns=["attacker", "step", "loss"]).assign(defence="merged"))
    solid, dashed = ax.lines
    assert (solid.get_linestyle(), dashed.get_linestyle()) == ("-", "--")
    assert tuple(solid.get_color()) == tuple(dashed.get_color())
    assert solid.get_ydata().tolist() == [0.5, 0.4]
