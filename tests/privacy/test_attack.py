from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import tiny
import tokmerge
import torch
from conftest import build_dense, save_inputs
from tokmerge import wire
from tokmerge.data import scenes
from tokmerge.data.image_sets import Batch
from tokmerge.data.registry import load_images
from tokmerge.evaluation.inputs import open_inputs
from tokmerge.evaluation.outcomes import agreement
from tokmerge.io.cache import Cache
from tokmerge.privacy import attack
from tokmerge.privacy.defence import Defence

MERGED = Defence("merged", tokmerge.Threshold([0.9] * 12), precision="int8")
TRAINING = {"steps": 2, "check_every": 1, "batch_size": 8, "lr": 1e-3, "n_check": 8, "width": 16}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    ids = {"search": load_images("sample", "train").ids[:100], "test": load_images("sample", "test").ids[:48]}
    return open_inputs(save_inputs(tmp_path_factory.mktemp("inputs"), ids), "cpu")


class ByRule(torch.nn.Linear):
    """A judge that needs no weights, and has some as every judge."""

    def __init__(self, rule):
        super().__init__(1, 1)
        self.rule = rule

    def forward(self, images):
        return self.rule(images)


@pytest.fixture(scope="module")
def target(inputs):
    always_three = ByRule(lambda images: torch.eye(10)[[3] * len(images)])
    return attack.classifier_target(inputs, "train", 40, 24, batch_size=24, judge=always_three)


def test_public_images_are_none_of_the_others(target, inputs):
    taken = inputs.batch("search").images
    taken = attack.unnormalise(taken, *attack.normalisation(inputs.model)).flatten(1)
    assert len(taken) == 100
    assert torch.cdist(target.public.flatten(1).double(), taken.double()).min() > 0
    with pytest.raises(ValueError, match="train, has 156 images besides search, select and test, not 157"):
        attack.public_images(inputs, "train", 157)


def test_images_survive_the_way_to_pixels_and_back(target, inputs):
    test = inputs.batch("test", 24)
    assert torch.allclose(target.normalise(target.originals), test.images, atol=1e-5)
    assert torch.equal(target.groups, test.labels)


def test_an_attack_is_measured_on_every_test_image(target, inputs):
    found = target.attack("map", MERGED, seed=1, **TRAINING)
    assert found.rebuilt.shape == (24, 1, 28, 28)
    assert len(found.table) == 24
    labels = target.groups.numpy()
    np.testing.assert_array_equal(found.table.hit, labels == 3)
    np.testing.assert_allclose(found.table.relative.mean(), 1.0)
    merged = tokmerge.patch(inputs.model, MERGED.policy, precision="int8")
    with torch.inference_mode():
        logits, record = merged(target.normalise(target.originals))
    assert (found.table.server_hit == (logits.argmax(1).numpy() == labels)).mean() > 0.9
    # Where float16 tokens merge once more or less than float32 ones, lengths would differ; they do not here.
    np.testing.assert_array_equal(found.table.bytes, record.payload_bytes)
    np.testing.assert_array_equal(found.table.tokens, record.tokens[:, -1])
    again = target.attack("map", MERGED, seed=1, **TRAINING)
    pd.testing.assert_frame_equal(found.table, again.table)


def test_an_attack_is_made_once_and_read_from_then_on(tmp_path):
    made = attack.Reconstruction(
        pd.DataFrame({"ssim": [0.5, 0.25]}), pd.DataFrame({"step": [1], "loss": [0.5]}), torch.full((2, 1, 2, 2), 0.6)
    )
    cache = Cache(tmp_path, {"seed": 0})
    for make in (lambda: made, pytest.fail):
        found = attack.Reconstruction.cached(cache, "a/b 10 dB", make, 1)
        pd.testing.assert_frame_equal(found.table, made.table)
        pd.testing.assert_frame_equal(found.curve, made.curve)
        assert found.rebuilt.tolist() == [[[[153, 153], [153, 153]]]]


def test_tokens_are_intercepted_once_for_a_policy(target, monkeypatch):
    target.tokens(MERGED)
    monkeypatch.setattr(target, "edge", None)
    target.tokens(Defence("merged, int4", MERGED.policy, precision="int4"))
    with pytest.raises(TypeError):
        target.tokens(MERGED, split_layer=6)


def test_a_judge_that_is_never_right_is_refused(target, monkeypatch):
    monkeypatch.setattr(target, "hits", lambda images: torch.zeros(len(images)))
    with pytest.raises(ValueError, match="train it longer"):
        target.judge_accuracy()


def test_a_dense_model_is_attacked_on_smaller_pictures(monkeypatch):
    model, defence = build_dense(), Defence("merged", tokmerge.Threshold(0.5), precision="int8")
    generator = torch.Generator().manual_seed(0)
    shown, masks = torch.rand(40, 3, 32, 32, generator=generator), torch.rand(24, 32, 32, generator=generator) > 0.5
    mean, std = attack.normalisation(model)
    taken = (shown - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    test = Batch([str(i) for i in range(24)], taken[:24], torch.zeros(24, dtype=torch.long), masks)
    inputs = SimpleNamespace(model=model, device="cpu", batch=lambda split, n: test)
    monkeypatch.setattr(attack, "public_images", lambda *given: (taken[24:], None))
    seen = []

    def judge(images):
        seen.append(tuple(images.shape))
        return torch.where(masks[: len(images)], 1.0, -1.0)

    target = attack.classifier_target(inputs, "train", 16, 24, batch_size=8, judge=ByRule(judge), side=16)
    found = target.attack("map", defence, split_layer=2, **TRAINING)
    assert found.rebuilt.shape == target.originals.shape == (24, 3, 16, 16)
    assert set(seen) == {(24, 3, 16, 16)}, "a judge takes what was rebuilt"
    assert (found.table.hit == 1).all()
    assert target.normalise(found.rebuilt).shape == (24, 3, 32, 32)
    merged = tokmerge.patch(model, defence.policy, precision="int8", split_layer=2)
    through = lambda sent: sent.with_x(wire.quantise(sent.x, "int8"))  # noqa: E731
    maps, record = merged(target.normalise(attack.to_uint8(shown[:24]) / 255), through=through)
    np.testing.assert_array_equal(found.table.bytes, record.payload_bytes)
    np.testing.assert_allclose(found.table.server_hit, agreement(maps > 0, masks), atol=0.02)


def test_a_tower_is_attacked_by_the_same_means():
    tower = tiny.tower()
    images = torch.randint(0, 256, (24, 3, 32, 32), dtype=torch.uint8)
    half = torch.full((3,), 0.5)
    target = attack.tower_target(tower, -2, images[:16], images[16:], half, half, lambda part: torch.ones(len(part)), 8)
    found = target.attack("map", Defence("unmerged"), **TRAINING)
    assert found.rebuilt.shape == (8, 3, 32, 32)
    assert (found.table.tokens == 64).all()
    assert "server_hit" not in found.table
    hidden = tower(target.normalise(target.originals), output_hidden_states=True).hidden_states[-2][:, 1:]
    sent = target.tokens(Defence("unmerged"))[1]
    assert torch.allclose(sent.x.float().view(8, 64, -1), hidden, atol=2e-2)


def test_scene_hits_are_of_the_cells_that_show_something():
    kinds = np.full((2, 9), -1)
    kinds[0, [0, 4]] = 3, 5
    kinds[1, 8] = 2
    images = torch.zeros(2, 3, 84, 84)
    images[0, :, :28, :28] = 0.3  # names itself 3
    images[0, :, 28:56, 28:56] = 0.4  # names itself 4
    images[1, :, 56:, 56:] = 0.2
    hits = attack.scene_hits(ByRule(lambda cells: torch.eye(10)[(cells.mean((1, 2, 3)) * 10).round().long()]), kinds)
    assert hits(images).tolist() == [0.5, 1.0]
    assert hits(images[:1]).tolist() == [0.5]
    assert scenes.PHOTO == 28
