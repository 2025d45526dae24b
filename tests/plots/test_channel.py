import pandas as pd
from tokmerge.plots.channel import draw_channel, draw_link, draw_sweeps, draw_trace

LINK = pd.DataFrame(
    [(snr, family, 0.5, 0.1) for family in ("unmerged", "adaptive") for snr in (5.0, -5.0)],
    columns=["snr_db", "family", "score", "score_half"],
)


def test_a_link_figure_has_a_line_and_a_band_per_family(ax):
    draw_link(ax, LINK)
    assert [line.get_label() for line in ax.lines] == ["unmerged", "adaptive"]
    assert list(ax.lines[0].get_xdata()) == [-5.0, 5.0]
    assert len(ax.collections) == 2


def test_the_titles_of_the_channel_say_what_it_gains():
    trace = pd.DataFrame({"kind": ["policy", "fixed"], "choice": ["adaptive", "a"], "score": 0.9, "latency_s": 0.1})
    gain, over = {"db": 7.25, "low": 1, "high": 9}, {"db": -1.5, "low": -2, "high": 1}
    facts = {"dataset": "photos", "n_images": 1000, "uses": 3200, "gains": {"adaptive": gain},
             "gain_over_cut_off": over, "policy_gains_pp": {"SNR known": [0.42, 0.1]}}  # fmt: skip
    left, right = (ax.get_title(loc="left") + ax.get_title() for ax in draw_channel(LINK, trace, facts).axes)
    assert left.startswith("photos, 1,000 test images, 3,200 channel uses each: adaptive\n")
    assert "+7.2 dB (+1.0 to +9.0) over unmerged,\n-1.5 dB (-2.0 to +1.0) over cut off" in left
    assert "+0.4 ± 0.1 points over the best fixed choice" in right


def test_sweeps_have_a_panel_each():
    table = pd.concat([LINK.assign(sweep="rayleigh", uses=1000), LINK.assign(sweep="latency", uses=0)])
    fig = draw_sweeps(table, "data", names_of={"latency": ("other data", "right answers")})
    assert [ax.get_title(loc="left") + ax.get_title() for ax in fig.axes] == ["Rayleigh, 1,000 uses", "other data"]
    assert [ax.get_ylabel() for ax in fig.axes] == ["top-1 (%)", "right answers (%)"]


def test_a_trace_figure_tells_policies_from_fixed_choices(ax):
    table = pd.DataFrame({"kind": ["policy", "fixed", "fixed"], "choice": ["adaptive", "a", "b"], "score": 0.9})
    draw_trace(ax, table.assign(latency_s=[0.1, 0.2, 0.3]))
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["fixed choices", "adaptive"]
    assert len(ax.collections[0].get_offsets()) == 2
