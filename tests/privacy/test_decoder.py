from functools import partial

import numpy as np
import pytest
import tokmerge
import torch
from tokmerge.merging.packed import Layout, Packed
from tokmerge.privacy import decoder
from tokmerge.privacy.decoder import Attacker, reconstruct, reconstruction_loss, train_attacker
from tokmerge.privacy.defence import collect_tokens
from torchmetrics.functional.image import structural_similarity_index_measure as ssim

SIDE, CHANNELS = 4, 1


def clean(tokens, generator=None):
    return tokens


def patches(n, seed=0):
    """Images of plain 4x4 patches, and tokens whose first value is the patch's grey: trivially invertible."""
    generator = torch.Generator().manual_seed(seed)
    grey = torch.rand(n, SIDE * SIDE, generator=generator)
    images = (grey.view(n, 1, SIDE, SIDE) * 255).round().byte().repeat_interleave(4, 2).repeat_interleave(4, 3)
    values = torch.cat([torch.zeros(n, 1), grey], dim=1)
    x = torch.stack([values, torch.randn(values.shape, generator=generator)], dim=2).flatten(0, 1)
    source = torch.arange(SIDE * SIDE + 1).repeat(n, 1)
    return images, Packed(x, Layout(torch.full((n,), SIDE * SIDE + 1)), torch.ones(len(x)), source)


def attacker(kind, width=16):
    torch.manual_seed(0)
    return Attacker(kind, dim=2, n_tokens=SIDE * SIDE + 1, prefix=1, image_shape=(CHANNELS, 16, 16), width=width)


@pytest.mark.parametrize(
    ("kind", "steps", "share"),
    # Where the order alone says which patch is which, attention has to find that out.
    [("sequence", 120, 0.6), ("grid", 60, 0.3), ("map", 60, 0.3)],
)
def test_attackers_learn_a_trivially_invertible_map(kind, steps, share):
    (images, tokens), net = patches(176), attacker(kind)
    seen, test = torch.arange(144), torch.arange(144, 176)
    curve = train_attacker(net, tokens.images(seen), images[seen], clean, steps=steps, check_every=10,
                           batch_size=16, lr=1e-2, seed=0, n_check=16)  # fmt: skip
    rebuilt = reconstruct(net, tokens.images(test), clean, 32, torch.Generator())
    assert (rebuilt - images[test] / 255).square().mean() < share * (images / 255.0).var()
    assert curve.loss.iloc[-1] < 0.8 * curve.loss.iloc[0]
    assert curve.step.iloc[-1] == curve["images"].iloc[-1] / 16


def test_encodings_of_near_cells_are_alike():
    encoding = decoder.grid_encoding(4, 16).view(4, 4, 16)
    at = np.pi * (np.arange(4) + 0.5) / 4
    frequencies = 2.0 ** np.linspace(0, 3, 4)
    expected = [*np.sin(at[1] * frequencies), *np.cos(at[1] * frequencies),
                *np.sin(at[3] * frequencies), *np.cos(at[3] * frequencies)]  # fmt: skip
    np.testing.assert_allclose(encoding[1, 3], expected, atol=1e-5)
    assert encoding[0, 0] @ encoding[0, 1] > encoding[0, 0] @ encoding[3, 3]


def shuffled(tokens):
    """The same tokens in an order of their own in every image, and the source map that says so."""
    order = torch.rand(tokens.source.shape, generator=torch.Generator().manual_seed(0)).argsort(1)
    x = torch.cat([image[places] for image, places in zip(tokens.split(), order, strict=True)])
    return Packed(x, tokens.layout, tokens.sizes, order.argsort(1))


@pytest.mark.parametrize(("kind", "same"), [("grid", True), ("map", True), ("sequence", False)])
def test_only_the_sequence_attacker_depends_on_the_order(kind, same):
    _, tokens = patches(3)
    net = attacker(kind).eval()
    difference = (net(tokens) - net(shuffled(tokens))).abs().max().item()
    assert (difference < 1e-5) == same


def test_the_source_map_says_which_patch_a_token_paints():
    _, tokens = patches(1)
    net = attacker("grid").eval()
    before = net(tokens)
    values = tokens.x.clone()
    values[1 + 5] += 1  # the patch in row 1, column 1
    change = (net(tokens.with_x(values)) - before).abs().amax((0, 1))
    assert change[4:8, 4:8].max() > 0
    # Four 3x3 convolutions on the grid and two on pixels reach no further than 3 patches and 2 pixels, wrapped nowhere.
    moved = Packed(values, tokens.layout, tokens.sizes, tokens.source.flip(1))
    assert not torch.allclose(net(moved), net(tokens.with_x(values)))


def test_positions_are_the_mean_of_the_patches_a_token_stands_for():
    net = attacker("map")
    source = torch.zeros(2, SIDE * SIDE + 1, dtype=torch.long)
    source[0, 1:9], source[0, 9:] = 1, 2
    source[1, 1:] = -1
    source[1, 7] = 1
    tokens = Packed(torch.zeros(5, 2), Layout(torch.tensor([3, 2])), torch.tensor([1.0, 8, 8, 1, 1]), source)
    places = net._positions(tokens)
    expected = [net.position[0], net.position[1:9].mean(0), net.position[9:].mean(0), net.position[0], net.position[7]]
    assert torch.allclose(places, torch.stack(expected), atol=1e-6)


@pytest.fixture
def sent(model, images):
    return lambda policy: collect_tokens(partial(tokmerge.patch(model, policy).edge, source=True), images, batch_size=5)


@pytest.mark.parametrize("kind", decoder.ATTACKERS)
def test_an_image_is_rebuilt_the_same_in_any_company(kind, sent, images):
    tokens = sent(tokmerge.Threshold(0.6))
    torch.manual_seed(0)
    net = Attacker(kind, 48, 65, 1, (3, 32, 32), width=16).eval()
    together = net(tokens.images(torch.arange(5)))
    assert together.shape == images.shape
    for i in range(5):
        assert torch.allclose(net(tokens.images(torch.tensor([i])))[0], together[i], atol=1e-4)


def test_dropped_tokens_leave_a_gap_that_is_learned(sent):
    tokens = sent(tokmerge.RandomPruning(12))
    assert (tokens.source < 0).any()
    net = Attacker("map", 48, 65, 1, (3, 32, 32), width=16)
    net(tokens).square().mean().backward()
    assert net.dropped.grad.abs().sum() > 0


def test_loss_adds_squared_error_and_dissimilarity():
    x, y = torch.rand(3, 1, 28, 28), torch.rand(3, 1, 28, 28)
    expected = (x - y).square().mean() + decoder.SSIM_WEIGHT * (1 - ssim(x, y, data_range=1.0))
    assert reconstruction_loss(x, y).item() == pytest.approx(expected.item(), rel=1e-5)
    assert reconstruction_loss(x, x).item() == pytest.approx(0.0, abs=1e-6)


def test_training_sees_new_noise_at_every_step_and_repeats_with_its_seed():
    (images, tokens), seen = patches(64), []

    def distort(part, generator):
        seen.append(torch.rand(1, generator=generator).item())
        return part

    def train(batch_size=16):
        options = {"steps": 3, "check_every": 1, "batch_size": batch_size, "lr": 1e-3, "seed": 1, "n_check": 16}
        return train_attacker(attacker("grid", 8), tokens, images, distort, **options)

    assert train().equals(train())
    half = seen[: len(seen) // 2]
    assert len(set(half[:2])) == 2
    assert half == seen[len(seen) // 2 :]
    with pytest.raises(ValueError, match="64 images are too few for batches of 60 and 16 held out"):
        train(60)


def test_training_ends_when_held_out_images_gain_no_more_and_keeps_the_best_weights():
    (images, tokens), net = patches(64), attacker("grid", 8)
    images = images.flip(0)  # what tokens do not tell can only be guessed
    options = {"check_every": 10, "batch_size": 16, "seed": 0, "n_check": 16}
    curve = train_attacker(net, tokens, images, clean, steps=2000, lr=3e-2, **options)
    assert curve.step.iloc[-1] < 2000
    assert (curve.lr.diff() < 0).sum() == decoder.FALLS - 1, "the last fall ends it"
    assert curve.lr.iloc[-1] == pytest.approx(3e-2 * decoder.FALL ** (decoder.FALLS - 1))
    rebuilt = reconstruct(net, tokens.images(torch.arange(48, 64)), clean, 16, torch.Generator().manual_seed(0))
    assert reconstruction_loss(rebuilt, images[48:] / 255).item() == pytest.approx(curve.loss.min(), rel=1e-4)
    with pytest.raises(ValueError, match="3 steps are fewer than the 10 between two checks"):
        train_attacker(net, tokens, images, clean, steps=3, lr=1e-2, **options)


def test_attackers_refuse_what_they_cannot_lay_out():
    with pytest.raises(ValueError, match="unknown attacker 'psychic'"):
        attacker("psychic")
    with pytest.raises(ValueError, match="15 patches do not tile 16x16"):
        Attacker("grid", 2, 15, 0, (1, 16, 16))
