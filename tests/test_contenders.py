import pytest
import tiny
from tokmerge import contenders, routes
from tokmerge.language import Pruning
from tokmerge.policies import Threshold

OPTIONS = {"positions": "first", "weights": "size"}


def test_every_space_has_as_many_parameters_and_builds_routes_that_fit():
    model = tiny.llava()
    for name, space in contenders.spaces(4, 64, 4, **OPTIONS).items():
        assert len(space.bounds) == 4, name
        for parameters in space.curve(3) + space.sobol(4, 0):
            merged = routes.take(model, space.configuration(parameters))
            assert (merged.positions, merged.weights) == ("first", "size")


def test_the_spaces_mean_what_they_say():
    spaces = contenders.spaces(4, 64, 4)
    route = spaces["local threshold"].configuration({"root_00": 0.0, "root_01": 0.3, "root_02": 1.0, "window": 2.6})
    assert route.policy.window == 3
    # Roots 0, 0.2, 0.3 + 0.7 / 3 and 1.
    assert route.policy.thresholds == pytest.approx((1.0, 0.984, 1 - 2 * (1.6 / 3) ** 3, -1.0))
    assert spaces["local threshold"].bounds["window"] == (1.5, 4.5)
    assert spaces["threshold"].configuration({f"root_{i:02d}": 0.5 for i in range(4)}).policy == Threshold((0.75,) * 4)
    assert spaces["ToMe"].bounds["r_00"] == (0.0, 3 * 64 / 4)
    with pytest.raises(ValueError, match="parameters is 2"):
        contenders.spaces(4, 64, 2)


def test_every_grid_runs_from_little_to_much():
    model = tiny.llava()
    grids = contenders.grids(4, 2, 64, 3, **OPTIONS)
    for name, grid in grids.items():
        assert len(grid) == len(set(grid)), name
        for route in grid:
            routes.take(model, route)
    assert {route.pruning.layer for route in grids["FastV"]} == {1}
    assert len(contenders.grids(4, 5, 64, 3)["FastV"]) == 6
    assert grids["FastV"][-1].pruning == Pruning(1, 0.05)
    assert grids["attention, last layer"][0].policy.r == (0, 0, 0, 6)
    assert [route.policy.r for route in grids["ToMe constant"]] == [2, 8, 15]
