"""Where tokens lie in code blocks, against real payloads that are really damaged."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokmerge import wire
from tokmerge.channel import LADDER
from tokmerge.fragments import Fragments, average, conceal, fit, travel_order
from tokmerge.packed import Layout, Packed

fast = settings(max_examples=40, deadline=None, derandomize=True, database=None)


@fast
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
    fragments = Fragments.of(layout, dim, precision, sizes, info_bits, chunk)
    errors = torch.rand(len(lengths), int(fragments.blocks.max()), generator=generator) < 0.3
    told = fragments.received(errors).split(lengths)
    parts = [None] * len(lengths) if sizes is None else sizes.split(lengths)
    for i, (tokens, part) in enumerate(zip(x.split(lengths), parts, strict=True)):
        payload = wire.encode(tokens, part, precision, chunk)
        assert len(payload) == fragments.n_bytes[i]
        assert -(-8 * len(payload) // int(info_bits[i])) == fragments.blocks[i]
        bits = np.unpackbits(np.frombuffer(payload, np.uint8))
        for block in errors[i].nonzero()[:, 0].tolist():
            bits[block * int(info_bits[i]) : (block + 1) * int(info_bits[i])] ^= 1
        try:
            received = wire.decode(np.packbits(bits).tobytes()).received
        except wire.WireError:
            received = torch.zeros(len(tokens), dtype=torch.bool)
        assert torch.equal(received, told[i])


def test_travel_order_scatters_within_every_image():
    layout = Layout(torch.tensor([50, 1, 9]))
    order = travel_order(layout, 2)
    assert sorted(order.tolist()) == list(range(60))
    assert torch.equal(layout.image[order], layout.image), "images stay together"
    assert order[:2].tolist() == [0, 1], "protected tokens go first"
    assert order[50].item() == 50
    apart = order[2:50].diff().abs()
    assert apart.min() >= 8, "neighbours end up far apart"


def test_fit_is_the_most_robust_scheme_that_carries_the_payload():
    n_bytes = torch.tensor([10, 100, 300, 1000, 5000])
    for cap in (3, 8):
        for pilots in (0, 5):
            schemes, limits = fit(n_bytes, 2000, LADDER, cap, pilots)
            for n, scheme, limit in zip(n_bytes.tolist(), schemes.tolist(), limits.tolist(), strict=True):
                fitting = [i for i in range(cap) if LADDER[i].blocks(n) * (LADDER[i].uses + pilots) <= 2000]
                assert scheme == (fitting[0] if fitting else cap)
                assert limit == 2000 // (LADDER[scheme].uses + pilots)
    assert torch.equal(*(fit(n_bytes, uses, LADDER, 8)[0] for uses in (2000, torch.full((5,), 2000))))


@pytest.fixture
def batch():
    """Two images: CLS and three tokens of sizes 1, 2, 5; CLS and two of sizes 3, 5."""
    x = torch.arange(14.0).view(7, 2)
    return Packed(x, Layout(torch.tensor([4, 3])), torch.tensor([1.0, 1, 2, 5, 1, 3, 5]))


LOST = torch.tensor([True, False, True, True, False, True, False])
PROTOTYPE = torch.tensor([[-1.0, -2.0]])


def test_dropping_leaves_what_arrived_and_a_stand_in_for_the_class_token(batch):
    got = conceal(batch, LOST, PROTOTYPE, 8, "drop")
    assert got.lengths.tolist() == [3, 2]
    assert torch.equal(got.x, torch.stack([batch.x[0], batch.x[2], batch.x[3], PROTOTYPE[0], batch.x[5]]))
    assert got.sizes.tolist() == [1, 2, 5, 1, 3]


def test_the_mean_stands_for_all_patches_that_are_lost(batch):
    got = conceal(batch, LOST, PROTOTYPE, 8, "mean")
    assert got.lengths.tolist() == [4, 3]
    first = (batch.x[2] * 2 + batch.x[3] * 5) / 7
    assert torch.allclose(got.x[3], first)
    assert torch.equal(got.x[6], batch.x[5]), "the mean of one is itself"
    assert got.sizes.tolist() == [1, 2, 5, 1, 1, 3, 5]


def test_zeros_keep_every_place(batch):
    got = conceal(batch, LOST, PROTOTYPE, 8, "zero")
    assert got.lengths.tolist() == [4, 3]
    assert not got.x[[1, 6]].any()
    assert got.sizes.tolist() == [1, 1, 2, 5, 1, 3, 1]


def test_nothing_lost_is_nothing_changed_and_everything_lost_leaves_the_prototype(batch):
    whole = torch.ones(7, dtype=torch.bool)
    for how in ("drop", "mean", "zero"):
        got = conceal(batch, whole, PROTOTYPE, 8, how)
        assert torch.equal(got.x, batch.x)
        assert torch.equal(got.sizes, batch.sizes)
    for how in ("drop", "mean"):
        got = conceal(batch, ~whole, PROTOTYPE, 8, how)
        assert torch.equal(got.x, PROTOTYPE.repeat(2, 1))
    with pytest.raises(ValueError, match="unknown concealment 'guess'"):
        conceal(batch, whole, PROTOTYPE, 8, "guess")


def test_average_is_over_the_protected_tokens(batch):
    assert torch.equal(average(batch, 1), (batch.x[:1] + batch.x[4:5]) / 2)
