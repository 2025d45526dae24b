import copy
from functools import partial

import checks
import pytest
import reference
import tiny
import torch
from tokmerge import Threshold, TopR
from tokmerge.models import vision_tower
from transformers import CLIPVisionConfig, CLIPVisionModel


@pytest.fixture(params=tiny.KINDS)
def tower(request):
    return tiny.tower(request.param)


@pytest.mark.parametrize("layer", [-1, -2, 2, -5])
def test_no_policy_is_the_unpatched_tower(tower, layer, images):
    features, record = vision_tower.patch_tower(tower, None, layer=layer)(images)
    expected = tower(images, output_hidden_states=True).hidden_states[layer]
    skip = isinstance(tower, CLIPVisionModel)
    torch.testing.assert_close(torch.stack(features.split()), expected[:, skip:], atol=1e-5, rtol=0)
    depth = layer % 6
    assert record.tokens.tolist() == [[64 + skip] * (depth + 1)] * 5


@pytest.mark.parametrize("skip", [0, 1, None])
@pytest.mark.parametrize("policy", ["threshold", "fixed"])
def test_merging_equals_the_plain_implementation(tower, skip, policy, images):
    taus, r = tiny.thresholds(tower, images), [9, 0, 6, 40]
    chosen, choose = (
        (Threshold(taus), reference.threshold_choice(taus))
        if policy == "threshold"
        else (TopR(r), reference.top_r_choice(r))
    )
    merged = vision_tower.patch_tower(tower, chosen, skip=skip)
    plain = partial(reference.run_tower, tower, decide=choose, layer=4, skip=merged.skip, feature=chosen.feature)
    checks.equals_plain(merged, images, plain)


def test_a_batch_equals_its_images_alone(tower, images):
    record = checks.equals_alone(vision_tower.patch_tower(tower, Threshold(tiny.thresholds(tower, images))), images)
    assert len(set(record.tokens[:, -1].tolist())) > 1, "images must keep different token counts"


def test_macs_equal_torchs_count(tower, images):
    merged = vision_tower.patch_tower(tower, None)
    # The unpatched tower also runs its last layer; one that ends where the features are taken does not.
    ends_there = copy.deepcopy(tower)
    del ends_there.encoder.layers[-1]
    ghost = ends_there.to("meta")
    if not isinstance(tower, CLIPVisionModel):
        ghost.use_head = False
    counted = checks.counted_macs(lambda: ghost(images[:1].to("meta")))
    assert merged(images)[1].macs[0].item() == pytest.approx(counted, rel=0.001)


def test_patching_leaves_the_tower_alone(tower, images):
    patch = partial(vision_tower.patch_tower, policy=TopR(5))
    checks.leaves_model_alone(tower, patch, lambda merged: merged(images))


def other_layers():
    tower = CLIPVisionModel(CLIPVisionConfig(**tiny.TOWER))
    tower.encoder.layers[1] = torch.nn.Identity()
    return tower


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda patch, _: patch(Threshold([0.9] * 5)), ValueError, "5 thresholds for a model of 4 blocks"),
        (lambda patch, _: patch(0.9), TypeError, "policy is a float"),
        (lambda patch, _: patch(None, layer=6), ValueError, "no hidden state 6 in a tower of 5 layers"),
        (lambda patch, _: patch(None, layer=-6), ValueError, "before the first layer"),
        (lambda patch, images: patch(None)(images[..., :24]), ValueError, r"\(B, 3, 32, 32\)"),
        (lambda patch, images: patch(None).train()(images), RuntimeError, "eval"),
        (lambda *_: vision_tower.patch_tower(torch.nn.Linear(2, 2), None), TypeError, "Linear"),
        (lambda *_: vision_tower.patch_tower(other_layers(), None), TypeError, "layer 1 of the tower is a Identity"),
    ],
)
def test_bad_input_is_named(make, error, message, images):
    with pytest.raises(error, match=message):
        make(partial(vision_tower.patch_tower, tiny.tower()), images)
