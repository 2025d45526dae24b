import numpy as np
import pytest
from tokmerge.merging.calibration import Calibration
from tokmerge.merging.policies import Threshold
from tokmerge.models.configuration import Configuration
from tokmerge.search.space import FARTHEST, Space, threshold_space

CALIBRATION = Calibration(np.tile(np.linspace(0.5, 1, 11), (4, 1)))


def test_spaces_map_parameters_to_thresholds():
    calibrated = threshold_space(4, calibration=CALIBRATION)
    assert list(calibrated.bounds) == ["u_00", "u_01", "u_02", "u_03"]
    point = dict(zip(calibrated.bounds, (0.0, 0.2, 0.5, 1.0), strict=True))
    assert calibrated.configuration(point).policy == Threshold(CALIBRATION.thresholds([0.0, 0.2, 0.5, 1.0]))
    raw = threshold_space(4)
    assert set(raw.bounds.values()) == {(0.0, 1.0)}
    found = raw.configuration(dict(zip(raw.bounds, (0.0, 0.5, 0.8, 1.0), strict=True))).policy
    np.testing.assert_allclose(found.thresholds, 1 - FARTHEST * np.array([0, 0.25, 0.64, 1]))
    assert raw.configuration(dict.fromkeys(raw.bounds, 0.0)).policy == Threshold([1.0] * 4)


def test_knots_are_interpolated_over_the_depth():
    schedule = threshold_space(4, calibration=CALIBRATION, knots=2)
    assert list(schedule.bounds) == ["u_00", "u_01"]
    found = schedule.configuration({"u_00": 0.0, "u_01": 0.9}).policy
    np.testing.assert_allclose(found.thresholds, CALIBRATION.thresholds([0.0, 0.3, 0.6, 0.9]))
    full = threshold_space(4, calibration=CALIBRATION, knots=4)
    point = {f"u_{i:02d}": i / 4 for i in range(4)}
    assert full.configuration(point) == threshold_space(4, calibration=CALIBRATION).configuration(point)


def test_what_tells_spaces_apart():
    other = Calibration(CALIBRATION.quantiles - 0.1)
    given = ((None, CALIBRATION), (None, other), (3, other))
    shares = [threshold_space(4, knots, calibration=one) for knots, one in given]
    spaces = [*shares, threshold_space(4), threshold_space(4, feature="keys")]
    assert len({str(space.about) for space in [*spaces, threshold_space(4, calibration=CALIBRATION)]}) == 5


def test_curve_and_sobol_points_are_inside_the_bounds():
    space = threshold_space(4)
    assert [set(point.values()) for point in space.curve(3)] == [{0.25}, {0.5}, {0.75}]
    points = space.sobol(16, seed=1)
    values = np.array([list(point.values()) for point in points])
    assert values.shape == (16, 4)
    assert ((values >= 0) & (values <= 1)).all()
    # Space-filling: of 16 points every half of every parameter holds 8.
    assert ((values < 0.5).sum(0) == 8).all()
    assert points == space.sobol(16, seed=1) != space.sobol(16, seed=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((5, None, "tokens", CALIBRATION), "needs a calibration of 5 layers"),
        ((4, 1), "1 knots over 4 blocks: use 2 to 4"),
    ],
)
def test_bad_spaces_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        threshold_space(*arguments)


def test_scalars_do_not_vary_over_the_depth():
    def build(tau, coarse):
        return Configuration(Threshold(tau), "int8" if coarse > 0.5 else "int4", split_layer=2)

    space = Space(4, {"tau": (0.5, 1.0)}, build, knots=2, scalars={"coarse": (0.0, 1.0)})
    assert space.bounds == {"tau_00": (0.5, 1.0), "tau_01": (0.5, 1.0), "coarse": (0.0, 1.0)}
    found = space.configuration({"tau_00": 1.0, "tau_01": 0.7, "coarse": 0.6})
    np.testing.assert_allclose(found.policy.thresholds, [1.0, 0.9, 0.8, 0.7])
    assert (found.precision, found.split_layer) == ("int8", 2)
    assert np.array([list(point.values()) for point in space.sobol(8, seed=0)]).shape == (8, 3)
