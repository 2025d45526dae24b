"""timm's Eva: EVA-02, DINOv3 and RoPE-ViT, whose tokens carry their positions into attention."""

import checks
import pytest
import timm
import tokmerge
import torch
from conftest import GEOMETRY, build, spread
from timm.models.eva import Eva
from tokmerge.merging.packed import Layout, Packed
from tokmerge.models.rotary import Rotary

ROTARY = {"use_rot_pos_emb": True, "use_abs_pos_emb": False}
KINDS = {
    "eva": {"global_pool": "avg"},
    "eva02": {**ROTARY, "use_abs_pos_emb": True, "swiglu_mlp": True, "scale_mlp": True, "qkv_fused": False},
    "dinov3": {**ROTARY, "rope_type": "dinov3", "rope_rotate_half": True, "num_reg_tokens": 4, "init_values": 1e-1,
               "no_embed_class": True, "attn_type": "rope", "global_pool": "token"},
    "mixed": {**ROTARY, "rope_type": "mixed", "attn_type": "rope", "rope_grid_indexing": "xy"},
    "registers, avg": {**ROTARY, "class_token": False, "num_reg_tokens": 2, "no_embed_class": True, "qk_norm": True,
                       "attn_type": "rope", "scale_attn_inner": True},
    "grouped queries": {**ROTARY, "attn_type": "rope", "num_kv_heads": 1, "qkv_fused": False},
    "map": {**ROTARY, "global_pool": "map", "attn_pool_num_heads": 3, "attn_pool_mlp_ratio": 2.0},
}  # fmt: skip


@pytest.fixture(params=KINDS)
def eva(request):
    torch.manual_seed(0)
    return spread(Eva(**GEOMETRY, **KINDS[request.param]))


@pytest.mark.parametrize("policy", [None, tokmerge.Threshold(tokmerge.Threshold.OFF)])
def test_merging_off_is_the_unpatched_model(eva, images, policy):
    logits, record = tokmerge.patch(eva, policy)(images)
    torch.testing.assert_close(logits, eva(images), atol=2e-5, rtol=1e-4)
    assert (record.tokens == 64 + eva.num_prefix_tokens).all()


def test_a_batch_equals_its_images_alone_and_costs_what_torch_counts(eva, images):
    record = checks.equals_alone(tokmerge.patch(eva, tokmerge.Threshold(0.6)), images)
    assert len(set(record.tokens[:, -1].tolist())) > 1
    merged = tokmerge.patch(eva, None)
    assert merged(images[:1])[1].macs.item() == pytest.approx(checks.counted_macs(lambda: eva(images[:1])), rel=0.01)


def test_a_merged_token_is_turned_as_at_the_mean_of_its_patches():
    # 2 x 3 patches whose angle is 0.5 row + 0.2 column + 0.1, after a class token, which is not turned.
    table = torch.tensor([[[0.1 + 0.5 * (n // 3) + 0.2 * (n % 3)]] for n in range(6)])
    rotary = Rotary.of(table.sin(), table.cos(), (2, 3))
    place = torch.tensor([[0.0, 0.0], [1.0, 2.0], [0.5, 1.25]])
    sin, cos = rotary(Packed(torch.zeros(3, 1), Layout(torch.tensor([3])), place=place), 1)
    torch.testing.assert_close(torch.atan2(sin, cos).flatten(), torch.tensor([0.0, 1.0, 0.6]))
    with pytest.raises(ValueError, match="not linear"):
        Rotary.of(table.square().sin(), table.square().cos(), (2, 3))


def test_rotary_models_are_cut_at_the_end_and_post_norm_is_refused():
    model = Eva(**GEOMETRY, **KINDS["dinov3"]).eval()
    with pytest.raises(ValueError, match="rotary positions do not travel"):
        tokmerge.patch(model, None, split_layer=1)
    with pytest.raises(TypeError, match="block 0 of the model is a EvaBlockPostNorm"):
        tokmerge.patch(Eva(**GEOMETRY, use_post_norm=True), None)


def test_places_serve_a_vision_transformer_as_well(images):
    # Windows of one patch hold one token each: nothing merges.
    for window, left in ((1, 65), (8, 65 - 32)):
        record = tokmerge.patch(build(), tokmerge.LocalThreshold([-1.0, 1.0, 1.0, 1.0], window))(images)[1]
        assert record.tokens[0, -1] == left
    dynamic = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, depth=2).eval()
    record = tokmerge.patch(dynamic, tokmerge.LocalThreshold(-1.0, 2))(torch.rand(1, 3, 32, 64))[1]
    assert record.tokens[0].tolist() == [9, 5, 3]
