"""The physical layer against closed forms, and 5G LDPC where it must and must not work."""

import math
import re

import numpy as np
import pytest
import torch
from members import generator
from tokmerge.channel.phy import CODED_BITS, LADDER, Channel, Mcs, block_errors, modulate, send_bytes, soft_bits

# Q(sqrt(x)), and its average over an x that is exponential (Rayleigh fading): what QPSK has at an SNR of x.
Q = {"awgn": lambda x: 0.5 * math.erfc((x / 2) ** 0.5), "rayleigh": lambda x: 0.5 * (1 - (x / (2 + x)) ** 0.5)}


def error_rate(kind, bits, snr):
    """Of Gray M-QAM: a sum of w Q(sqrt(f snr)) (Cho and Yoon, 2002, eq. 14 and 16)."""
    m, total = 2 ** (bits // 2), 0.0
    for k in range(1, bits // 2 + 1):
        for i in range(int((1 - 2.0**-k) * m)):
            sign = (-1) ** math.floor(i * 2 ** (k - 1) / m)
            weight = sign * (2 ** (k - 1) - math.floor(i * 2 ** (k - 1) / m + 0.5))
            total += 2 / (m * bits / 2) * weight * Q[kind](3 * (2 * i + 1) ** 2 / (m * m - 1) * snr)
    return total


def uncoded_errors(bits, channel, snr_db, n_blocks, symbols, generator):
    """(n_blocks,) wrong bits of so many blocks of uncoded symbols, decided symbol by symbol."""
    sent = torch.randint(0, 2, (n_blocks, symbols * bits), generator=generator)
    got = soft_bits(*channel.send(modulate(sent, bits), snr_db, generator), bits) > 0
    return (got != sent.bool()).sum(1)


@pytest.mark.parametrize(
    ("kind", "bits", "snr_db", "blocks", "symbols"),
    [
        *(("awgn", bits, snr_db, 100, 60) for bits, snr_db in ((2, 4.0), (4, 10.0), (6, 15.0), (8, 20.0))),
        *(("rayleigh", bits, snr_db, 1500, 6) for bits, snr_db in ((2, 8.0), (6, 18.0))),
    ],
)
def test_uncoded_qam_is_the_closed_form(kind, bits, snr_db, blocks, symbols):
    errors = uncoded_errors(bits, Channel(kind), snr_db, blocks, symbols, generator(bits)).double() / (symbols * bits)
    expected = error_rate(kind, bits, 10 ** (snr_db / 10))
    assert abs(float(errors.mean()) - expected) < 3.3 * float(errors.std()) / blocks**0.5
    if bits == 2:
        assert expected == pytest.approx(Q[kind](10 ** (snr_db / 10)))
    if kind == "rayleigh":
        assert expected > 3 * error_rate("awgn", bits, 10 ** (snr_db / 10)), "fading hurts"


def test_gains_have_unit_power_and_their_own_shape():
    # Variance of |h|^2: 0, 1 and (2 K + 1) / (K + 1)^2.
    for kind, variance in (("awgn", 0.0), ("rayleigh", 1.0), ("rician", 9 / 25)):
        power = Channel(kind, k_factor=4.0).gains(20_000, generator()).abs().square()
        assert float(power.mean()) == pytest.approx(1.0, abs=0.03)
        assert float(power.var()) == pytest.approx(variance, abs=0.05)
    assert not Channel().gains_db(3, 2, generator()).any()
    assert Channel("rayleigh").gains_db(3, 2, generator()).std() > 1


def test_received_noise_is_what_the_receiver_takes_it_for():
    symbols = modulate(torch.randint(0, 2, (400, 200), generator=generator()), 2)
    for channel in (Channel("rayleigh"), Channel("rician", pilots=4)):
        got, noise = channel.send(symbols, 12.0, generator(1))
        error = (got - symbols).abs().square().mean(1)
        strong = noise < 0.5  # where the estimate is near zero it says nothing
        assert float((error / noise)[strong].mean()) == pytest.approx(1.0, abs=0.1)


def test_a_pilot_estimate_costs_signal_and_uses():
    channels = [Channel("rayleigh", pilots=pilots) for pilots in (None, 1)]
    perfect, estimated = (uncoded_errors(4, channel, 15.0, 600, 10, generator()).sum() for channel in channels)
    assert estimated > 1.2 * perfect
    assert Channel(pilots=4).uses(LADDER[4]) == LADDER[4].uses + 4 == Channel().uses(LADDER[4]) + 4


@pytest.mark.parametrize("scheme", [LADDER[2], LADDER[4], LADDER[6]], ids=str)
def test_ldpc_falls_off_its_cliff_between_capacity_and_three_decibels_above(scheme):
    capacity = 10 * math.log10(2**scheme.efficiency - 1)
    assert block_errors(scheme, Channel(), capacity - 1.0, 10, generator()).all(), "no code works here"
    assert not block_errors(scheme, Channel(), capacity + 3.5, 10, generator()).any()


def test_repeating_a_block_is_three_decibels():
    once, twice = LADDER[2], LADDER[1]
    assert (twice.info_bits, twice.uses) == (once.info_bits, 2 * once.uses)
    pairs = ((once, -3.8), (twice, -6.81))
    errors = [int(block_errors(one, Channel(), snr, 20, generator(3)).sum()) for one, snr in pairs]
    assert abs(errors[0] - errors[1]) <= 10, errors
    assert block_errors(once, Channel(), -6.81, 10, generator()).all()


def test_bytes_come_through_and_lost_blocks_are_named():
    payload, scheme = np.random.default_rng(0).integers(0, 256, 200, np.uint8).tobytes(), LADDER[5]
    for channel in (Channel(), Channel("rician", k_factor=1e9, pilots=4)):
        got, errors = send_bytes(payload, scheme, channel, 12.0, generator())
        assert got == payload
        assert not errors.any()
        assert len(errors) == scheme.blocks(200) == 3
    got, errors = send_bytes(payload, scheme, Channel(), -5.0, generator())
    assert errors.all()
    assert len(got) == 200
    assert got != payload


def test_ladder_climbs_and_blocks_fill_their_symbols():
    efficiency = [scheme.efficiency for scheme in LADDER]
    assert efficiency == sorted(efficiency)
    for scheme in LADDER:
        assert CODED_BITS % scheme.bits == 0
        assert scheme.efficiency == pytest.approx(scheme.rate * scheme.bits / scheme.repeats)
    assert [str(LADDER[i]) for i in (0, 3, 9)] == ["QPSK 1/5 x4", "QPSK 1/3", "64-QAM 5/6"]
    assert str(Mcs(0.4567)) == "QPSK 0.457"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Channel("cable"), "unknown channel 'cable'"),
        (lambda: Channel("rician", k_factor=-1.0), "k_factor is -1.0"),
        (lambda: Channel(pilots=0), "pilots is 0"),
        (lambda: Mcs(0.5, 3), "3 bits per symbol: use one of 2, 4, 6, 8"),
        (lambda: Mcs(0.1), "rate 0.1"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
