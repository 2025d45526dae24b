import pytest
import tokmerge
import torch
from conftest import build, build_dense
from members import generator, measured_link
from tokmerge.channel.analog import LearnedCodec, LinearCodec, size_weight, to_features, train_codec
from tokmerge.channel.phy import Channel
from tokmerge.channel.schemes import Member, analog_member
from tokmerge.channel.transmission import send_image_tokens
from tokmerge.merging.packed import Layout, Packed


@pytest.fixture(scope="module")
def samples():
    """(4000, 6) features of falling variance in a turned basis, off the origin."""
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator(1))).Q
    return torch.randn(4000, 6, generator=generator()) * torch.tensor([4.0, 2, 1, 0.5, 0.2, 0.1]) @ turn + 3


def send(images, policy=None, model=build):
    """By the linear codec of its own tokens."""
    one = send_image_tokens(tokmerge.patch(model(), policy, split_layer=2), images, ["float32"])["float32"]
    return analog_member("analog", Member("adaptive", "any", "float32", one, one)).select


MERGING = tokmerge.Threshold(0.6)


def test_without_noise_all_components_are_the_features_and_few_the_projection(samples):
    codec, still = LinearCodec.of(samples), torch.full((4000,), 1e-9)
    for k in (1, 2, 3):
        symbols = codec.encode(samples, k)
        assert symbols.shape == (4000, k)
        assert float(symbols.abs().square().mean()) == pytest.approx(1.0, abs=0.01)
    assert torch.allclose(codec.decode(symbols, still), samples, atol=1e-3)
    centred = samples - samples.mean(0)
    basis = torch.linalg.svd(centred, full_matrices=False).Vh[:2]
    projection = centred @ basis.T @ basis + samples.mean(0)
    assert torch.allclose(codec.decode(codec.encode(samples, 1), still), projection, atol=1e-2)


def test_squared_error_is_that_of_lmmse(samples):
    codec, k, noise = LinearCodec.of(samples), 3, 0.4
    sent = codec.encode(samples, k)
    drawn = noise**0.5 * torch.randn(sent.shape, dtype=sent.dtype, generator=generator(2))
    got = codec.decode(sent + drawn, torch.full((4000,), noise))
    power = codec.amplitudes(k).square()
    assert float(power.sum()) == pytest.approx(k)
    expected, even = ((codec.variance * (noise / 2) / (p + noise / 2)).sum() for p in (power, 0.5))
    assert float((got - samples).square().sum(1).mean()) == pytest.approx(float(expected), rel=0.05)
    assert expected < even, "unequal power does better than equal power"


def test_without_noise_analog_is_the_model(images):
    one = send(images, MERGING)
    digital, x = one.sent, one.sent.tokens.x
    assert one.codec.symbols == (1, 24)
    tokens, arrived = one.receive(measured_link(), 90.0, 10**5, generator())
    assert arrived.all()
    assert torch.allclose(tokens.sizes, digital.tokens.sizes, rtol=0.02)
    # 49 features, 48 of which fit on 24 symbols.
    assert (tokens.x - x).square().sum() / (x - x.mean(0)).square().sum() < 1e-3
    assert torch.equal(one.deliver(measured_link(), 90.0, 10**5, 0, generator()), digital.answers)


def test_channel_uses_are_kept_to(images):
    one, link = send(images), measured_link()
    layout = one.sent.tokens.layout
    _, arrived = one.receive(link, 20.0, 7, generator())
    counts = torch.zeros(len(images)).index_add_(0, layout.image, arrived.float())
    assert torch.equal(counts, layout.lengths.clamp(max=7).float()), "one symbol for each of seven tokens"
    # Four times the uses: four times the copies, a quarter of the noise.
    error = []
    for copies in (1, 4):
        slot = layout.lengths * one.codec.symbols[1] * copies
        noisy, clean = (one.receive(link, snr_db, slot, generator(5))[0].x for snr_db in (0.0, 90.0))
        error.append(float((noisy - clean).square().mean()))
    assert error[1] < 0.55 * error[0]


def test_estimated_gains_and_fading_cost_quality(images):
    one = send(images, MERGING)

    def error(channel):
        drawn = [one.receive(measured_link(channel), 10.0, 2000, generator(seed))[0].x for seed in range(4)]
        return sum(float((x - one.sent.tokens.x).square().mean()) for x in drawn)

    assert error(Channel()) < error(Channel("rayleigh")) < error(Channel("rayleigh", pilots=4))


def test_sizes_travel_as_logarithms():
    tokens = Packed(torch.zeros(3, 2), Layout(torch.tensor([3])), torch.tensor([1.0, 2, 8]))
    assert to_features(tokens, 0.5)[:, 2].tolist() == [0.0, 0.5, 1.5]
    assert to_features(tokens, None) is tokens.x
    assert size_weight(Packed(tokens.x, tokens.layout, None)) == 1.0


def test_the_learned_codec_learns_and_survives_its_file(images):
    one = send(images, MERGING).sent
    torch.manual_seed(0)
    codec = LearnedCodec(49, 4, hidden=32)
    losses = train_codec(codec, [one], 60, seed=0)
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    assert float(codec.size_weight) == pytest.approx(size_weight(one.tokens))
    assert codec.symbols == (4, 4)
    again = LearnedCodec.of(codec.named_tensors() | LearnedCodec(5, 3).named_tensors(), 4)
    given = to_features(one.tokens, codec.size_weight)
    noise = torch.full((len(given),), 0.1)
    with torch.inference_mode():
        symbols = codec.encode(given, 4)
        assert float(symbols.abs().square().mean()) == pytest.approx(1.0, abs=0.35)
        assert torch.equal(again.decode(again.encode(given, 4), noise), codec.decode(symbols, noise))
    assert again.size_weight == codec.size_weight
    with pytest.raises(ValueError, match="no learned codec of 8 symbols per token: there are those of 4"):
        LearnedCodec.of(codec.named_tensors(), 8)


def test_a_model_whose_server_needs_the_source_map_is_refused(images):
    with pytest.raises(ValueError, match="which patches a token stands for, which analog symbols do not say"):
        send(images, MERGING, build_dense)
