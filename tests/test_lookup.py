"""The lookup table, its file, and what following it over a trace gives."""

import json

import numpy as np
import pytest
import torch
from test_schemes import LABELS, file, member
from tokmerge.channel import LADDER, Channel
from tokmerge.delivery import Air
from tokmerge.link import shipped
from tokmerge.lookup import Choice, Lookup, compute, fading_trace, fixed, follow, load, restrict, save
from tokmerge.schemes import Slot

SPEEDS = {"symbols_per_s": 1e5, "edge_macs_per_s": 1e9, "server_macs_per_s": 1e10}


@pytest.fixture(scope="module")
def air():
    return Air(Channel(), shipped())


@pytest.fixture(scope="module")
def members():
    return [member("a", "short", 100, right=30), member("a", "long", 1500)]


@pytest.fixture(scope="module")
def table(members, air):
    slots = [Slot(uses, 0.2, **SPEEDS) for uses in (1500, 6000)]
    return compute(members, air, [-5.0, 0.0, 5.0, 15.0, 25.0], slots, LABELS)


def test_the_table_names_what_gets_most_search_images_right(table):
    # 1500 bytes need 8 bits per use in 1500 uses (never) and 2 in 6000; 100 bytes get through almost anywhere.
    named = {(one.uses, one.snr_db): table.members[one.member][0] for one in table.choices}
    assert {named[1500, snr] for snr in (-5.0, 0.0, 5.0, 15.0, 25.0)} == {"short"}
    assert (named[6000, 0.0], named[6000, 15.0]) == ("short", "long")
    assert max(one.top1 for one in table.choices) == 1.0


def test_of_equals_the_faster_one_is_named(air):
    pair = [member("a", "slow", 1500), member("a", "fast", 1500)]
    quick = file(100)
    pair[1] = pair[1].__class__("a", "fast", "file", quick, quick, "whole")
    table = compute(pair, air, [20.0], [Slot(6000, 0.2, **SPEEDS)], LABELS)
    assert table.choices[0].member == 1
    # 10 ms on the device, 2 ms on the server and the channel uses of the most robust scheme that fits.
    scheme = next(s for s in LADDER if s.blocks(100) * s.uses <= 6000)
    assert table.choices[0].latency_s == pytest.approx(0.012 + scheme.blocks(100) * scheme.uses / 1e5)


def test_picking_takes_the_cell_at_or_below(table):
    assert table.pick(4.9, 7000, 1.0).snr_db == 0.0
    assert table.pick(99.0, 5999, 0.2).uses == 1500
    assert table.pick(-99.0, 6000, 0.2).snr_db == -5.0
    with pytest.raises(ValueError, match=r"begins with 1500 uses and 0\.2 s"):
        table.pick(0.0, 1000, 0.2)


def test_a_table_survives_its_file_and_a_bad_file_is_named(table, tmp_path):
    save(table, tmp_path / "policy.json")
    assert load(tmp_path / "policy.json") == table
    content = json.loads((tmp_path / "policy.json").read_text())
    for change, message in (({"version": 9}, "version 9"), ({"choices": [{"uses": 1}]}, "not a lookup table")):
        (tmp_path / "bad.json").write_text(json.dumps(content | change))
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "bad.json")


def test_restricting_keeps_the_other_choices(table):
    short = restrict(table, {("short", "file")})
    assert short.members == (("short", "file"),)
    assert {one.member for one in short.choices} == {0}
    with pytest.raises(ValueError, match="names none of"):
        restrict(table, {("other", "file")})


def test_a_trace_fades_as_rayleigh_does():
    trace = fading_trace(20_000, 7.0, 0.05, torch.Generator().manual_seed(0))
    power = 10 ** ((trace - 7.0) / 10)
    assert power.mean() == pytest.approx(1.0, abs=0.1)
    assert (power < 0.1).mean() == pytest.approx(1 - np.exp(-0.1), abs=0.03)
    # Clarke: the gain's correlation over n slots is J0(2 pi 0.05 n), which is first 0 at n = 7.65.
    steps = np.corrcoef(power[:-1], power[1:])[0, 1], np.corrcoef(power[:-8], power[8:])[0, 1]
    assert steps[0] > 0.9
    assert abs(steps[1]) < 0.15


def test_following_the_table_is_each_slots_own_choice(table, members, air):
    snrs = np.where(np.arange(40) % 2, 20.0, 0.0)
    slot = Slot(6000, 0.2, **SPEEDS)
    right, seconds = follow(table, members, air, snrs, snrs, slot, LABELS, "test", 0)
    assert right[1::2].all(), "the long payload where it gets through"
    assert right[::2].tolist() == [True] * 15 + [False] * 5, "the short one, which knows 30 of 40"
    assert seconds[1] != seconds[0]
    long = fixed(members[1].test, len(LADDER) - 1, air, snrs, slot, LABELS, 0)[0]
    assert long.tolist() == [bool(i % 2) for i in range(40)]
    deceived, _ = follow(table, members, air, snrs, snrs[::-1].copy(), slot, LABELS, "test", 0)
    assert deceived.sum() < right.sum()


def test_choices_are_plain():
    assert Lookup((("a", "int4"),), (Choice(1, 0.1, 0.0, 0, 0, 0.5, 0.1),)).pick(5.0, 2, 0.5).cap == 0
