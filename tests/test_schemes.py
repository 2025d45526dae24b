"""Schemes against each other, with members whose answers are known beforehand."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import build
from PIL import Image
from tokmerge import codecs, data
from tokmerge.channel import LADDER, Channel
from tokmerge.delivery import Air
from tokmerge.link import shipped
from tokmerge.schemes import Member, Slot, Whole, caps, contest, files, gain_db, hits, interval

LABELS = torch.arange(40) % 4


@pytest.fixture(scope="module")
def air():
    return Air(Channel(), shipped())


def file(n_bytes, right=40):
    """Payloads of which the first ``right`` are answered rightly, if they arrive; class 9 is never right."""
    answers = torch.where(torch.arange(40) < right, LABELS, 9)
    return Whole(torch.full((40,), n_bytes), answers, 9, torch.full((40,), 10**7), torch.full((40,), 3 * 10**7))


def member(family, name, n_bytes, right=40, sending="whole"):
    return Member(family, name, "file", file(n_bytes, right), file(n_bytes, right), sending)


def test_whole_payloads_arrive_or_do_not(air):
    # 300 bytes in 2000 uses: 16-QAM 1/2 would do at half the slot; the most robust that fits is QPSK 3/4.
    one, last = file(300), len(LADDER) - 1
    assert hits(one, LABELS, air, 12.0, 2000, last, 2, 0).mean() == 1
    assert hits(one, LABELS, air, -3.0, 2000, last, 2, 0).mean() == 0
    assert hits(one, LABELS, air, 12.0, 200, last, 2, 0).mean() == 0, "no scheme carries it"
    scheme = next(s for s in LADDER if s.blocks(300) * s.uses <= 2000)
    assert torch.equal(one.taken(air, 2000, last), torch.full((40,), scheme.blocks(300) * scheme.uses))


def test_losses_of_files_are_as_many_as_their_blocks_say(air):
    scheme = 4
    snr = float(np.interp(-0.2, -air.rates.rates[scheme], air.rates.snr_db[scheme]))
    one, blocks = file(150), LADDER[scheme].blocks(150)
    got = hits(one, LABELS, air, snr, blocks * LADDER[scheme].uses, 11, 40, 0).mean()
    assert got == pytest.approx((1 - float(air.rates.probability(scheme, snr))) ** blocks, abs=0.05)


def test_every_family_shows_its_best_and_choices_are_made_on_search_images(air):
    fooled = Member("a", "good on search", "file", file(100), file(100, right=10), "whole")
    honest = Member("a", "honest", "file", file(100, right=39), file(100, right=39), "whole")
    others = [member("b", "long", 2000), member("b", "short", 150, right=20)]
    table = contest([fooled, honest, *others], air, [0.0, 20.0], Slot(4000), LABELS, LABELS, draws=2, base="b")
    assert table[["snr_db", "family"]].values.tolist() == [[0, "a"], [0, "b"], [20, "a"], [20, "b"]]
    assert table.member.tolist() == ["good on search", "short", "good on search", "long"]
    assert table.top1.tolist() == pytest.approx([0.25, 0.5, 0.25, 1.0])
    assert table.gain.tolist() == pytest.approx([-0.25, 0, -0.75, 0])
    assert table.gain_half[1] == 0
    assert table.gain_half[0] > 0


def test_caps_are_the_fastest_that_get_through(air):
    assert caps(air, 2.5, 2) == [3, 4]
    assert caps(air, 60.0, 3) == [9, 10, 11]
    assert caps(air, -40.0, 2) == [0]
    assert member("a", "a", 1).caps(air, 2.5, 2) == [11]


def test_at_a_deadline_computing_takes_time_from_the_channel():
    one = file(100)
    slot = Slot(deadline_s=0.1, symbols_per_s=1e5, edge_macs_per_s=2e8, server_macs_per_s=2e9)
    assert slot.computing_s(one).tolist() == pytest.approx([0.05 + 0.01] * 40)
    assert slot.of(one).tolist() == [4000] * 40 or slot.of(one).tolist() == [3999] * 40
    assert Slot(123).of(one) == 123


def test_gain_is_read_off_the_curves():
    rows = [
        (s, f, t)
        for f, ts in (("x", (0.2, 0.6, 0.8)), ("y", (0.1, 0.4, 0.7)))
        for s, t in zip((0, 5, 10), ts, strict=True)
    ]
    table = pd.DataFrame(rows, columns=["snr_db", "family", "top1"])
    assert gain_db(table, "x", "y", 10) == (pytest.approx(2.5), False)
    assert gain_db(table, "y", "y", 5) == (pytest.approx(0.0), False)
    assert gain_db(table, "y", "x", 10) == (0.0, True)
    table.loc[table.family == "x", "top1"] += 0.6
    assert gain_db(table, "x", "y", 10) == (10.0, True)


def test_interval_is_the_textbook_one():
    mean, half = interval(np.array([0.0, 1.0, 1.0, 0.0]))
    assert (mean, half) == (0.5, pytest.approx(1.96 * (1 / 3) ** 0.5 / 2))


def test_files_are_classified_as_the_server_sees_them():
    model = build()
    model.pretrained_cfg = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0,
                            "interpolation": "bicubic"}  # fmt: skip
    photos = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)) for i in range(3)]
    examples = [data.Example(str(i), photo, i) for i, photo in enumerate(photos)]
    images = data.ImageSet("noise", "test", tuple("abc"), list("012"), np.arange(3), lambda start: iter(examples))
    for format in ("jpeg", "webp"):
        got = files(model, images, format, 30)
        for i, photo in enumerate(photos):
            payload = codecs.compress(photo, format, 30)
            assert got.n_bytes[i] == (codecs.scan_bytes(payload) if format == "jpeg" else len(payload))
            seen = torch.from_numpy(np.array(codecs.decompress(payload))).permute(2, 0, 1)[None].float() / 127.5 - 1
            assert got.answers[i] == model(seen).argmax()
        assert not got.edge_macs.any()
        assert (got.macs > 0).all()
