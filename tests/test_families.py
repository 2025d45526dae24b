import numpy as np
import pytest
import tokmerge
from conftest import build
from tokmerge import families
from tokmerge.policies import Calibration, PiToMe, Policy, TopR

CALIBRATION = Calibration(np.tile(np.linspace(0.2, 1, 11), (4, 1)))
STATISTICS = ([0.5] * 4, [0.1] * 4)
SPACES = families.families(4, 64, CALIBRATION, STATISTICS, parameters=4)


@pytest.mark.parametrize("name", SPACES)
def test_a_method_runs_from_nothing_to_nearly_everything(name, images):
    space = SPACES[name]
    least, most = ({k: v[side] for k, v in space.bounds.items()} for side in (0, 1))
    if not space.rising:
        least, most = most, least
    found = [space.configuration(parameters).policy for parameters in (least, most)]
    assert all(isinstance(policy, Policy) for policy in found)
    model = build()
    tokens = [tokmerge.patch(model, policy)(images)[1].tokens[:, -1].float().mean() for policy in found]
    if name != "relative threshold":  # three deviations above the mean there is still a pair now and then
        assert tokens[0] == 65
    assert tokens[1] < 22
    assert len(space.bounds) == 4


def test_every_method_is_its_own_search():
    about = [str(sorted(space.about.items(), key=str)) for space in SPACES.values()]
    assert len(set(about)) == len(SPACES)


def test_schedules_are_whole_numbers_over_the_depth():
    space = families.families(4, 64, CALIBRATION, STATISTICS, parameters=4)
    choice = {"r_00": 1.4, "r_01": 2.6, "r_02": 0.0, "r_03": 48.0}
    assert space["ToMe"].configuration(choice).policy == TopR((1, 3, 0, 48))
    assert space["PiToMe"].configuration(choice).policy == PiToMe((1, 3, 0, 48))
    two = {"prune_00": 0.0, "prune_01": 6.0, "merge_00": 9.0, "merge_01": 3.0}
    assert space["DiffRate"].configuration(two).policy == tokmerge.StaticRates((0, 2, 4, 6), (9, 7, 5, 3))


def test_an_odd_number_of_parameters_is_named():
    with pytest.raises(ValueError, match="parameters is 5: an even number"):
        families.families(4, 64, CALIBRATION, STATISTICS, parameters=5)
