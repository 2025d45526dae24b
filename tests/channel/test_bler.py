import numpy as np
import pandas as pd
import pytest
import torch
from members import generator, measured_link
from tokmerge.channel.bler import ErrorRates, measure_block_errors
from tokmerge.channel.phy import LADDER, Channel, Mcs

COLUMNS = ["rate", "bits", "repeats", "pilots", "snr_db", "blocks", "errors"]


@pytest.fixture
def table():
    rows = [(0.5, 2, 1, 0, snr, 100, errors) for snr, errors in ((0.0, 100), (1.0, 50), (2.0, 60), (3.0, 0))]
    rows += [(0.2, 2, 1, 0, snr, 100, errors) for snr, errors in ((-4.0, 100), (-3.0, 0))]
    return pd.DataFrame([*rows, (0.5, 2, 1, 4, 1.0, 100, 80)], columns=COLUMNS)


def test_rates_fall_with_the_snr_and_schemes_are_in_order(table):
    rates = ErrorRates.of(table)
    assert rates.schemes == (Mcs(0.2), Mcs(0.5))
    assert rates.probability(1, np.array([-9.0, 0.5, 1.5, 2.5, 9.0])).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert ErrorRates.of(table, pilots=4).probability(0, 1.0) == 0.8
    with pytest.raises(ValueError, match="pilots=2"):
        ErrorRates.of(table, pilots=2)


def test_drawn_errors_have_the_rate_of_their_scheme_and_snr(table):
    scheme, gains = torch.tensor([0, 1] * 500), np.zeros((1000, 6))
    gains[:, 3] = -0.5
    blocks = torch.tensor([6, 6, 5, 5] * 250)
    drawn = ErrorRates.of(table).draw(scheme, blocks, torch.full((1000,), 5), gains, 1.0, generator())
    assert drawn.shape == (1000, 6)
    assert torch.equal(drawn[:, 5], blocks == 6), "beyond the slot nothing arrives, beyond the payload nothing is lost"
    assert not drawn[::2, :5].any()
    assert float(drawn[1::2, :3].float().mean()) == pytest.approx(0.5, abs=0.05)
    assert float(drawn[1::2, 3].float().mean()) == pytest.approx(0.75, abs=0.08)


def test_measuring_finds_the_cliff_and_stops_behind_it():
    table = measure_block_errors(LADDER[4], None, [-1.0, 4.0, 5.0, 6.0], 6, 6, generator())
    assert table.errors.tolist() == [6, 0, 0]
    assert table.columns.tolist() == COLUMNS


def test_shipped_rates_are_of_the_ladder_and_near_capacity():
    for pilots in (None, 4):
        rates = measured_link(Channel(pilots=pilots)).rates
        assert rates.schemes == LADDER
        for index, scheme in enumerate(LADDER):
            capacity = 10 * np.log10(2**scheme.efficiency - 1)
            assert rates.probability(index, capacity - 0.5) > 0.5
            assert rates.rates[index][-1] < 0.01, "measured to the end of the cliff"
            # Far below 0 dB four pilots say little about the channel.
            assert (pilots and index < 5) or rates.probability(index, capacity + 5.0) < (0.05 if pilots else 1e-3)
    perfect, estimated = (measured_link(Channel(pilots=pilots)).rates for pilots in (None, 4))
    at = [float(np.interp(-0.5, -one.rates[4], one.snr_db[4])) for one in (perfect, estimated)]
    assert at[1] > at[0] + 0.5, "not knowing the channel costs SNR"
