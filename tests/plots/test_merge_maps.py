import numpy as np
import pandas as pd
import pytest
from tokmerge.plots.merge_maps import draw_depths, draw_ends, draw_merge_map, merge_map, paint_merge_map, tints


def test_merge_map_drops_the_protected_tokens():
    assert merge_map(np.array([0, 1, 2, 2, 1]), protected=1).tolist() == [[1, 2], [2, 1]]
    with pytest.raises(ValueError, match="3 patches"):
        merge_map(np.arange(4), protected=1)


def test_draw_merge_map_separates_groups_and_tints_the_merged_ones(ax):
    draw_merge_map(ax, np.zeros((4, 4)), np.array([[1, 1], [1, 2]]))
    image, tint = ax.images
    assert image.get_extent() == [0, 2, 2, 0]
    assert (tint.get_array()[..., 3] > 0).tolist() == [[True, True], [True, False]]
    segments = sum(len(collection.get_segments()) for collection in ax.collections)
    assert segments == 2  # one border above the odd patch, one to its left


def saved(n, **columns):
    row = {"height": 2, "width": 2, "source": [0, 1, 2, 2, 1], "protected": 1, "tokens": 3}
    return pd.DataFrame([row] * n).assign(**columns)


def test_saved_maps_stand_where_their_image_and_depth_say():
    pixels = [[value] * 4 for value in (0, 51, 102, 255)]
    table = saved(4, id=["b", "b", "a", "a"], blocks=[4, 0, 0, 4], pixels=pixels, **{"class": list("yyxx")})
    fig = draw_depths(table)
    shown = [[float(ax.images[0].get_array()[0, 0]) for ax in row] for row in np.reshape(fig.axes, (2, 2))]
    assert shown == [[0.2, 0.0], [0.4, 1.0]]
    assert [ax.texts[0].get_text() for ax in fig.axes[:2]] == ["input", "after block 4"]
    assert [fig.axes[place].get_ylabel() for place in (0, 2)] == ["y", "x"]


def test_ends_have_a_row_each():
    ends = ["easiest"] * 4 + ["hardest"] * 4
    fig = draw_ends(saved(8, end=ends, pixels=[[0] * 4] * 8, **{"class": list("abcdefgh")}), 1000)
    titles = [ax.get_title(loc="left") + ax.get_title() for ax in fig.axes]
    assert titles == [f"{name}, 3 tokens" for name in "abcdefgh"]
    assert [fig.axes[place].get_ylabel() for place in (0, 4)] == ["easiest of 1,000", "hardest of 1,000"]


def test_painted_merge_map_by_hand():
    groups = np.array([[0, 0], [1, 2]])
    picture, tint = paint_merge_map(np.array([[0.0, 0.5], [1.0, 0.25]]), groups, cell=3), tints(groups)
    assert (picture.shape, picture.dtype) == ((6, 6, 3), np.uint8)
    assert (tint[1] == 0).all(), "patches on their own have no tint"
    expected = 0.5 * (1 - tint[0, 1, 3]) + tint[0, 1, :3] * tint[0, 1, 3]
    assert np.array_equal(picture[1, 4], (expected * 255).round().astype(np.uint8))
    assert (picture[3] == 255).all(), "a border above the second row"
    assert (picture[4, 3] == 255).all()
    assert (picture[4, 4] == 64).all()
    assert not (picture[0:3, 3] == 255).all(), "none inside a group"
