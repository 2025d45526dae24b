import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from tokmerge import imagenet_plots


def test_draw_adaptivity_compares_tenths_of_confidence():
    unmerged = pd.DataFrame({"macs": 100.0, "confidence": np.linspace(0, 1, 200), "prediction": 0})
    mine = pd.DataFrame({"macs": 60 - 40 * unmerged.confidence, "prediction": 0})
    fixed = pd.DataFrame({"macs": 40.0, "prediction": [1] * 10 + [0] * 190})
    fig, axes = plt.subplots(1, 3)
    imagenet_plots.draw_adaptivity(axes, mine, fixed, unmerged)
    expected = [(mine.macs / 100)[start : start + 20].mean() for start in range(0, 200, 20)]
    np.testing.assert_allclose(axes[1].lines[0].get_ydata(), expected)
    np.testing.assert_allclose(axes[1].lines[1].get_ydata(), [0.4] * 10)
    assert list(axes[2].lines[0].get_ydata()) == [0] * 10
    assert list(axes[2].lines[1].get_ydata()) == [50] + [0] * 9
    assert sum(bar.get_height() for bar in axes[0].patches) == 200
    plt.close(fig)


def test_draw_splits_has_a_line_per_method_and_the_smallest_good_image():
    rows = [
        (method, precision, split, 1e6 * split, 1e6 * (2 - split), scale * split + 1)
        for method, scale in (("unmerged", 100), ("ours", 10))
        for precision in ("float16", "int4")
        for split in range(3)
    ]
    splits = pd.DataFrame(
        rows, columns=["method", "precision", "split_layer", "edge_macs", "server_macs", "payload_bytes"]
    )
    sent = pd.DataFrame({"sent": ["jpeg"] * 3, "payload_bytes": [50, 80, 120], "top1_drop": [0.2, 0.004, 0.0]})
    fig, axes = plt.subplots(1, 2)
    imagenet_plots.draw_splits(axes, splits, sent)
    assert [list(line.get_ydata()) for line in axes[0].lines[:4]] == [[1, 101, 201]] * 2 + [[1, 11, 21]] * 2
    assert axes[0].lines[4].get_ydata()[0] == 80
    assert len(axes[0].lines) == 5
    np.testing.assert_allclose(axes[1].lines[1].get_ydata(), [2, 1, 0])
    plt.close(fig)
