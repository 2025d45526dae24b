import numpy as np
import pandas as pd
import pytest
from members import LABELS, file, measured_link, member
from tokmerge.channel.comparison import cliff_gain_db, contest, hits
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


def test_every_family_shows_its_best_and_choices_are_made_on_select_images():
    fooled = Member("a", "good on select", "file", file(100), file(100, right=10), "whole")
    honest = member("a", "honest", 100, right=39)
    others = [member("b", "long", 2000), member("b", "short", 150, right=20)]
    table = contest([fooled, honest, *others], LINK, [0.0, 20.0], Slot(4000), LABELS, LABELS, draws=2, base="b")
    assert table[["snr_db", "family"]].values.tolist() == [[0, "a"], [0, "b"], [20, "a"], [20, "b"]]
    assert table.member.tolist() == ["good on select", "short", "good on select", "long"]
    assert table.score.tolist() == pytest.approx([0.25, 0.5, 0.25, 1.0])
    assert table.select_score.tolist() == pytest.approx([1.0, 0.5, 1.0, 1.0]), "what it was chosen by, not what it does"
    assert table.gain.tolist() == pytest.approx([-0.25, 0, -0.75, 0])
    assert table.gain_half[1] == 0
    assert table.gain_half[0] > 0


def sweep(**curves):
    """A table of curves over 0, 5 and 10 dB, of 200 images, that share of which is right."""
    return pd.DataFrame([(snr, family, (np.arange(200) < 200 * share).astype(float))
                         for family, shares in curves.items() for snr, share in zip((0, 5, 10), shares, strict=True)],
                        columns=["snr_db", "family", "right"])  # fmt: skip


def test_gain_is_read_off_where_the_base_falls_off_its_cliff():
    table = sweep(unmerged=(0.1, 0.4, 0.71), x=(0.2, 0.6, 0.8), y=(0.0, 0.0, 0.6), z=(0.8, 0.8, 0.8))
    gain = cliff_gain_db(table, "x")
    # 0.7: the unmerged at 5 + 5 * 0.3 / 0.31 dB, x in the middle between 5 and 10.
    assert gain.db == pytest.approx(5 + 5 * 0.3 / 0.31 - 7.5)
    assert gain.low < gain.db < gain.high
    assert not gain.bounded
    assert cliff_gain_db(table, "x", over="x", draws=50) == (0, 0, 0, False)
    assert cliff_gain_db(table, "y", draws=2)[::3] == (pytest.approx(5 * 0.3 / 0.31 - 5), True), "never there"
    assert cliff_gain_db(table, "z", draws=2)[::3] == (pytest.approx(5 + 5 * 0.3 / 0.31), True), "there at once"


def test_the_interval_of_a_gain_holds_what_repetition_gives():
    rng, found = np.random.default_rng(0), []
    for _ in range(60):
        draw = {name: [rng.random(300) < share for share in shares]
                for name, shares in {"unmerged": (0.2, 0.5, 0.9), "x": (0.5, 0.93, 0.95)}.items()}  # fmt: skip
        rows = [{"snr_db": snr, "family": name, "right": right} for name, rights in draw.items()
                for snr, right in zip((0, 5, 10), rights, strict=True)]  # fmt: skip
        found.append(cliff_gain_db(pd.DataFrame(rows), "x", draws=100))
    true = (5 + 5 * 0.39 / 0.4) - 5 * 0.39 / 0.43
    covered = np.mean([gain.low <= true <= gain.high for gain in found])
    assert covered > 0.85
