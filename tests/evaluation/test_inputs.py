"""What 10_inputs settled on is found again."""

import pandas as pd
import pytest
from tokmerge.data import fashion_mnist
from tokmerge.evaluation.inputs import open_inputs
from tokmerge.io import store


def test_inputs_are_what_was_recorded(tmp_path):
    params = {
        "dataset": "sample",
        "data_path": None,
        "search_source": "train",
        "test_source": "test",
        "model_name": "fashion-vit",
        "checkpoint": None,
    }
    ids = {"search": fashion_mnist.sample("train").ids[5:9], "test": fashion_mnist.sample("test").ids[:3]}
    splits = pd.DataFrame(
        [(name, identifier) for name, part in ids.items() for identifier in part], columns=["split", "id"]
    )
    store.save_json({"params": params}, tmp_path / "inputs.json")
    store.save_table(splits, tmp_path / "splits.parquet")
    inputs = open_inputs(tmp_path)
    search, test = inputs.images("search"), inputs.images("test")
    assert list(search.ids) == ids["search"]
    assert [example.id for example in test.examples()] == ids["test"]
    splits.loc[0, "id"] = "train-99999"
    assert [example.id for example in inputs.images("test", 1, skip=1).examples()] == ids["test"][1:2]
    with pytest.raises(ValueError, match="unknown split 'val'"):
        inputs.images("val")
    store.save_table(splits, tmp_path / "splits.parquet")
    with pytest.raises(ValueError, match="3 of the 4 recorded search images"):
        open_inputs(tmp_path).images("search")
