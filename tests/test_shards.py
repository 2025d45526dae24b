"""Evaluation in shards, on the paper profile's path: a local checkpoint of a real timm model, images in folders."""

from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import timm
import tokmerge
import torch
from PIL import Image
from tokmerge import evaluate, models, shards, store
from tokmerge.data import batches, image_folder
from tokmerge.spaces import Configuration

NAME = "deit_small_patch16_224"
CONFIGURATIONS = {"unmerged": Configuration(None), "ToMe": Configuration(tokmerge.TopR(12))}


@pytest.fixture(scope="module")
def inputs_dir(tmp_path_factory):
    """What 10_inputs leaves behind for ImageNet's validation images in folders and a local checkpoint."""
    folder = tmp_path_factory.mktemp("imagenet")
    rng = np.random.default_rng(0)
    for kind in ("n01440764", "n01443537"):
        (folder / "val" / kind).mkdir(parents=True)
        for i in range(4):
            coarse = rng.integers(0, 256, (6, 8, 3), np.uint8)
            photo = Image.fromarray(coarse).resize((300, 240), Image.Resampling.BILINEAR)
            photo.save(folder / "val" / kind / f"ILSVRC2012_val_{i:08d}.JPEG")
    torch.manual_seed(0)
    model = timm.create_model(NAME, pretrained=False)
    safetensors.torch.save_file(model.state_dict(), folder / "deit.safetensors")
    ids = image_folder(folder / "val").ids
    splits = pd.DataFrame({"split": ["search"] + ["test"] * 7, "id": ids, "label": 0})
    store.save_table(splits, folder / "inputs" / "splits.parquet")
    params = {"dataset": "imagefolder", "data_path": str(folder / "val"), "search_source": "val", "test_source": "val"}
    params |= {"model_name": NAME, "checkpoint": str(folder / "deit.safetensors")}
    store.save_json({"dataset": "ImageFolder val", "params": params}, folder / "inputs" / "inputs.json")
    return folder / "inputs"


@pytest.fixture(scope="module")
def expected(inputs_dir):
    """The rows without shards: the model on all images, one after the other."""
    evaluation = shards.load(str(inputs_dir))
    rows = {}
    for name, configuration in CONFIGURATIONS.items():
        merged = tokmerge.patch(evaluation.model, configuration.policy)
        outcome = evaluate.run(merged, batches(evaluation.images, models.transform(evaluation.model), 1))
        rows[name] = outcome.frame().assign(counts=outcome.tokens.tolist())
    return rows


def evaluated(folder, inputs_dir, size, n_workers=1, ray_address=None):
    evaluation = shards.load(str(inputs_dir), batch_size=4)
    planned = shards.plan(folder, CONFIGURATIONS, len(evaluation.images), size, {"model": NAME})
    load = partial(shards.load, str(inputs_dir), 4)
    shards.run(planned, evaluation, load, n_workers, ray_address)
    return {name: shards.table(planned, configuration) for name, configuration in CONFIGURATIONS.items()}


def assert_same(found, expected):
    for name, rows in expected.items():
        table = found[name]
        for column in ("id", "label", "prediction", "macs", "payload_bytes"):
            assert table[column].tolist() == rows[column].tolist(), (name, column)
        assert [list(counts) for counts in table.tokens] == rows.counts.tolist()
        np.testing.assert_allclose(table.loss, rows.loss, atol=1e-4)
    assert found["ToMe"].tokens_sent.tolist() == [197 - 12 * 12] * 7


@pytest.mark.parametrize(
    ("size", "n_workers", "ray_address"), [(7, 1, None), (3, 1, None), (5, 2, None), (4, 1, "local")]
)
def test_rows_do_not_depend_on_shards_or_workers(tmp_path, inputs_dir, expected, size, n_workers, ray_address):
    assert_same(evaluated(tmp_path, inputs_dir, size, n_workers, ray_address), expected)


def fake(done, broken=()):
    """Writes a row per image, and fails on shards that begin at a broken image."""

    def evaluation(shard):
        done.append((shard.start, shard.stop))
        if shard.start in broken:
            raise OSError("disk full")
        store.save_table(pd.DataFrame({"id": range(shard.start, shard.stop)}), shard.path)
        return {"n_images": shard.stop - shard.start}

    return evaluation


def test_either_split_is_evaluated_and_its_size_is_checked(inputs_dir):
    recorded = store.load_table(inputs_dir / "splits.parquet")
    for split in ("search", "test"):
        assert shards.load(str(inputs_dir), split=split).images.ids == recorded.id[recorded.split == split].tolist()
    some = shards.load(str(inputs_dir), n_images=2, skip=3).images.ids
    assert some == recorded.id[recorded.split == "test"].tolist()[3:5]
    with pytest.raises(ValueError, match="6 images after the first 3 are asked for: the test split has 7"):
        shards.load(str(inputs_dir), n_images=6, skip=3)
    with pytest.raises(ValueError, match="unknown split 'val'"):
        shards.load(str(inputs_dir), split="val")


def test_a_failed_shard_is_named_and_the_next_run_goes_on(tmp_path):
    planned = shards.plan(tmp_path, {"unmerged": Configuration(None)}, 10, 4, {})
    assert [(shard.start, shard.stop) for shard in planned] == [(0, 4), (4, 8), (8, 10)]
    done = []
    with pytest.raises(RuntimeError, match="1 of 3 shards failed; the first: images 4 to 8: OSError: disk full"):
        shards.run(planned, fake(done, broken=[4]), dict)
    shards.run(planned, fake(done), dict)
    assert done == [(0, 4), (4, 8), (8, 10), (4, 8)]
    shards.run(planned, fake(done), dict)
    assert len(done) == 4
    assert shards.table(planned, Configuration(None)).id.tolist() == list(range(10))


def test_other_data_or_configurations_have_other_files(tmp_path):
    def paths(configuration, about):
        return {shard.path for shard in shards.plan(tmp_path, {"x": configuration}, 8, 4, about)}

    kinds = [(Configuration(None), {}), (Configuration(None), {"model": "b"}), (CONFIGURATIONS["ToMe"], {})]
    assert len(set.union(*(paths(*kind) for kind in kinds))) == 6
    assert len(shards.plan(tmp_path, {"x": Configuration(None), "y": Configuration(None)}, 8, 4, {})) == 2
    with pytest.raises(ValueError, match="shard_size is 0"):
        shards.plan(tmp_path, CONFIGURATIONS, 8, 0, {})


def test_nothing_is_left_of_a_shard_that_was_interrupted(tmp_path, inputs_dir, monkeypatch):
    evaluation = shards.load(str(inputs_dir), n_images=2)
    (shard,) = shards.plan(tmp_path / "work", {"unmerged": Configuration(None)}, 2, 2, {})

    def killed(self, path, **options):
        Path(path).write_bytes(b"PAR1 half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(pd.DataFrame, "to_parquet", killed)
        with pytest.raises(KeyboardInterrupt):
            evaluation(shard)
    assert list((tmp_path / "work").iterdir()) == []
    assert evaluation(shard) == {"n_images": 2}
