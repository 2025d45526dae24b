import pytest
from conftest import save_inputs
from tokmerge.data import fashion_mnist
from tokmerge.evaluation.inputs import open_inputs


def test_inputs_are_what_was_recorded(tmp_path):
    ids = {"search": fashion_mnist.sample("train").ids[5:9], "test": fashion_mnist.sample("test").ids[:3]}
    inputs = open_inputs(save_inputs(tmp_path, ids))
    assert list(inputs.images("search").ids) == ids["search"]
    assert [example.id for example in inputs.images("test").examples()] == ids["test"]
    assert [example.id for example in inputs.images("test", 1, skip=1).examples()] == ids["test"][1:2]
    with pytest.raises(ValueError, match="unknown split 'val'"):
        inputs.images("val")
    save_inputs(tmp_path, ids | {"search": ["train-99999", *ids["search"][1:]]})
    with pytest.raises(ValueError, match="3 of the 4 recorded search images"):
        open_inputs(tmp_path).images("search")
