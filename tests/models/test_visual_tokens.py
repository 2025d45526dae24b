import pytest
import reference
import torch
from tokmerge import Threshold, TopR
from tokmerge.merging.packed import Layout, Packed
from tokmerge.models import visual_tokens
from tokmerge.models.visual_tokens import VisualTokens


@pytest.fixture
def tokens():
    """Three images of 6, 1 and 9 tokens, already merged from 12 patches each."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([6, 1, 9])
    x = torch.randn(16, 5, generator=generator)
    x[1], x[8] = x[2] * 1.1, x[9] * 0.9
    source = torch.stack([torch.randint(0, n, (12,), generator=generator) for n in lengths.tolist()])
    sizes = torch.tensor([1, 4, 2, 1, 3, 1, 12, 2, 1, 1, 1, 3, 1, 1, 1, 1.0])
    return Packed(x, Layout(lengths), sizes, source)


@pytest.mark.parametrize(
    ("policy", "choose"),
    [(Threshold(0.9), reference.threshold_choice([0.9])), (TopR(2), reference.top_r_choice([2]))],
)
def test_merging_the_output_equals_the_plain_implementation(tokens, policy, choose):
    merged, macs = visual_tokens.merge_output(tokens, policy)
    for i, (x, sizes) in enumerate(zip(tokens.split(), tokens.sizes.split(tokens.layout.counts), strict=True)):
        rows, expected_sizes, _ = reference.merge_once(x, sizes.tolist(), [{0}] * len(x), choose)
        torch.testing.assert_close(merged.split()[i], rows)
        assert merged.sizes.split(merged.layout.counts)[i].tolist() == expected_sizes
        n, left = len(x), len(rows)
        assert macs[i] == (n - n // 2) * (n // 2) * 5 + 2 * n * 5 + (n != left) * (n + left) * 5


def test_an_idle_policy_costs_nothing(tokens):
    merged, macs = visual_tokens.merge_output(tokens, Threshold(1.0))
    assert merged is tokens
    assert macs.tolist() == [0, 0, 0]


def test_first_patches(tokens):
    first = visual_tokens.first_patches(tokens).split(tokens.layout.counts)
    for row, own in zip(tokens.source.tolist(), first, strict=True):
        for token, patch in enumerate(own.tolist()):
            assert patch == (row.index(token) if token in row else 11)
    with pytest.raises(ValueError, match="no source map"):
        visual_tokens.first_patches(Packed(tokens.x, tokens.layout))


@pytest.mark.parametrize("known", [False, True])
def test_picked_images_have_all_that_is_known_of_them(tokens, known):
    number, packed = torch.arange(3), tokens if known else Packed(tokens.x, tokens.layout)
    first = visual_tokens.first_patches(tokens) if known else None
    sent = VisualTokens(packed, first, known, 12, "int8", number[:, None], number, number)
    picked, rows = sent.pick(torch.tensor([2, 2, 1])), [*range(7, 16), *range(7, 16), 6]
    assert len(picked) == 3
    assert picked.tokens.lengths.tolist() == [9, 9, 1]
    for name, index in (("x", rows), ("sizes", rows), ("source", [2, 2, 1])):
        part, whole = getattr(picked.tokens, name), getattr(packed, name)
        assert part is whole is None or torch.equal(part, whole[index]), name
    assert picked.first is first is None or torch.equal(picked.first, first[rows])
    assert picked.vision_macs.tolist() == picked.projector_macs.tolist() == picked.layers[:, 0].tolist() == [2, 2, 1]
    assert [len(p) for p in picked.payloads()] == picked.payload_bytes.tolist()
