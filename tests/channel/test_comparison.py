import numpy as np
import pandas as pd
import pytest
from members import LABELS, file, measured_link, member
from tokmerge.channel.comparison import contest, gain_db, hits, interval
from tokmerge.channel.phy import LADDER
from tokmerge.channel.schemes import Member, Slot

LINK = measured_link()


def test_whole_payloads_arrive_or_do_not():
    # 300 bytes in 2000 uses: 16-QAM 1/2 would do at half the slot; the most robust that fits is QPSK 3/4.
    one, last = file(300), len(LADDER) - 1
    assert hits(one, LABELS, LINK, 12.0, 2000, last, 2, 0).mean() == 1
    assert hits(one, LABELS, LINK, -3.0, 2000, last, 2, 0).mean() == 0
    assert hits(one, LABELS, LINK, 12.0, 200, last, 2, 0).mean() == 0, "no scheme carries it"


def test_losses_of_files_are_as_many_as_their_blocks_say():
    scheme = 4
    snr = float(np.interp(-0.2, -LINK.rates.rates[scheme], LINK.rates.snr_db[scheme]))
    one, blocks = file(150), LADDER[scheme].blocks(150)
    got = hits(one, LABELS, LINK, snr, blocks * LADDER[scheme].uses, 11, 40, 0).mean()
    assert got == pytest.approx((1 - float(LINK.rates.probability(scheme, snr))) ** blocks, abs=0.05)


def test_every_family_shows_its_best_and_choices_are_made_on_search_images():
    fooled = Member("a", "good on search", "file", file(100), file(100, right=10), "whole")
    honest = member("a", "honest", 100, right=39)
    others = [member("b", "long", 2000), member("b", "short", 150, right=20)]
    table = contest([fooled, honest, *others], LINK, [0.0, 20.0], Slot(4000), LABELS, LABELS, draws=2, base="b")
    assert table[["snr_db", "family"]].values.tolist() == [[0, "a"], [0, "b"], [20, "a"], [20, "b"]]
    assert table.member.tolist() == ["good on search", "short", "good on search", "long"]
    assert table.top1.tolist() == pytest.approx([0.25, 0.5, 0.25, 1.0])
    assert table.gain.tolist() == pytest.approx([-0.25, 0, -0.75, 0])
    assert table.gain_half[1] == 0
    assert table.gain_half[0] > 0


def test_gain_is_read_off_the_curves():
    table = pd.DataFrame({"snr_db": [0, 5, 10] * 2, "family": ["x"] * 3 + ["y"] * 3,
                          "top1": [0.2, 0.6, 0.8, 0.1, 0.4, 0.7]})  # fmt: skip
    assert gain_db(table, "x", "y", 10) == (pytest.approx(2.5), False)
    assert gain_db(table, "y", "y", 5) == (pytest.approx(0.0), False)
    assert gain_db(table, "y", "x", 10) == (0.0, True)
    table.loc[table.family == "x", "top1"] += 0.6
    assert gain_db(table, "x", "y", 10) == (10.0, True)


def test_interval_is_the_textbook_one():
    mean, half = interval(np.array([0.0, 1.0, 1.0, 0.0]))
    assert (mean, half) == (0.5, pytest.approx(1.96 * (1 / 3) ** 0.5 / 2))
