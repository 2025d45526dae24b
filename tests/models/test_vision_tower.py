import copy

import pytest
import reference
import tiny
import torch
from tokmerge import Threshold, TopR
from tokmerge.models import vision_tower
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModel

KINDS = pytest.mark.parametrize("kind", tiny.KINDS)


@KINDS
@pytest.mark.parametrize("layer", [-1, -2, 2, -5])
def test_no_policy_is_the_unpatched_tower(kind, layer, images):
    tower = tiny.tower(kind)
    features, record = vision_tower.patch_tower(tower, None, layer=layer)(images)
    expected = tower(images, output_hidden_states=True).hidden_states[layer]
    skip = kind == "clip"
    torch.testing.assert_close(torch.stack(features.split()), expected[:, skip:], atol=1e-5, rtol=0)
    depth = layer % 6
    assert record.tokens.tolist() == [[64 + skip] * (depth + 1)] * 5


@KINDS
@pytest.mark.parametrize("skip", [0, 1, None])
@pytest.mark.parametrize("policy", ["threshold", "fixed"])
def test_merging_equals_the_plain_implementation(kind, skip, policy, images):
    # In double precision: random weights amplify single-precision rounding from layer to layer.
    tower, images = tiny.tower(kind).double(), images.double()
    if policy == "threshold":
        taus = tiny.thresholds(tower, images)
        chosen, choose = Threshold(taus), reference.threshold_choice(taus)
    else:
        r = [9, 0, 6, 40]
        chosen, choose = TopR(r), reference.top_r_choice(r)
    merged = vision_tower.patch_tower(tower, chosen, skip=skip)
    features, record = merged(images, source=True)
    if policy == "threshold":
        assert len(set(features.lengths.tolist())) > 1, "images must keep different token counts"
    for i, image in enumerate(images):
        expected, counts, sizes, groups = reference.run_tower(tower, image, choose, 4, merged.skip, chosen.feature)
        assert record.tokens[i].tolist() == counts
        torch.testing.assert_close(features.split()[i], expected, atol=1e-6, rtol=1e-6)
        assert features.sizes.split(features.layout.counts)[i].tolist() == sizes
        found = [set() for _ in sizes]
        for patch, token in enumerate(record.source[i].tolist()):
            found[token].add(patch + merged.skip)
        assert found == groups


@KINDS
def test_a_batch_equals_its_images_alone(kind, images):
    tower = tiny.tower(kind)
    merged = vision_tower.patch_tower(tower, Threshold(tiny.thresholds(tower, images)))
    features, record = merged(images)
    for i in range(len(images)):
        alone, own = merged(images[i : i + 1])
        torch.testing.assert_close(alone.x, features.split()[i], atol=1e-5, rtol=0)
        assert own.tokens[0].tolist() == record.tokens[i].tolist()
        assert own.macs[0] == record.macs[i]


@KINDS
def test_macs_equal_torchs_count(kind, images):
    tower = tiny.tower(kind)
    merged = vision_tower.patch_tower(tower, None)
    # The unpatched tower also runs its last layer; one that ends where the features are taken does not.
    ends_there = copy.deepcopy(tower)
    del ends_there.encoder.layers[-1]
    ghost = ends_there.to("meta")
    if kind == "siglip":
        ghost.use_head = False
    with FlopCounterMode(display=False) as counter:
        ghost(images[:1].to("meta"))
    assert abs(merged(images)[1].macs[0].item() / (counter.get_total_flops() / 2) - 1) < 0.001


def test_merging_overhead_is_counted(images):
    tower = tiny.tower()
    unmerged, merged = (vision_tower.patch_tower(tower, policy)(images)[1].macs[0].item() for policy in (None, TopR(0)))
    assert merged == unmerged, "a layer where nothing can merge costs nothing more"
    tokens, keys = (
        vision_tower.patch_tower(tower, Threshold(0.9999, feature))(images)[1].macs[0].item() - unmerged
        for feature in ("tokens", "keys")
    )
    # Per layer: 32 x 32 similarities of width 16; head mean and normalisation of 65 features.
    assert keys == 4 * (32 * 32 * 16 + 65 * (48 + 2 * 16))
    # The tokens themselves are 48 wide and have no heads.
    assert tokens == 4 * (32 * 32 * 48 + 65 * 2 * 48)


@KINDS
def test_patching_leaves_the_tower_alone(kind, images):
    tower = tiny.tower(kind)
    before = copy.deepcopy(tower.state_dict())
    merged = vision_tower.patch_tower(tower, TopR(5))
    merged(images)
    assert vision_tower.unpatch_tower(merged) is tower
    assert type(tower) is tiny.KINDS[kind][0]
    assert merged.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in tower.state_dict().items())
    assert merged.load_state_dict(before).missing_keys == []
    twice = vision_tower.patch_tower(merged, TopR(2))
    assert vision_tower.unpatch_tower(twice) is tower


def test_bfloat16(images):
    features, record = vision_tower.patch_tower(tiny.tower().to(torch.bfloat16), TopR(8))(images)
    assert features.x.dtype == torch.bfloat16
    assert record.tokens[0].tolist() == [65, 57, 49, 41, 33]
    assert features.x.isfinite().all()


def test_bad_input_is_named(images):
    tower = tiny.tower()
    with pytest.raises(ValueError, match="5 thresholds for a model of 4 blocks"):
        vision_tower.patch_tower(tower, Threshold([0.9] * 5))
    with pytest.raises(TypeError, match="Linear"):
        vision_tower.patch_tower(torch.nn.Linear(2, 2), None)
    with pytest.raises(TypeError, match="policy is a float"):
        vision_tower.patch_tower(tower, 0.9)
    with pytest.raises(ValueError, match="no hidden state 6 in a tower of 5 layers"):
        vision_tower.patch_tower(tower, None, layer=6)
    with pytest.raises(ValueError, match="before the first layer"):
        vision_tower.patch_tower(tower, None, layer=-6)
    merged = vision_tower.patch_tower(tower, None)
    for wrong in (images[:, :1], images[0], images[..., :24]):
        with pytest.raises(ValueError, match=r"\(B, 3, 32, 32\)"):
            merged(wrong)
    with pytest.raises(RuntimeError, match="eval"):
        merged.train()(images)
    other = CLIPVisionModel(CLIPVisionConfig(**tiny.TOWER))
    other.encoder.layers[1] = torch.nn.Identity()
    with pytest.raises(TypeError, match="layer 1 of the tower is a Identity"):
        vision_tower.patch_tower(other, None)
