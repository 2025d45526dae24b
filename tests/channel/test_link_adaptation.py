import numpy as np
import pytest
import torch
from members import LABELS, file, measured_link, member
from tokmerge.channel import link_adaptation
from tokmerge.channel.link_adaptation import compute_lookup, fading_trace, load_lookup, lookup_to_json
from tokmerge.channel.phy import LADDER
from tokmerge.channel.schemes import Slot
from tokmerge.io import store

LINK = measured_link()
SPEEDS = {"symbols_per_s": 1e5, "edge_macs_per_s": 1e9, "server_macs_per_s": 1e10}
SLOT = Slot(6000, 0.2, **SPEEDS)
SNRS = [-5.0, 0.0, 5.0, 15.0, 25.0]


@pytest.fixture(scope="module")
def table():
    members = [member("a", "short", 100, right=30), member("a", "long", 1500)]
    return compute_lookup(members, LINK, SNRS, [Slot(1500, 0.2, **SPEEDS), SLOT], LABELS)


def test_the_table_names_what_gets_most_select_images_right(table):
    # 1500 bytes need 8 bits per use in 1500 uses (never) and 2 in 6000; 100 bytes get through almost anywhere.
    named = {(one.uses, one.snr_db): table.members[one.member][0] for one in table.choices}
    assert {named[1500, snr] for snr in SNRS} == {"short"}
    assert (named[6000, 0.0], named[6000, 15.0]) == ("short", "long")
    assert max(one.score for one in table.choices) == 1.0


def test_of_equals_the_faster_one_is_named():
    pair = [member("a", "slow", 1500), member("a", "fast", 100)]
    (choice,) = compute_lookup(pair, LINK, [20.0], [SLOT], LABELS).choices
    assert choice.member == 1
    # 10 ms on the device, 2 ms on the server and the channel uses of the most robust scheme that fits.
    scheme = next(s for s in LADDER if s.blocks(100) * s.uses <= 6000)
    assert choice.latency_s == pytest.approx(0.012 + scheme.blocks(100) * scheme.uses / 1e5)


def test_picking_takes_the_cell_at_or_below(table):
    assert table.pick(4.9, 7000, 1.0).snr_db == 0.0
    assert table.pick(99.0, 5999, 0.2).uses == 1500
    assert table.pick(-99.0, 6000, 0.2).snr_db == -5.0
    with pytest.raises(ValueError, match=r"begins with 1500 uses and 0\.2 s"):
        table.pick(0.0, 1000, 0.2)


def test_a_table_survives_its_file_and_a_bad_file_is_named(table, tmp_path):
    path, content = tmp_path / "policy.json", lookup_to_json(table)
    store.save_json(content, path)
    assert load_lookup(path) == table
    for change, message in (({"version": 9}, "version 9"), ({"choices": [{"uses": 1}]}, "not a lookup table")):
        store.save_json(content | change, path)
        with pytest.raises(ValueError, match=f"policy.json.*{message}"):
            load_lookup(path)


def test_restricting_keeps_the_other_choices(table):
    short = table.restrict({("short", "file")})
    assert short.members == (("short", "file"),)
    assert {one.member for one in short.choices} == {0}
    with pytest.raises(ValueError, match="names none of"):
        table.restrict({("other", "file")})


def test_a_trace_fades_as_rayleigh_does():
    trace = fading_trace(20_000, 7.0, 0.05, torch.Generator().manual_seed(0))
    power = 10 ** ((trace - 7.0) / 10)
    assert power.mean() == pytest.approx(1.0, abs=0.1)
    assert (power < 0.1).mean() == pytest.approx(1 - np.exp(-0.1), abs=0.03)
    # Clarke: the gain's correlation over n slots is J0(2 pi 0.05 n), which is first 0 at n = 7.65.
    assert np.corrcoef(power[:-1], power[1:])[0, 1] > 0.9
    assert abs(np.corrcoef(power[:-8], power[8:])[0, 1]) < 0.15


def test_following_the_table_is_each_slots_own_choice(table):
    snrs, senders = np.where(np.arange(40) % 2, 20.0, 0.0), [file(100, right=30), file(1500)]
    right, seconds = link_adaptation.follow_trace(table, senders, LINK, snrs, snrs, SLOT, LABELS, 0)
    assert right[1::2].all(), "the long payload where it gets through"
    assert right[::2].tolist() == [True] * 15 + [False] * 5, "the short one, which knows 30 of 40"
    assert seconds[1] != seconds[0]
    long = link_adaptation.fixed_choice(senders[1], len(LADDER) - 1, LINK, snrs, SLOT, LABELS, 0)[0]
    assert long.tolist() == [bool(i % 2) for i in range(40)]
    deceived, _ = link_adaptation.follow_trace(table, senders, LINK, snrs, snrs[::-1].copy(), SLOT, LABELS, 0)
    assert deceived.sum() < right.sum()


def test_pilots_tell_the_snr_without_bias_and_the_better_the_more_they_are():
    snrs, spread = np.full(20_000, 3.0), {}
    for pilots in (2, 16):
        heard = 10 ** (link_adaptation.estimate_snr(snrs, pilots, torch.Generator().manual_seed(0)) / 10)
        assert heard.mean() == pytest.approx(10**0.3, rel=0.03)
        spread[pilots] = heard.std()
    # |h + e|^2 of an error e of variance 1 / P varies by 2 SNR / P + 1 / P^2.
    assert spread[16] == pytest.approx((2 * 10**0.3 / 16 + 1 / 256) ** 0.5, rel=0.05)
    assert spread[2] > 2 * spread[16]
