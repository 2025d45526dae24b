import pytest
import reference
import torch
from tokmerge.merging.calibration import Calibration, Observed, best_similarities, observe
from tokmerge.merging.matching import Context
from tokmerge.merging.packed import Layout
from tokmerge.merging.policies import Threshold
from torch.nn import functional as F


def make_context(lengths, seed=0):
    metric = torch.randn(sum(lengths), 6, generator=torch.Generator().manual_seed(seed)) + 1
    return Context(0, 4, 1, F.normalize(metric, dim=-1), None, Layout(torch.tensor(lengths)))


def test_observe_keeps_what_it_sees_and_merges_nothing():
    context = make_context(lengths := [9, 4, 2, 14])
    (seen,) = observe(lambda observer: observer.select(context), best_similarities)
    matches = [reference.best_matches(image[None], 1).values() for image in context.metric.split(lengths)]
    torch.testing.assert_close(seen.sort().values, torch.tensor(sorted(c for some in matches for c, _ in some)))
    policy, met = Threshold(0.5), []
    hook = lambda context, choose: met.append(context.layer) or choose()  # noqa: E731
    assert torch.equal(Observed(policy, hook).select(context).src, policy.select(context).src)
    assert len(Observed(None, hook).select(context).src) == 0
    assert met == [0, 0]


def test_calibrated_threshold_lets_the_wanted_share_merge():
    def run(observer):
        for seed in range(20):
            observer.select(make_context([101, 77], seed))

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
