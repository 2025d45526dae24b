import pytest
import tiny
import tokmerge
import torch
from conftest import build
from tokmerge.merging.matching import Policy
from tokmerge.merging.policies import PiToMe, Threshold, TopR
from tokmerge.models import llava
from tokmerge.models.configuration import Configuration
from tokmerge.models.language_model import Pruning
from tokmerge.search import methods

STATISTICS = ([0.5] * 4, [0.1] * 4)
OPTIONS = {"positions": "first", "weights": "size"}
# Roots of shares.
SCHEDULE = {"root_00": 0.5**0.5, "root_01": 1.0, "root_02": 0.3**0.5, "root_03": 0.0}
CALIBRATION = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(7))


def run(policy: Policy) -> None:
    tokmerge.patch(build(), policy)(CALIBRATION)


@pytest.fixture(scope="module")
def spaces():
    return methods.image_spaces(4, 64, STATISTICS, 4, run)


def test_every_method_runs_from_nothing_to_nearly_everything(spaces, images):
    model = build()
    for name, space in spaces.items():
        # Relative thresholds merge less the higher they are.
        sides = {key: bounds[::-1] if key[0] == "z" else bounds for key, bounds in space.bounds.items()}
        least, most = ({key: bounds[side] for key, bounds in sides.items()} for side in (0, 1))
        found = [space.configuration(parameters).policy for parameters in (least, most)]
        assert all(isinstance(policy, Policy) for policy in found), name
        tokens = [tokmerge.patch(model, policy)(images)[1].tokens[:, -1].float().mean() for policy in found]
        if name != "relative threshold":  # three deviations above the mean there is still a pair now and then
            assert tokens[0] == 65, name
        assert tokens[1] < 22, name
        assert len(space.bounds) == 4, name


def test_every_method_is_its_own_search(spaces):
    about = [str(sorted(space.about.items(), key=str)) for space in spaces.values()]
    assert len(set(about)) == len(spaces)


def test_schedules_take_their_counts(spaces):
    assert spaces["ToMe"].configuration(SCHEDULE).policy == TopR((16, 24, 4, 0))
    assert spaces["ToMe on tokens"].configuration(SCHEDULE).policy == TopR((16, 24, 4, 0), feature="tokens")
    assert spaces["PiToMe"].configuration(SCHEDULE).policy == PiToMe((16, 24, 4, 0), unprotected=0.5)
    assert spaces["AdaMerge"].configuration(SCHEDULE).policy.r == (32, 48, 8, 0)
    two = {"prune_00": 0.0, "prune_01": 1.0, "merge_00": 0.6, "merge_01": 0.6}
    # Pruned are 0, 1/9, 4/9 and 1 of what may go, merged 0.36 of it.
    # 64: 0 and 12 -> 52: 3 and 9 -> 40: 9 and 5 -> 26: 13 and 2.
    assert spaces["DiffRate"].configuration(two).policy == tokmerge.StaticRates((0, 3, 9, 13), (12, 9, 5, 2))


def test_the_calibrated_threshold_is_searched_by_what_calibration_images_lose(spaces):
    policy = spaces["calibrated threshold"].configuration(SCHEDULE).policy
    assert isinstance(policy, Threshold)
    tokens = tokmerge.patch(build(), policy)(CALIBRATION)[1].tokens.float().mean(0)
    assert (tokens[:-1] - tokens[1:]).tolist() == [16, 24, 4, 0]


def test_precision_is_searched_beside_the_policy(spaces):
    space = methods.sent_space(spaces["threshold"], [2], ["float16", "int8", "int4"])
    shares = dict.fromkeys(spaces["threshold"].bounds, 0.5)
    policy = spaces["threshold"].configuration(shares).policy
    for coarseness, precision in ((0.0, "float16"), (0.99, "float16"), (1.0, "int8"), (2.5, "int4"), (3.0, "int4")):
        assert space.configuration({**shares, "coarseness": coarseness}) == Configuration(policy, precision, 2)
    assert space.bounds["coarseness"] == (0.0, 3.0)


def test_where_to_cut_is_searched_beside_it(spaces):
    space = methods.sent_space(spaces["ToMe"], [1, 4], ["float16", "int8"])
    choice = dict.fromkeys(spaces["ToMe"].bounds, 0.5)
    policy = spaces["ToMe"].configuration(choice).policy
    for cut, split in ((0.0, 1), (0.99, 1), (1.0, 4), (2.0, 4)):
        assert space.configuration({**choice, "coarseness": 1.5, "cut": cut}) == Configuration(policy, "int8", split)
    assert space.bounds["cut"] == (0.0, 2.0)


@pytest.mark.parametrize("parameters", [5, 2])
def test_unfitting_numbers_of_parameters_are_named(parameters):
    with pytest.raises(ValueError, match=f"parameters is {parameters}: an even number"):
        methods.image_spaces(4, 64, STATISTICS, parameters, run)


def test_every_question_space_has_as_many_parameters_and_fits_the_model():
    model = tiny.llava()
    for name, space in methods.question_spaces(4, 64, 4, **OPTIONS).items():
        assert len(space.bounds) == 4, name
        for parameters in space.curve(3) + space.sobol(4, 0):
            merged = llava.patch_llava(model, space.configuration(parameters))
            assert (merged.positions, merged.weights) == ("first", "size")


def test_question_spaces_mean_what_they_say():
    spaces = methods.question_spaces(4, 64, 4)
    point = spaces["local threshold"].configuration({"root_00": 0.0, "root_01": 0.3, "root_02": 1.0, "window": 2.6})
    assert point.policy.window == 3
    # Roots 0, 0.2, 0.3 + 0.7 / 3 and 1.
    assert point.policy.thresholds == pytest.approx((1.0, 0.984, 1 - 2 * (1.6 / 3) ** 3, -1.0))
    assert spaces["local threshold"].bounds["window"] == (1.5, 4.5)
    assert spaces["threshold"].configuration({f"root_{i:02d}": 0.5 for i in range(4)}).policy == Threshold((0.75,) * 4)
    assert spaces["ToMe"].bounds["r_00"] == (0.0, 3 * 64 / 4)
    with pytest.raises(ValueError, match="parameters is 2"):
        methods.question_spaces(4, 64, 2)


def test_every_grid_runs_from_little_to_much():
    model = tiny.llava()
    grids = methods.question_grids(4, 2, 64, 3, **OPTIONS)
    for name, grid in grids.items():
        assert len(grid) == len(set(grid)), name
        for point in grid:
            llava.patch_llava(model, point)
    assert {point.pruning.layer for point in grids["FastV"]} == {1}
    assert len(methods.question_grids(4, 5, 64, 3)["FastV"]) == 6
    assert grids["FastV"][-1].pruning == Pruning(1, 0.05)
    assert grids["attention, last layer"][0].policy.r == (0, 0, 0, 6)
    assert [point.policy.r for point in grids["ToMe constant"]] == [2, 8, 15]
