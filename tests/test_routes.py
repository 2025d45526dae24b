import json

import pytest
import tiny
from tokmerge import routes
from tokmerge.language import Pruning
from tokmerge.local import LocalThreshold
from tokmerge.outliers import OutlierMerging
from tokmerge.policies import Threshold, TopR
from tokmerge.routes import Route
from tokmerge.spaces import Configuration

ROUTES = [
    Route(None),
    Route(LocalThreshold((0.9, 0.8, 1.0, 0.7), (1, 2, 3, 9)), "int8", positions="first", weights="size"),
    Route(OutlierMerging(3, 0.5), output_policy=TopR(3), cut="projector", pruning=Pruning(1, 0.25)),
]


@pytest.mark.parametrize("route", ROUTES)
def test_json_and_back(route):
    assert routes.from_json(json.loads(json.dumps(routes.to_json(route)))) == route


def test_every_choice_reaches_the_model():
    model = tiny.llava()
    merged = routes.take(model, ROUTES[2])
    assert (merged.tower.policy, merged.output_policy, merged.pruning) == (
        OutlierMerging(3, 0.5), TopR(3), Pruning(1, 0.25),
    )  # fmt: skip
    assert merged.cut == "projector"
    merged = routes.take(model, ROUTES[1])
    assert (merged.positions, merged.weights, merged.precision) == ("first", "size", "int8")
    plain = routes.take(model, Configuration(Threshold(0.9), "int4"))
    assert (plain.positions, plain.weights, plain.precision) == ("consecutive", "one", "int4")


def test_rows_tell_routes_apart():
    rows = [route.row() for route in ROUTES]
    assert rows[1]["thresholds"] == (0.9, 0.8, 1.0, 0.7)
    assert rows[2]["output_policy"] == "TopR(r=3, feature='keys')"
    assert rows[2]["pruning"] == "Pruning(layer=1, keep=0.25)"
    assert rows[0]["policy"] == "None"
    assert len({json.dumps(row) for row in rows}) == 3


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="Magic"):
        routes.from_json({"policy": {"kind": "Magic"}})
    with pytest.raises(ValueError, match="colour"):
        routes.from_json({"policy": None, "colour": "red"})
