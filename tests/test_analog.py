"""Analog codecs: power, LMMSE and channel uses against closed forms."""

import pytest
import tokmerge
import torch
from conftest import build
from tokmerge.analog import AnalogSent, Learned, Linear, features, size_weight, train
from tokmerge.channel import Channel
from tokmerge.delivery import Air, send
from tokmerge.link import shipped
from tokmerge.packed import Layout, Packed


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def samples():
    """(4000, 6) features of falling variance in a turned basis, off the origin."""
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator(1))).Q
    return torch.randn(4000, 6, generator=generator()) * torch.tensor([4.0, 2, 1, 0.5, 0.2, 0.1]) @ turn + 3


@pytest.fixture
def merged():
    return tokmerge.patch(build().requires_grad_(False), tokmerge.Threshold(0.6), split_layer=2)


def test_symbols_have_power_one_whatever_their_number(samples):
    codec = Linear.of(samples)
    for k in (1, 2, 3):
        symbols = codec.encode(samples, k)
        assert symbols.shape == (4000, k)
        assert float(symbols.abs().square().mean()) == pytest.approx(1.0, abs=0.01)


def test_without_noise_all_components_are_the_features_and_few_the_projection(samples):
    codec = Linear.of(samples)
    still = torch.full((4000,), 1e-9)
    assert torch.allclose(codec.decode(codec.encode(samples, 3), still), samples, atol=1e-3)
    centred = samples - samples.mean(0)
    basis = torch.linalg.svd(centred, full_matrices=False).Vh[:2]
    projection = centred @ basis.T @ basis + samples.mean(0)
    assert torch.allclose(codec.decode(codec.encode(samples, 1), still), projection, atol=1e-2)


def test_squared_error_is_that_of_lmmse(samples):
    codec, k, noise = Linear.of(samples), 3, 0.4
    sent = codec.encode(samples, k)
    got = codec.decode(sent + noise**0.5 * torch.randn(sent.shape, dtype=sent.dtype, generator=generator(2)),
                       torch.full((4000,), noise))  # fmt: skip
    a = codec.amplitudes(k)
    assert float(a.square().sum()) == pytest.approx(k)
    expected = (codec.variance * (noise / 2) / (a.square() + noise / 2)).sum()
    error = (got - samples).square().sum(1).mean()
    assert float(error) == pytest.approx(float(expected), rel=0.05)
    even = (codec.variance * (noise / 2) / (0.5 + noise / 2)).sum()
    assert expected < even, "unequal power does better than equal power"


def test_without_noise_analog_is_the_model(merged, images):
    sent = send(merged, images, ["float32"])["float32"]
    weight = size_weight(sent.tokens)
    one = AnalogSent(sent, Linear.of(features(sent.tokens, True, weight)), weight)
    assert one.codec.most() == 24
    air = Air(Channel(), shipped())
    tokens, arrived = one.arrivals(air, 90.0, 10**5, generator())
    assert arrived.all()
    assert torch.allclose(tokens.sizes, sent.tokens.sizes, rtol=0.02)
    # 49 features, 48 of which fit on 24 symbols.
    lost = (tokens.x - sent.tokens.x).square().sum() / (sent.tokens.x - sent.tokens.x.mean(0)).square().sum()
    assert lost < 1e-3
    assert torch.equal(one.deliver(air, 90.0, 10**5, 0, generator()), sent.answers)


def test_channel_uses_are_kept_to(merged, images):
    sent = send(merged, images, ["float32"])["float32"]
    codec = Linear.of(features(sent.tokens, False, 1.0))
    one = AnalogSent(sent, codec, 1.0)
    one.sent.sizes = None
    air = Air(Channel(), shipped())
    _, arrived = one.arrivals(air, 20.0, 7, generator())
    counts = torch.zeros(len(images)).index_add_(0, sent.tokens.layout.image, arrived.float())
    assert torch.equal(counts, sent.tokens.lengths.clamp(max=7).float()), "one symbol for each of seven tokens"
    # Twice the uses: twice the copies, half the noise.
    error = []
    for copies in (1, 4):
        slot = sent.tokens.lengths * codec.most() * copies
        tokens, _ = one.arrivals(air, 0.0, slot, generator(5))
        noiseless, _ = one.arrivals(air, 90.0, slot, generator(5))
        error.append(float((tokens.x - noiseless.x).square().mean()))
    assert error[1] < 0.55 * error[0]


def test_estimated_gains_and_fading_cost_quality(merged, images):
    sent = send(merged, images, ["float32"])["float32"]
    one = AnalogSent(sent, Linear.of(features(sent.tokens, True, 1.0)), 1.0)

    def error(channel):
        drawn = [one.arrivals(Air(channel, shipped()), 10.0, 2000, generator(seed))[0].x for seed in range(4)]
        return sum(float((x - sent.tokens.x).square().mean()) for x in drawn)

    assert error(Channel()) < error(Channel("rayleigh")) < error(Channel("rayleigh", pilots=1))


def test_sizes_travel_as_logarithms():
    tokens = Packed(torch.zeros(3, 2), Layout(torch.tensor([3])), torch.tensor([1.0, 2, 8]))
    assert features(tokens, True, 0.5)[:, 2].tolist() == [0.0, 0.5, 1.5]
    assert features(tokens, False, 0.5) is tokens.x
    assert size_weight(Packed(tokens.x, tokens.layout, None)) == 1.0


def test_the_learned_codec_learns(merged, images):
    sets = [send(merged, images, ["float32"])["float32"]]
    torch.manual_seed(0)
    codec = Learned(49, 4, hidden=32)
    losses = train(codec, sets, 60, 1.0, seed=0, batch=5, progress=False)
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    given = features(sets[0].tokens, True, 1.0)
    with torch.inference_mode():
        symbols = codec.encode(given, 4)
        assert float(symbols.abs().square().mean()) == pytest.approx(1.0, abs=0.35)
        assert codec.decode(symbols, torch.full((len(given),), 0.1)).shape == given.shape
    assert (codec.least(), codec.most()) == (4, 4)
