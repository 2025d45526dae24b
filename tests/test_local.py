import pytest
import tiny
import torch
from tokmerge import Threshold, clip, merge
from tokmerge.local import LocalThreshold
from tokmerge.packed import Layout, Packed


def window_pairs(keys, places, window, protected):
    """{a: (similarity, b)} as in `reference.best_matches`, window by window."""
    metric = keys.mean(0)
    windows = {}
    for token in range(protected, len(metric)):
        row, column = places[token]
        windows.setdefault((int(row // window), int(column // window)), []).append(token)
    pairs, first = {}, 0
    for _, tokens in sorted(windows.items()):
        # The alternation goes on from window to window.
        a_s = [token for number, token in enumerate(tokens, first) if number % 2 == 0]
        first += len(tokens)
        for a in a_s:
            for b in set(tokens) - set(a_s):
                c = torch.nn.functional.cosine_similarity(metric[a], metric[b], dim=0).item()
                if a not in pairs or c > pairs[a][0]:
                    pairs[a] = (c, b)
    return pairs


@pytest.mark.parametrize("window", [2, 3])
def test_equals_the_plain_implementation_layer_by_layer(window, images, monkeypatch):
    tower, images = tiny.tower().double(), images.double()
    seen = []
    apply = merge.apply
    monkeypatch.setattr(merge, "apply", lambda tokens, merges: seen.append((tokens, merges)) or apply(tokens, merges))
    contexts = []
    select = LocalThreshold.select
    monkeypatch.setattr(
        LocalThreshold, "select", lambda self, context: contexts.append(context) or select(self, context)
    )
    clip.patch(tower, LocalThreshold(0.2, window, "keys"))(images, source=True)
    merged = 0
    for (tokens, merges), context in zip(seen, contexts, strict=True):
        source, counts = tokens.source.tolist(), tokens.layout.counts
        start = 0
        for image, count in enumerate(counts):
            # Places from the source map: the mean over a token's patches, on the grid of 8 x 8.
            groups = [[p - 1 for p, token in enumerate(source[image]) if token == t and p > 0] for t in range(count)]
            places = [(sum(p // 8 for p in g) / len(g), sum(p % 8 for p in g) / len(g)) if g else None for g in groups]
            keys = context.qkv[start : start + count, 1].transpose(0, 1)
            pairs = window_pairs(keys, places, window, 1)
            expected = {(a, b) for a, (c, b) in pairs.items() if c > 0.2}
            got = {
                (a - start, b - start)
                for a, b in zip(merges.src.tolist(), merges.dst.tolist(), strict=True)
                if start <= a < start + count
            }
            assert got == expected
            merged += len(got)
            start += count
    assert merged > 50


def test_one_window_is_the_threshold(images):
    tower = tiny.tower()
    features, record = clip.patch(tower, LocalThreshold(0.3, 100))(images)
    expected, other = clip.patch(tower, Threshold(0.3))(images)
    torch.testing.assert_close(features.x, expected.x)
    assert torch.equal(record.tokens, other.tokens)
    assert (record.macs > other.macs).all(), "comparisons of windows are counted"


def test_places_are_means_over_patches():
    places = torch.tensor([[0.0, 0.0], [0.0, 1.0], [2.0, 2.0]])
    tokens = Packed(torch.zeros(3, 1), Layout(torch.tensor([3])), torch.tensor([1.0, 3.0, 1.0]), place=places)
    merged = merge.apply(tokens, merge.Merges(torch.tensor([2]), torch.tensor([1]), torch.tensor([1])))
    assert merged.place.tolist() == [[0, 0], [0.5, 1.25]]


def test_unknown_places_and_bad_numbers_are_named(images):
    context = merge.Context(0, 1, 0, torch.eye(4), None, Layout(torch.tensor([4])))
    with pytest.raises(ValueError, match="places of tokens"):
        LocalThreshold(0.5, 1).select(context)
    with pytest.raises(ValueError, match="2 windows for a model of 4 blocks"):
        clip.patch(tiny.tower(), LocalThreshold(0.5, (1, 2)))
    with pytest.raises(TypeError, match="window is 'far'"):
        LocalThreshold(0.5, "far")
    with pytest.raises(ValueError, match="a side of 1 or more patches"):
        LocalThreshold(0.5, (2, 0, 2, 2))
