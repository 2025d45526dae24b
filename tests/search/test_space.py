import numpy as np
import pytest
from tokmerge.merging.policies import Threshold
from tokmerge.models.configuration import Configuration
from tokmerge.search.space import FARTHEST, Space, threshold_space


def test_spaces_map_parameters_to_thresholds():
    space = threshold_space(4)
    assert space.bounds == dict.fromkeys(["root_00", "root_01", "root_02", "root_03"], (0.0, 1.0))
    found = space.configuration(dict(zip(space.bounds, (0.0, 0.5, 0.8, 1.0), strict=True))).policy
    np.testing.assert_allclose(found.thresholds, 1 - FARTHEST * np.array([0, 0.25, 0.64, 1]))
    assert space.configuration(dict.fromkeys(space.bounds, 0.0)).policy == Threshold([1.0] * 4)


def test_knots_are_interpolated_over_the_depth():
    schedule = threshold_space(4, knots=2)
    assert list(schedule.bounds) == ["root_00", "root_01"]
    found = schedule.configuration({"root_00": 0.0, "root_01": 0.9}).policy
    np.testing.assert_allclose(found.thresholds, 1 - FARTHEST * np.array([0.0, 0.3, 0.6, 0.9]) ** 2)
    point = {f"root_{i:02d}": i / 4 for i in range(4)}
    assert threshold_space(4, knots=4).configuration(point) == threshold_space(4).configuration(point)


def test_what_tells_spaces_apart():
    spaces = [threshold_space(4), threshold_space(4, feature="keys"), threshold_space(4, 3), threshold_space(5, 3)]
    assert len({str(space.about) for space in [*spaces, threshold_space(4)]}) == 4


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


def test_too_few_knots_are_named():
    with pytest.raises(ValueError, match="1 knots over 4 blocks: use 2 to 4"):
        threshold_space(4, 1)


def test_scalars_do_not_vary_over_the_depth():
    def build(tau, coarse):
        return Configuration(Threshold(tau), "int8" if coarse > 0.5 else "int4", split_layer=2)

    space = Space(4, {"tau": (0.5, 1.0)}, build, knots=2, scalars={"coarse": (0.0, 1.0)})
    assert space.bounds == {"tau_00": (0.5, 1.0), "tau_01": (0.5, 1.0), "coarse": (0.0, 1.0)}
    found = space.configuration({"tau_00": 1.0, "tau_01": 0.7, "coarse": 0.6})
    np.testing.assert_allclose(found.policy.thresholds, [1.0, 0.9, 0.8, 0.7])
    assert (found.precision, found.split_layer) == ("int8", 2)
    assert np.array([list(point.values()) for point in space.sobol(8, seed=0)]).shape == (8, 3)
