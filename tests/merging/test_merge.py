import torch
from tokmerge.merging import matching, merge
from tokmerge.merging.matching import Context, Merges
from tokmerge.merging.packed import Layout, Packed


def test_match_by_hand():
    # CLS, then A B A B: the first a is most like the second b, the second a like the first b.
    metric = torch.tensor([[9.0, 9.0], [1.0, 0.0], [0.0, 1.0], [0.1, 1.0], [1.0, 0.1]])
    unit = torch.nn.functional.normalize(metric, dim=-1)
    matches = matching.match(Context(0, 4, 1, unit, None, Layout(torch.tensor([5]))))
    src, dst, lost, *_ = matches.take()
    assert (src.tolist(), dst.tolist(), lost.tolist()) == ([1, 3], [4, 2], [2])
    expected = 1 / (1 + 0.01) ** 0.5
    torch.testing.assert_close(matches.similarity, torch.tensor([[expected, expected]]))


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


def test_unmerge_puts_zeros_where_tokens_were_dropped():
    tokens = Packed(torch.tensor([[1.0], [2.0], [3.0]]), Layout(torch.tensor([1, 2])))
    grid = merge.unmerge_tokens(tokens, torch.tensor([[0, 0, -1], [1, 0, 1]]))
    assert grid.squeeze(2).tolist() == [[1, 1, 0], [3, 2, 3]]
