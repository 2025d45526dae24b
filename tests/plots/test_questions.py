import pandas as pd
from tokmerge.plots.questions import draw_answered, draw_per_photo


def test_wrong_answers_stand_out(axes):
    row = {
        "pixels": [0] * 48, "height": 4, "width": 4, "source": [0, 0, 1, 2], "tokens": 3, "macs_ratio": 0.5,
        "method": "threshold", "questions": ["a?", "b?"], "answers": ["yes", "no"], "truth": ["yes", "yes"],
    }  # fmt: skip
    draw_answered(axes[:2], pd.DataFrame([row, row]))
    colors = {text.get_text(): text.get_color() for text in axes[1].texts}
    assert colors == {"yes": "0.1", "no": "#D50000"}
    assert [text.get_text() for text in axes[0].texts] == ["a?", "yes", "b?", "no"]
    assert axes[0].get_title(loc="left") + axes[0].get_title() == "threshold\n3 tokens, MACs 0.50"


def test_what_a_scene_takes_is_a_line_per_point(axes):
    table = pd.DataFrame(
        {"photos": [1, 2, 1, 2, 1, 2], "tokens": [3, 5, 7, 9, 4, 4], "macs": [1e6, 2e6, 3e6, 4e6, 5e6, 5e6],
         "method": ["threshold"] * 4 + ["one threshold"] * 2, "point": [0, 0, 1, 1, 2, 2]}
    )  # fmt: skip
    draw_per_photo(axes[:2], table)
    assert [line.get_ydata().tolist() for line in axes[0].lines] == [[3, 5], [7, 9], [4, 4]]
    assert [line.get_ydata().tolist() for line in axes[1].lines] == [[1, 2], [3, 4], [5, 5]]
    assert [line.get_linestyle() for line in axes[0].lines] == ["-", ":", "--"], "one threshold is none of ours"
    assert [text.get_text() for text in axes[1].get_legend().get_texts()] == [
        "threshold, 4 tokens", "threshold, 8 tokens", "one threshold, 4 tokens",
    ]  # fmt: skip
