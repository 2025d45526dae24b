import json

import numpy as np
import pandas as pd
import pytest
import tiny
import tokmerge
import torch
from tokmerge import data, exposure, models, scenes
from tokmerge.privacy import Defence


@pytest.fixture(scope="module")
def inputs_dir(tmp_path_factory):
    """What 10_inputs writes, for the photos that ship."""
    folder = tmp_path_factory.mktemp("inputs")
    ids = {split: data.load("sample", split).ids for split in ("train", "test")}
    rows = [("search", identifier) for identifier in ids["train"][:100]]
    rows += [("test", identifier) for identifier in ids["test"][:48]]
    pd.DataFrame(rows, columns=["split", "id"]).to_parquet(folder / "splits.parquet")
    params = {"dataset": "sample", "data_path": None, "search_source": "train", "test_source": "test",
              "model_name": "fashion-vit", "checkpoint": None}  # fmt: skip
    (folder / "inputs.json").write_text(json.dumps({"params": params}))
    return folder


class Always(torch.nn.Module):
    """A judge that sees the same class everywhere."""

    def __init__(self):
        super().__init__()
        self.scores = torch.nn.Parameter(torch.eye(10)[3])

    def forward(self, images):
        return self.scores.expand(len(images), -1)


@pytest.fixture(scope="module")
def setting(inputs_dir):
    return exposure.classification(inputs_dir, "train", 40, 24, batch_size=24, judge=Always())


def test_public_images_are_none_of_the_others(setting, inputs_dir):
    splits = pd.read_parquet(inputs_dir / "splits.parquet")
    model = models.load("fashion-vit")
    taken = data.load("sample", "train")
    taken = data.tensors(data.subset(taken, range(100)), models.transform(model)).images
    taken = exposure.unnormalise(taken, *exposure.normalisation(model)).flatten(1)
    distance = torch.cdist(setting.public.flatten(1).double(), taken.double())
    assert distance.min() > 0
    inputs = json.loads((inputs_dir / "inputs.json").read_text())
    with pytest.raises(ValueError, match="train, has 156 images besides search and test, not 157"):
        exposure.public_images(inputs, splits, "train", 157, models.transform(model))


def test_images_survive_the_way_to_pixels_and_back(setting):
    test = data.tensors(
        data.subset(data.load("sample", "test"), range(24)), models.transform(models.load("fashion-vit"))
    )
    assert torch.allclose(setting.normalise(setting.images()), test.images, atol=1e-5)
    assert torch.equal(setting.groups, test.labels)


def test_an_attack_is_measured_on_every_test_image(setting):
    defence = Defence("merged", "threshold", (0.9,) * 12, precision="int8")
    found = setting.attack("map", defence, seed=1, steps=2, batch_size=8, lr=1e-3, n_check=8, width=16)
    assert found.rebuilt.shape == (24, 1, 28, 28)
    assert len(found.table) == 24
    labels = setting.groups.numpy()
    np.testing.assert_array_equal(found.table.hit, labels == 3)
    np.testing.assert_allclose(found.table.relative.mean(), 1.0)
    merged = tokmerge.patch(models.load("fashion-vit"), defence.policy, precision="int8")
    with torch.inference_mode():
        logits, record = merged(setting.normalise(setting.images()))
    assert (found.table.server_hit == (logits.argmax(1).numpy() == labels)).mean() > 0.9
    # Where float16 tokens merge once more or less than float32 ones, lengths would differ; they do not here.
    np.testing.assert_array_equal(found.table.bytes, record.payload_bytes)
    np.testing.assert_array_equal(found.table.tokens, record.tokens[:, -1])
    again = setting.attack("map", defence, seed=1, steps=2, batch_size=8, lr=1e-3, n_check=8, width=16)
    pd.testing.assert_frame_equal(found.table, again.table)


def test_tokens_are_intercepted_once_for_a_policy(setting, monkeypatch):
    setting.heard(Defence("merged", "threshold", (0.9,) * 12))
    monkeypatch.setattr(setting, "listen", None)
    setting.heard(Defence("merged, int4", "threshold", (0.9,) * 12, precision="int4"))
    with pytest.raises(TypeError):
        setting.heard(Defence("merged", "threshold", (0.9,) * 12), split_layer=6)


def test_a_judge_that_is_never_right_is_refused(setting, monkeypatch):
    monkeypatch.setattr(setting, "hits", lambda images: torch.zeros(len(images)))
    with pytest.raises(ValueError, match="teach it longer"):
        setting.clean()


def test_a_tower_is_attacked_by_the_same_means():
    tower = tiny.tower()
    images = torch.randint(0, 256, (24, 3, 32, 32), dtype=torch.uint8)
    half = torch.full((3,), 0.5)
    setting = exposure.tower(tower, -2, images[:16], images[16:], half, half, lambda part: torch.ones(len(part)), 8)
    found = setting.attack("map", Defence("unmerged"), steps=1, batch_size=8, lr=1e-3, n_check=8, width=16)
    assert found.rebuilt.shape == (8, 3, 32, 32)
    assert (found.table.tokens == 64).all()
    assert "server_hit" not in found.table
    hidden = tower(setting.normalise(setting.images()), output_hidden_states=True).hidden_states[-2][:, 1:]
    heard = setting.heard(Defence("unmerged"))[1]
    assert torch.allclose(heard.x.float().view(8, 64, -1), hidden, atol=2e-2)


def test_a_timm_judge_takes_pictures_and_normalises_them(monkeypatch):
    model = models.load("fashion-vit")
    monkeypatch.setattr(models, "load", lambda name: model)
    images = torch.rand(4, 1, 28, 28)
    with torch.inference_mode():
        expected = model((images - models.FASHION_MEAN) / models.FASHION_STD)
        torch.testing.assert_close(exposure.timm_judge("any", "cpu")(images), expected)


def test_scene_hits_look_at_the_cells_that_show_something():
    kinds = np.full((2, 9), -1)
    kinds[0, [0, 4]] = 3, 5
    kinds[1, 8] = 2
    images = torch.zeros(2, 3, 84, 84)
    images[0, :, :28, :28] = 0.3  # names itself 3
    images[0, :, 28:56, 28:56] = 0.4  # names itself 4
    images[1, :, 56:, 56:] = 0.2

    class Brightness(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.classes = torch.nn.Parameter(torch.eye(10))

        def forward(self, cells):
            return self.classes[(cells.mean((1, 2, 3)) * 10).round().long()]

    hits = exposure.scene_hits(Brightness(), kinds)
    assert hits(images).tolist() == [0.5, 1.0]
    assert hits(images[:1]).tolist() == [0.5]
    assert scenes.PHOTO == 28
