import numpy as np
import pandas as pd
from tokmerge.search import pareto

COLUMNS = ["kl", "macs_ratio", "bytes_ratio"]


def brute_force(values):
    """Positions that no other point beats: as good everywhere, better somewhere."""
    beaten = [any((other <= one).all() and (other < one).any() for other in values) for one in values]
    return {position for position, lost in enumerate(beaten) if not lost}


def test_best_is_what_no_other_point_beats():
    rng = np.random.default_rng(0)
    for n in (1, 2, 30):
        values = rng.integers(0, 5, (n, 3)) / 5
        best = pareto.best(pd.DataFrame(values, columns=COLUMNS), "kl")
        assert set(best.index) == brute_force(values)
        assert best.macs_ratio.is_monotonic_increasing


def test_failed_trials_are_not_on_the_front():
    rows = pd.DataFrame([[0.1, 0.5, 0.5], [np.nan, np.nan, np.nan], [0.2, 0.6, 0.6]], columns=COLUMNS)
    assert pareto.best(rows.assign(status=["completed", "failed", "completed"]), "kl").index.tolist() == [0]


def test_hypervolume_by_hand():
    # Boxes of 0.5 x 0.5 x 0.5 and 0.25 x 0.75 x 0.5 of a unit cube share 0.25 x 0.5 x 0.5.
    values = np.array([[0.5, 0.5, 0.5], [0.75, 0.25, 0.5]])
    assert np.isclose(pareto.hypervolume(values, (1, 1, 1)), 0.125 + 0.09375 - 0.0625)
    # The share does not depend on the scale of an axis.
    assert np.isclose(pareto.hypervolume(values * [0.1, 1, 1], (0.1, 1, 1)), 0.15625)
    assert pareto.hypervolume(np.zeros((1, 3)), (0.1, 1, 1)) == 1
    assert pareto.hypervolume(np.empty((0, 3)), (1, 1, 1)) == 0
    assert pareto.hypervolume(np.array([[0.0, 1.0, 0.2]]), (1, 1, 1)) == 0, "on the edge of the box"


def test_hypervolume_against_counting_random_points():
    rng = np.random.default_rng(1)
    values = rng.random((20, 3))
    darts = rng.random((100_000, 3))
    share = (values[None] <= darts[:, None]).all(2).any(1).mean()
    assert abs(pareto.hypervolume(values, (1, 1, 1)) - share) < 0.006


def test_trace_is_the_hypervolume_of_every_beginning():
    values = np.random.default_rng(2).random((15, 3)) * 1.3
    values[4] = np.nan  # a failed trial
    expected = [pareto.hypervolume(values[: n + 1], (1, 1, 1)) for n in range(len(values))]
    np.testing.assert_allclose(pareto.trace(values, (1, 1, 1)), expected)
