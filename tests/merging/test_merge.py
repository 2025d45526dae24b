import pytest
import torch
from tokmerge.merging import matching, merge
from tokmerge.merging.matching import Context, Merges
from tokmerge.merging.packed import Layout, Packed


def context(metric, lengths, protected=1):
    unit = torch.nn.functional.normalize(metric, dim=-1)
    return Context(0, 4, protected, unit, None, Layout(torch.tensor(lengths)))


def test_match_by_hand():
    # CLS, then A B A B: the first a is most like the second b, the second a like the first b.
    metric = torch.tensor([[9.0, 9.0], [1.0, 0.0], [0.0, 1.0], [0.1, 1.0], [1.0, 0.1]])
    matches = matching.match(context(metric, [5]))
    assert matches.src.tolist() == [[1, 3]]
    assert matches.dst.tolist() == [[4, 2]]
    expected = 1 / (1 + 0.01) ** 0.5
    torch.testing.assert_close(matches.similarity, torch.tensor([[expected, expected]]))


def test_match_never_leaves_the_image():
    generator = torch.Generator().manual_seed(0)
    lengths = [2, 6, 1, 9]
    matches = matching.match(context(torch.randn(18, 4, generator=generator), lengths))
    layout = Layout(torch.tensor(lengths))
    chosen = matches.similarity.isfinite()
    assert chosen.sum(1).tolist() == [0, 3, 0, 4]  # one free token has no partner
    src, dst, lost, *_ = matches.merges(chosen)
    assert lost.tolist() == [0, 3, 0, 4]
    assert torch.equal(layout.image[src], layout.image[dst])
    assert not set(src.tolist()) & set(dst.tolist())


def test_match_without_any_partner():
    matches = matching.match(context(torch.randn(4, 3), [2, 2]))
    assert matches.similarity.shape == (2, 1)
    assert not matches.similarity.isfinite().any()


def test_apply_by_hand():
    x = torch.tensor([[0.0], [1.0], [2.0], [3.0], [10.0], [20.0]])
    sizes = torch.tensor([1.0, 1.0, 3.0, 2.0, 1.0, 4.0])
    source = torch.tensor([[0, 1, 2, 2, 2, 3, 3], [0, 1, 1, 1, 1, -1, -1]])
    tokens = Packed(x, Layout(torch.tensor([4, 2])), sizes, source)
    merged = merge.apply(tokens, Merges(torch.tensor([1, 3, 4]), torch.tensor([2, 2, 5]), torch.tensor([2, 1])))
    torch.testing.assert_close(merged.x, torch.tensor([[0.0], [(1 + 6 + 6) / 6], [(10 + 80) / 5]]))
    assert merged.sizes.tolist() == [1, 6, 5]
    assert merged.lengths.tolist() == [2, 1]
    assert merged.source.tolist() == [[0, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, -1, -1]]


def test_apply_nothing_is_the_same_object():
    tokens = Packed(torch.randn(3, 2), Layout(torch.tensor([3])))
    none = torch.empty(0, dtype=torch.int64)
    assert merge.apply(tokens, Merges(none, none, torch.tensor([0]))) is tokens


@pytest.mark.parametrize("seed", range(5))
def test_apply_conserves_mass_and_counts(seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 12, (6,), generator=generator)
    layout = Layout(lengths)
    x = torch.randn(int(lengths.sum()), 5, generator=generator)
    sizes = torch.randint(1, 9, (len(x),), generator=generator).float()
    matches = matching.match(Context(0, 1, 0, torch.nn.functional.normalize(x, dim=1), sizes, layout))
    chosen = matches.similarity.isfinite() & (torch.rand(matches.similarity.shape, generator=generator) < 0.5)
    merged = merge.apply(Packed(x, layout, sizes), matches.merges(chosen))
    assert merged.lengths.tolist() == (lengths - chosen.sum(1)).tolist()
    for before, weights, after, total in zip(
        x.split(lengths.tolist()),
        sizes.split(lengths.tolist()),
        merged.split(),
        merged.sizes.split(merged.layout.counts),
        strict=True,
    ):
        torch.testing.assert_close((before * weights[:, None]).sum(0), (after * total[:, None]).sum(0))
        assert weights.sum() == total.sum()


def test_unmerge_puts_zeros_where_tokens_were_dropped():
    tokens = Packed(torch.tensor([[1.0], [2.0], [3.0]]), Layout(torch.tensor([1, 2])))
    grid = merge.unmerge_tokens(tokens, torch.tensor([[0, 0, -1], [1, 0, 1]]))
    assert grid.squeeze(2).tolist() == [[1, 1, 0], [3, 2, 3]]
