import json

import pytest
import tokmerge
from conftest import build
from tokmerge import families
from tokmerge.policies import PiToMe, Policy, Threshold, TopR
from tokmerge.spaces import Configuration

STATISTICS = ([0.5] * 4, [0.1] * 4)


@pytest.fixture(scope="module")
def spaces():
    return families.families(4, 64, STATISTICS, parameters=4)


def test_every_method_runs_from_nothing_to_nearly_everything(spaces, images):
    model = build()
    for name, space in spaces.items():
        # Thresholds merge less the higher they are.
        sides = {key: bounds[::-1] if key[0] in "tz" else bounds for key, bounds in space.bounds.items()}
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


def test_counts_are_shares_of_half_of_what_is_left():
    left, shares, found = 64, [0.5, 1.0, 0.3, 0.0], []
    for share in shares:
        found.append(round(share * (left // 2)))
        left -= found[-1]
    assert families.counts(shares, 64) == tuple(found) == (16, 24, 4, 0)


def test_schedules_take_their_counts(spaces):
    choice = {"share_00": 0.5, "share_01": 1.0, "share_02": 0.3, "share_03": 0.0}
    assert spaces["ToMe"].configuration(choice).policy == TopR((16, 24, 4, 0))
    assert spaces["ToMe on tokens"].configuration(choice).policy == TopR((16, 24, 4, 0), feature="tokens")
    assert spaces["PiToMe"].configuration(choice).policy == PiToMe((16, 24, 4, 0))
    assert spaces["AdaMerge"].configuration(choice).policy.r == (32, 48, 8, 0)
    two = {"prune_00": 0.0, "prune_01": 1.0, "merge_00": 0.5, "merge_01": 0.5}
    # 64 -16 -> 48: 8 and 10 -> 30: 10 and 5 -> 15: 7 and 2.
    assert spaces["DiffRate"].configuration(two).policy == tokmerge.StaticRates((0, 8, 10, 7), (16, 10, 5, 2))


def test_precision_is_searched_beside_the_policy(spaces):
    space = families.sent_space(spaces["threshold"], 2, ["float16", "int8", "int4"])
    shares = dict.fromkeys(spaces["threshold"].bounds, 0.5)
    policy = spaces["threshold"].configuration(shares).policy
    for coarseness, precision in ((0.0, "float16"), (0.99, "float16"), (1.0, "int8"), (2.5, "int4"), (3.0, "int4")):
        found = space.configuration({**shares, "coarseness": coarseness})
        assert found == Configuration(policy, precision, 2)
    assert space.bounds["coarseness"] == (0.0, 3.0)


def test_rows_are_rebuilt(spaces):
    middle = {
        name: {key: (low + high) / 2 for key, (low, high) in space.bounds.items()} for name, space in spaces.items()
    }
    configurations = [space.configuration(middle[name]) for name, space in spaces.items()]
    configurations += [Configuration(None), Configuration(Threshold(0.5), "int8", 3)]
    for configuration in configurations:
        row = json.loads(json.dumps(configuration.row()))
        assert families.rebuild(row) == configuration
    with pytest.raises(ValueError, match="unknown policy 'Nothing'"):
        families.rebuild({"policy": "Nothing", "precision": "int8"})


@pytest.mark.parametrize("parameters", [5, 2])
def test_unfitting_numbers_of_parameters_are_named(parameters):
    with pytest.raises(ValueError, match=f"parameters is {parameters}: an even number"):
        families.families(4, 64, STATISTICS, parameters=parameters)
