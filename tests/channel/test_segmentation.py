import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokmerge import wire
from tokmerge.channel.segmentation import Segmentation, conceal, protected_means, travel_order
from tokmerge.merging.packed import Layout, Packed


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    precision=st.sampled_from(["int4", "int8", "float16"]),
    sized=st.booleans(),
    chunk=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_lost_blocks_cost_the_tokens_that_decoding_says(lengths, precision, sized, chunk, seed):
    generator = torch.Generator().manual_seed(seed)
    layout, dim = Layout(torch.tensor(lengths)), 7
    x = torch.randn(sum(lengths), dim, generator=generator)
    sizes = torch.randint(1, 200, (sum(lengths),), generator=generator) if sized else None
    info_bits = torch.tensor([192 + 128 * (i % 3) for i in range(len(lengths))])
    segmentation = Segmentation.of_tokens(layout, dim, precision, sizes, info_bits, chunk)
    lost = torch.rand(len(lengths), int(segmentation.blocks.max()), generator=generator) < 0.3
    counted = segmentation.received(lost).split(lengths)
    for i, payload in enumerate(wire.encode_images(x, lengths, sizes, precision, chunk)):
        assert len(payload) == segmentation.n_bytes[i]
        assert -(-8 * len(payload) // int(info_bits[i])) == segmentation.blocks[i]
        bits = np.unpackbits(np.frombuffer(payload, np.uint8))
        for block in lost[i].nonzero()[:, 0].tolist():
            bits[block * int(info_bits[i]) : (block + 1) * int(info_bits[i])] ^= 1
        try:
            received = wire.decode(np.packbits(bits).tobytes()).received
        except wire.WireError:
            received = torch.zeros(lengths[i], dtype=torch.bool)
        assert torch.equal(received, counted[i])


def test_a_file_arrives_whole_or_not_at_all():
    n_bytes = torch.tensor([10, 60, 61])
    files = Segmentation.of_files(n_bytes, 480)
    assert torch.equal(files.n_bytes, n_bytes)
    assert files.blocks.tolist() == [1, 1, 2]
    assert files.received(torch.tensor([[False, True], [True, False], [False, True]])).tolist() == [True, False, False]


def test_travel_order_scatters_within_every_image():
    layout = Layout(torch.tensor([50, 1, 9]))
    order = travel_order(layout, 2)
    assert sorted(order.tolist()) == list(range(60))
    assert torch.equal(layout.image[order], layout.image), "images stay together"
    assert order[:2].tolist() == [0, 1], "protected tokens go first"
    assert order[50].item() == 50
    assert order[2:50].diff().abs().min() >= 8, "neighbours end up far apart"


# Two images: CLS and three tokens of sizes 1, 2, 5; CLS and two of sizes 3, 5.
X = torch.arange(14.0).view(7, 2)
BATCH = Packed(X, Layout(torch.tensor([4, 3])), torch.tensor([1.0, 1, 2, 5, 1, 3, 5]))
RECEIVED = torch.tensor([True, False, True, True, False, True, False])
PROTOTYPE = torch.tensor([[-1.0, -2.0]])
ZERO, MEAN = torch.zeros(2), (X[2] * 2 + X[3] * 5) / 7


@pytest.mark.parametrize(
    ("how", "lengths", "x", "sizes"),
    [
        ("drop", [3, 2], [X[0], X[2], X[3], PROTOTYPE[0], X[5]], [1, 2, 5, 1, 3]),
        # The average stands for all patches that are lost; that of one is itself.
        ("mean", [4, 3], [X[0], X[2], X[3], MEAN, PROTOTYPE[0], X[5], X[5]], [1, 2, 5, 1, 1, 3, 5]),
        ("zero", [4, 3], [X[0], ZERO, X[2], X[3], PROTOTYPE[0], X[5], ZERO], [1, 1, 2, 5, 1, 3, 1]),
    ],
)
def test_lost_tokens_are_concealed(how, lengths, x, sizes):
    got = conceal(BATCH, RECEIVED, PROTOTYPE, 8, how)
    assert got.lengths.tolist() == lengths
    assert torch.allclose(got.x, torch.stack(x))
    assert got.sizes.tolist() == sizes
    whole = conceal(BATCH, torch.ones(7, dtype=torch.bool), PROTOTYPE, 8, how)
    assert torch.equal(whole.x, X), "nothing lost is nothing changed"
    assert torch.equal(whole.sizes, BATCH.sizes)
    if how != "zero":
        nothing = conceal(BATCH, torch.zeros(7, dtype=torch.bool), PROTOTYPE, 8, how)
        assert torch.equal(nothing.x, PROTOTYPE.repeat(2, 1))


def test_an_unknown_concealment_is_refused_and_no_protected_token_needs_no_prototype():
    with pytest.raises(ValueError, match="unknown concealment 'guess'"):
        conceal(BATCH, RECEIVED, PROTOTYPE, 8, "guess")
    assert torch.equal(conceal(BATCH, RECEIVED, PROTOTYPE[:0], 11).x, X[RECEIVED])
    assert torch.equal(protected_means(BATCH, 1), (X[:1] + X[4:5]) / 2)
