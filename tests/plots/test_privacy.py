import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from tokmerge.plots.privacy import defence_style, draw_convergence, draw_leakage, draw_reconstructions, draw_worst

mpl.use("Agg")
import matplotlib.pyplot as plt


def rows(defences, metrics=("bytes", "ssim"), images=("all",)):
    return pd.DataFrame(
        [
            {"defence": d, "metric": m, "images": w, "value": 1.0 + i, "low": 0.5 + i, "high": 2.0 + i}
            for i, d in enumerate(defences)
            for m in metrics
            for w in images
        ]
    )


def test_every_defence_belongs_to_one_family():
    assert defence_style("merged to 4.1%")[0] == "o"
    assert defence_style("unmerged, -10 dB")[0] == "x"
    with pytest.raises(ValueError, match="'magic' is of no known family"):
        defence_style("magic")


def test_reconstructions_have_a_row_per_defence_and_a_column_per_image():
    pixels = [np.full(12, 10 * i, np.uint8) for i in range(4)]
    table = pd.DataFrame(
        [("original", 0, [3, 2, 2]), ("original", 1, [3, 2, 2]), ("merged", 1, [3, 2, 2]), ("merged", 0, [3, 2, 2])],
        columns=["defence", "image", "shape"],
    ).assign(pixels=pixels)
    fig = draw_reconstructions(table, ["original", "merged"], {"merged": "9 bytes"})
    shown = [[ax.images[0].get_array()[0, 0, 0] for ax in row] for row in np.reshape(fig.axes, (2, 2))]
    assert shown == [[0, 10], [30, 20]]
    assert fig.axes[2].get_ylabel() == "merged\n9 bytes"
    plt.close(fig)


def test_grey_reconstructions_are_shown_as_grey():
    table = pd.DataFrame([{"defence": "merged", "image": 0, "shape": [1, 2, 2], "pixels": [0, 85, 170, 255]}])
    fig = draw_reconstructions(table, ["merged"])
    assert fig.axes[0].images[0].get_array().tolist()[0] == [[0, 0, 0], [85, 85, 85]]
    plt.close(fig)


def test_leakage_shows_intervals_and_numbers_the_defences():
    fig, ax = plt.subplots()
    draw_leakage(ax, rows(["merged", "merged to 4%", "ToMe"]), "bytes", "ssim")
    assert [container.get_label() for container in ax.containers] == ["1  ToMe", "2  merged", "3  merged to 4%"]
    assert [text.get_text() for text in ax.texts] == ["1", "2", "3"]
    line, _, bars = ax.containers[0]
    assert line.get_xydata().tolist() == [[3.0, 3.0]]
    assert sorted(point for bar in bars for point in bar.get_segments()[0][:, 0].tolist()) == [2.5, 3.0, 3.0, 4.0]
    assert ax.get_xscale() == "log"
    plt.close(fig)


def test_the_worst_stand_beside_all_in_the_order_given():
    fig, ax = plt.subplots()
    table = rows(["ToMe", "merged"], images=("all", "worst"))
    draw_worst(ax, table, "ssim", ["merged", "ToMe"])
    every, worst = [container for container in ax.containers if hasattr(container, "patches")]
    assert [bar.get_height() for bar in every.patches] == [2.0, 1.0]
    assert every.get_label() == "all images"
    assert worst.patches[0].get_x() > every.patches[0].get_x()
    plt.close(fig)


def test_convergence_has_a_style_per_attacker_and_a_colour_per_defence():
    curves = pd.DataFrame(
        [
            ("map", "merged", 1, 0.5),
            ("map", "merged", 2, 0.4),
            ("grid", "merged", 1, 0.6),
            ("gradient", "merged", 1, 9.0),
        ],
        columns=["attacker", "defence", "step", "loss"],
    )
    fig, ax = plt.subplots()
    draw_convergence(ax, curves)
    solid, dashed = ax.lines
    assert (solid.get_linestyle(), dashed.get_linestyle()) == ("-", "--")
    assert tuple(solid.get_color()) == tuple(dashed.get_color())
    assert solid.get_ydata().tolist() == [0.5, 0.4]
    plt.close(fig)
