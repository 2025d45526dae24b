import pytest
import torch
from tokmerge.merging import matching
from tokmerge.merging.calibration import Calibration, Observed, best_similarities, observe
from tokmerge.merging.matching import Context
from tokmerge.merging.packed import Layout
from tokmerge.merging.policies import PiToMe, Threshold, TopR
from torch.nn import functional as F

LENGTHS = [9, 4, 2, 14]


def make_context(layer=1, depth=4, protected=1, lengths=LENGTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    metric = torch.randn(sum(lengths), 6, generator=generator) + 1
    return Context(layer, depth, protected, F.normalize(metric, dim=-1), None, Layout(torch.tensor(lengths)))


def pairs_by_image(context):
    """{image: {a: (similarity, b)}} with rows of the packed batch, by loops."""
    result, first = {}, 0
    for image, n in enumerate(context.layout.lengths.tolist()):
        free = range(first + context.protected, first + n)
        result[image] = {}
        for a in list(free)[0::2]:
            scores = {b: float(context.metric[a] @ context.metric[b]) for b in list(free)[1::2]}
            if scores:
                b = max(scores, key=lambda b: scores[b])
                result[image][a] = (scores[b], b)
        first += n
    return result


def as_pairs(merges):
    return sorted(zip(merges.src.tolist(), merges.dst.tolist(), strict=True))


@pytest.mark.parametrize("tau", [-1.0, 0.5, 0.7, 0.9, 0.999])
def test_threshold_takes_every_pair_above_it(tau):
    context = make_context()
    expected = [(a, b) for pairs in pairs_by_image(context).values() for a, (c, b) in pairs.items() if c > tau]
    assert as_pairs(Threshold([1.0, tau, 1.0, 1.0]).select(context)) == sorted(expected)
    assert as_pairs(Threshold(tau).select(context)) == sorted(expected)


@pytest.mark.parametrize("r", [1, 2, 3, 100])
def test_top_r_takes_the_most_similar_pairs_of_each_image(r):
    context = make_context()
    expected = []
    for pairs in pairs_by_image(context).values():
        best = sorted(pairs, key=lambda a: -pairs[a][0])[:r]
        expected += [(a, pairs[a][1]) for a in best]
    assert as_pairs(TopR(r).select(context)) == sorted(expected)


@pytest.mark.parametrize("layer", [0, 2, 3])
@pytest.mark.parametrize("r", [1, 3, 50])
def test_pitome_equals_its_definition_image_by_image(r, layer):
    context = make_context(layer=layer)
    margin = 0.75 * (1 - layer / 4)
    expected, first = [], 0
    for n in LENGTHS:
        free = list(range(first + 1, first + n))
        energy = {}
        for i in free:
            others = [float(context.metric[i] @ context.metric[j]) - margin for j in free if j != i]
            elu = [x if x > 0 else float(torch.tensor(x).exp()) - 1 for x in others]
            energy[i] = sum(elu) / max(len(elu), 1)
        order = sorted(free, key=lambda i: -energy[i])[: 2 * min(r, len(free) // 2)]
        set_a, set_b = order[0::2], order[1::2]
        for a in set_a:
            expected.append((a, max(set_b, key=lambda b: float(context.metric[a] @ context.metric[b]))))
        first += n
    assert as_pairs(PiToMe(r).select(context)) == sorted(expected)


@pytest.mark.parametrize("policy", [Threshold(-1.0), TopR(5), PiToMe(5)], ids=["threshold", "top r", "pitome"])
def test_images_with_nothing_left_to_merge_stay_as_they_are(policy):
    merges = policy.select(make_context(lengths=[2, 1, 2]))
    assert as_pairs(merges) == []
    assert merges.lost.tolist() == [0, 0, 0]


def test_active_says_where_nothing_can_happen():
    assert [Threshold([0.9, 1.0, 2.0]).active(layer) for layer in range(3)] == [True, False, False]
    assert [TopR([0, 3]).active(layer) for layer in range(2)] == [False, True]
    assert not PiToMe(0).active(0)


def test_match_macs_count_the_similarity_product():
    n = torch.tensor([7, 8, 0])
    assert Threshold(0.9).match_macs(n, 10).tolist() == [4 * 3 * 10, 4 * 4 * 10, 0]
    assert TopR(1).match_macs(n, 10).tolist() == [120, 160, 0]
    assert PiToMe(1).match_macs(n, 10).tolist() == [490, 640, 0]


def test_observe_keeps_what_it_sees_and_merges_nothing():
    context = make_context(layer=0)
    (seen,) = observe(lambda observer: observer.select(context), best_similarities)
    expected = sorted(c for pairs in pairs_by_image(context).values() for c, _ in pairs.values())
    torch.testing.assert_close(seen.sort().values, torch.tensor(expected))
    policy, met = Threshold(0.5), []
    hook = lambda context, choose: met.append(context.layer) or choose()  # noqa: E731
    assert torch.equal(Observed(policy, hook).select(context).src, policy.select(context).src)
    assert len(Observed(None, hook).select(context).src) == 0
    assert met == [0, 0]


def test_calibrated_threshold_lets_the_wanted_share_merge():
    def run(observer):
        for seed in range(20):
            observer.select(make_context(layer=0, lengths=[101, 77], seed=seed))

    (seen,), found = observe(run, best_similarities), Calibration.of(run)
    for share in (0.1, 0.5, 0.9):
        tau = found.thresholds([share])[0]
        assert (seen > tau).float().mean() == pytest.approx(share, abs=0.01)
    assert found.thresholds([0]) == (1.0,)
    assert found.thresholds([1]) == (-1.0,)


def test_calibration_rejects_bad_shares():
    calibration = Calibration(torch.zeros(2, 3).numpy())
    with pytest.raises(ValueError, match="1 shares for a calibration of 2 layers"):
        calibration.thresholds([0.5])
    with pytest.raises(ValueError, match=r"u\[1\] is 1.2"):
        calibration.thresholds([0.5, 1.2])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Threshold([0.9, "0.8"]), TypeError, r"Threshold: thresholds\[1\] is '0.8', not a number"),
        (lambda: Threshold([0.9, float("nan")]), TypeError, r"thresholds\[1\] is nan"),
        (lambda: Threshold([[0.9]]), TypeError, r"thresholds\[0\] is \[0.9\]"),
        (lambda: Threshold(None), TypeError, "thresholds is None"),
        (lambda: Threshold([True]), TypeError, r"thresholds\[0\] is True"),
        (lambda: Threshold("0.9"), TypeError, "thresholds is '0.9'"),
        (lambda: TopR(1.5), TypeError, "TopR: r is 1.5, not an integer"),
        (lambda: PiToMe([2, None]), TypeError, r"PiToMe: r\[1\] is None"),
        (lambda: TopR([1, -2]), ValueError, r"r\[1\] is -2, but cannot be negative"),
        (lambda: TopR(3, "value"), ValueError, "TopR: unknown feature 'value': use one of tokens, keys"),
    ],
)
def test_bad_values_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_policies_are_recognised():
    assert all(
        isinstance(policy, matching.Policy) for policy in (Threshold(1), TopR(1), PiToMe(1), Observed(None, None))
    )
