"""What else is in a batch never matters: not its values, not its number, in no precision, under no policy."""

import math
from dataclasses import replace

import pytest
import tokmerge
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokmerge import Threshold, TopR
from tokmerge.merging import compiled, merge
from tokmerge.merging.matching import ranked
from tokmerge.merging.packed import Layout, Packed
from tokmerge.merging.peers import OutlierMerging

POLICIES = [
    Threshold(0.2), Threshold(0.2, "keys"), tokmerge.CappedThreshold(0.1, 2), tokmerge.RelativeThreshold(-0.5),
    tokmerge.LocalThreshold(0.0, 2), tokmerge.ConfidenceThreshold(0.0, 0.5, 2.0), TopR(3), TopR(3, "tokens"),
    tokmerge.PiToMe(3), tokmerge.ToFu(3), tokmerge.AdaMerge(4, [0.1], [0.2]), tokmerge.AttentionPruning(3),
    tokmerge.StaticRates(2, 2), tokmerge.RandomMerging(3), tokmerge.RandomPruning(3), OutlierMerging(0),
]  # fmt: skip


def batch(lengths, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    total = sum(lengths)
    sizes = torch.randint(1, 400, (total,), generator=generator).float()
    places = torch.randint(0, 6, (total, 2), generator=generator).float()
    tokens = Packed(draw(total, 6).to(dtype), Layout(torch.tensor(lengths)), sizes, place=places)
    return tokens, draw(total, 3, 2, 4).to(dtype)


def step(policy, tokens, qkv):
    read_out = lambda: tokens.x[tokens.layout.offsets, 0].float().sigmoid()  # noqa: E731
    return merge.step(tokens, policy, layer=0, depth=1, protected=1, qkv=qkv, read_out=read_out)


@settings(max_examples=150, deadline=None)
@given(
    policy=st.sampled_from(POLICIES),
    lengths=st.lists(st.integers(1, 12), min_size=2, max_size=5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    hostile=st.sampled_from([None, math.nan, math.inf, -math.inf, 3e38]),
    seed=st.integers(0, 10**6),
)
def test_every_policy_gives_an_image_what_it_gets_alone(policy, lengths, dtype, hostile, seed):
    tokens, qkv = batch(lengths, dtype, seed)
    if hostile is not None:
        row = seed % sum(lengths)
        tokens.x[row], qkv[row] = hostile, hostile
    merged = step(policy, tokens, qkv)
    for i, (got, own) in enumerate(zip(merged.split(), qkv.split(lengths), strict=True)):
        alone = step(policy, tokens.images(torch.tensor([i])), own)
        assert alone.lengths[0] == merged.lengths[i]
        torch.testing.assert_close(
            got, alone.x, rtol=1e-3, atol=1e-3 if dtype != torch.float32 else 1e-5, equal_nan=True
        )


SIMILAR_PAIRS = [
    Threshold(0.2), Threshold(0.0, "keys"), Threshold(-0.5, size_aware=True), TopR(3), TopR(100, "tokens"),
    tokmerge.CappedThreshold(0.1, 2), tokmerge.ConfidenceThreshold(0.0, 0.5, 2.0),
]  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    policy=st.sampled_from(SIMILAR_PAIRS),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    hostile=st.sampled_from([None, math.nan, math.inf, -0.0, 3e38]),
    ties=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_the_compiled_loop_gives_what_torch_does_to_the_bit(policy, lengths, hostile, ties, seed):
    tokens, qkv = batch(lengths, torch.float32, seed)
    if ties:
        tokens, qkv = tokens.with_x(tokens.x.sign()), qkv.sign()
    if hostile is not None:
        row = seed % sum(lengths)
        tokens.x[row], qkv[row] = hostile, hostile
    source = torch.arange(max(lengths)).clamp(max=tokens.lengths[:, None] - 1)
    tokens = replace(tokens, place=None, source=source)
    assert compiled.serves(tokens.x)
    with pytest.MonkeyPatch.context() as patch:
        loop = step(policy, tokens, qkv)
        patch.setattr(compiled, "INSTALLED", False)
        plain = step(policy, tokens, qkv)
    for name in ("x", "sizes", "lengths", "source"):
        got, wanted = getattr(loop, name), getattr(plain, name)
        torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True, msg=name)


def test_what_is_no_number_comes_last_and_padding_after_it():
    nan, inf = math.nan, math.inf
    scores = torch.tensor([[nan, 1.0, inf, -2.0, 5.0], [0.0, nan, 7.0, 7.0, 7.0]])
    valid = torch.tensor([[True, True, True, True, False], [True, True, False, False, False]])
    assert ranked(scores, valid).tolist() == [[3, 1, 0, 2, 4], [0, 1, 2, 3, 4]]
    assert ranked(scores, valid, descending=True).tolist() == [[1, 3, 0, 2, 4], [0, 1, 2, 3, 4]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_are_made_in_float32(dtype):
    """Two tokens of 120 that stand for 300 and 276 patches: their sum is beyond float16."""
    tokens = Packed(torch.full((3, 2), 120.0, dtype=dtype), Layout(torch.tensor([3])), torch.tensor([1.0, 300, 276]))
    merged = merge.apply(tokens, merge.Merges(torch.tensor([2]), torch.tensor([1]), torch.tensor([1])))
    assert merged.x.tolist() == [[120.0, 120.0]] * 2
    assert merged.x.dtype == dtype
    assert merged.sizes.tolist() == [1, 576]


def test_a_lone_class_token_is_left_alone():
    tokens, qkv = batch([1, 1], torch.float32, 0)
    for policy in POLICIES:
        assert step(policy, replace(tokens), qkv).lengths.tolist() == [1, 1]
