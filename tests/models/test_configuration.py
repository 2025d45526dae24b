import json

import pytest
import tiny
from tokmerge import LocalThreshold, StaticRates, Threshold, TopR
from tokmerge.merging.peers import OutlierMerging
from tokmerge.models import configuration, llava
from tokmerge.models.configuration import Configuration, LlavaConfiguration, Pruning

CONFIGURATIONS = [
    Configuration(None),
    Configuration(StaticRates((1, 2), 3), "int8", split_layer=6),
    LlavaConfiguration(None),
    LlavaConfiguration(LocalThreshold((0.9, 0.8, 1.0, 0.7), (1, 2, 3, 9)), "int8", positions="first", weights="size"),
    LlavaConfiguration(OutlierMerging(3, 0.5), output_policy=TopR(3), cut="projector", pruning=Pruning(1, 0.25)),
]


@pytest.mark.parametrize("original", CONFIGURATIONS)
def test_json_and_rows_and_back(original):
    plain = json.loads(json.dumps(configuration.to_json(original)))
    row = original.row()
    for found in (configuration.from_json(plain), configuration.from_row(row)):
        assert found == original
        assert type(found) is type(original)
    assert row["policy"] == type(original.policy).__name__


def test_every_choice_reaches_the_model():
    model = tiny.llava()
    merged = llava.patch_llava(model, CONFIGURATIONS[4])
    assert merged.tower.policy == OutlierMerging(3, 0.5)
    assert (merged.output_policy, merged.pruning, merged.cut) == (TopR(3), Pruning(1, 0.25), "projector")
    merged = llava.patch_llava(model, CONFIGURATIONS[3])
    assert (merged.positions, merged.weights, merged.precision) == ("first", "size", "int8")
    plain = llava.patch_llava(model, Configuration(Threshold(0.9), "int4"))
    assert (plain.tower.policy, plain.positions, plain.weights) == (Threshold(0.9), "consecutive", "one")
    assert plain.precision == "int4"


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ({"policy": {"kind": "Magic"}}, "unknown policy 'Magic': use one of PiToMe"),
        ({"policy": {"kind": "TopR", "q": 3}}, "TopR.*'q'"),
        ({"policy": None, "positions": "first", "size": 3, "age": 4}, "an operating point with age, size: this"),
    ],
)
def test_unknown_names_are_refused(plain, message):
    with pytest.raises(ValueError, match=message):
        configuration.from_json(plain)
