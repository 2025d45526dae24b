from functools import partial

import checks
import pytest
import reference
import timm
import tiny
import tokmerge
import torch
from conftest import build
from timm.models.vision_transformer import ParallelScalingBlock
from tokmerge import wire
from tokmerge.merging.packed import pack

spread_thresholds = partial(tiny.thresholds, patch=tokmerge.patch)


def equals_plain(model, images, policy, choose):
    plain = partial(reference.run, model, decide=choose, feature=policy.feature)
    checks.equals_plain(tokmerge.patch(model, policy), images, plain)


def test_no_policy_is_the_unpatched_model(any_model, images):
    logits, record = tokmerge.patch(any_model, None)(images)
    torch.testing.assert_close(logits, any_model(images), atol=1e-5, rtol=0)
    n = any_model.patch_embed.num_patches + any_model.num_prefix_tokens
    assert (record.tokens == n).all()


def test_a_threshold_of_one_switches_merging_off_exactly(model, images):
    # Equal tokens have a cosine of 1 up to rounding: they must stay apart all the same.
    images = torch.zeros_like(images)
    logits, record = tokmerge.patch(model, tokmerge.Threshold(tokmerge.Threshold.OFF))(images)
    assert (record.tokens == 65).all()
    torch.testing.assert_close(logits, model(images), atol=1e-5, rtol=0)


def test_policies_equal_the_plain_implementation(any_model, images):
    thresholds, r = spread_thresholds(any_model, images), [9, 0, 6, 40]
    equals_plain(any_model, images, tokmerge.Threshold(thresholds), reference.threshold_choice(thresholds))
    equals_plain(any_model, images, tokmerge.TopR(r), reference.top_r_choice(r))


def test_gated_attention_and_odd_token_counts(model, images):
    for block in model.blocks:
        block.attn = timm.layers.attention.Attention(48, num_heads=3, qkv_bias=True, gated=True).requires_grad_(False)
        torch.nn.init.normal_(block.attn.qkv.weight, std=0.2)
        block.attn.eval()
    equals_plain(model, images, tokmerge.TopR(5), reference.top_r_choice([5] * 4))


def test_everything_merges_down_to_the_protected_tokens_and_one(images):
    model = build(depth=8)
    _, record = tokmerge.patch(model, tokmerge.Threshold(-1.0))(images)
    assert record.tokens[0].tolist() == [65, 33, 17, 9, 5, 3, 2, 2, 2]
    equals_plain(model, images, tokmerge.TopR(100), reference.top_r_choice([100] * 8))


def test_a_batch_equals_its_images_alone(any_model, images):
    policy = tokmerge.Threshold(spread_thresholds(any_model, images))
    record = checks.equals_alone(tokmerge.patch(any_model, policy), images)
    assert len(set(record.tokens[:, -1].tolist())) > 1, "images must end with different token counts"


def test_patching_leaves_the_model_alone_and_again_replaces_the_policy(model, images):
    checks.leaves_model_alone(model, partial(tokmerge.patch, policy=tokmerge.TopR(5)), lambda merged: merged(images))
    twice = tokmerge.patch(tokmerge.patch(model, tokmerge.TopR(5)), tokmerge.TopR(2))
    assert twice(images)[1].tokens[0].tolist() == [65, 63, 61, 59, 57]


def test_features_and_unmerge_restore_the_grid(model, images):
    for policy in (None, tokmerge.TopR(10)):
        merged = tokmerge.patch(model, policy)
        packed, record = merged.features(images), merged(images, source=True)[1]
        grid = tokmerge.unmerge(packed, record)
        assert grid.shape == (5, 65, 48)
        for i, tokens in enumerate(packed.split()):
            assert torch.equal(grid[i], tokens[record.source[i]])
        if policy is None:
            torch.testing.assert_close(grid, model.forward_features(images), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="source=True"):
        tokmerge.unmerge(packed, merged(images)[1])
    with pytest.raises(ValueError, match="same batch"):
        tokmerge.unmerge(merged.features(images[:2]), record)


@pytest.mark.parametrize("precision", wire.PRECISIONS)
@pytest.mark.parametrize("split", [0, 2, 4])
def test_payload_bytes_are_the_length_of_the_real_payload(images, precision, split):
    model = build()
    policy = tokmerge.Threshold(spread_thresholds(model, images))
    record = tokmerge.patch(model, policy, precision=precision, split_layer=split)(images)[1]
    choose = reference.threshold_choice(policy.thresholds)
    for i, image in enumerate(images):
        # What a device that stops after `split` blocks would send: its own tokens and sizes.
        _, _, sizes, _ = reference.run(model, image, lambda at: choose(at) if at.index < split else {"pairs": []})
        sent_sizes = torch.tensor(sizes).long() if split < 4 else None
        assert record.payload_bytes[i] == len(wire.encode(torch.randn(len(sizes), 48), sent_sizes, precision))


@pytest.mark.parametrize("split", [0, 2, 4])
def test_device_and_server_together_are_the_model(any_model, images, split):
    policy = tokmerge.Threshold(spread_thresholds(any_model, images))
    merged = tokmerge.patch(any_model, policy, split_layer=split)
    logits, record = merged(images)
    sent = merged.edge(images)
    assert torch.equal(sent.lengths, record.tokens[:, split])
    torch.testing.assert_close(merged.serve(sent), logits, atol=1e-6, rtol=0)
    costs = merged.cost(tuple(images.shape[1:]))
    per_block = costs.blocks(record.tokens, policy)
    assert torch.equal(record.edge_macs, costs.embed + per_block[:, :split].sum(1))
    assert torch.equal(record.macs, costs.total(record.tokens, policy))


def test_lost_tokens_are_sent_but_not_received(images):
    merged = tokmerge.patch(build(), None, split_layer=2)
    whole = merged(images)[1]

    logits, record = merged(images, through=lambda tokens: pack(torch.stack(tokens.split())[:, :33]))
    assert logits.isfinite().all()
    assert record.tokens[0].tolist() == [65, 65, 33, 33, 33]
    assert torch.equal(record.payload_bytes, whole.payload_bytes)
    assert torch.equal(record.edge_macs, whole.edge_macs)
    assert (record.macs < whole.macs).all()


def test_other_image_sizes_where_the_model_takes_them():
    model = build(dynamic_img_size=True)
    images = torch.randn(2, 3, 24, 40)
    torch.testing.assert_close(tokmerge.patch(model, None)(images)[0], model(images), atol=1e-5, rtol=0)


def test_bfloat16_keeps_the_shape_of_the_result(images):
    model = build().to(torch.bfloat16)
    logits, record = tokmerge.patch(model, tokmerge.TopR(8))(images.bfloat16())
    assert logits.dtype == torch.bfloat16
    assert record.tokens[0].tolist() == [65, 57, 49, 41, 33]
    assert logits.isfinite().all()


def test_gradients_reach_the_image(model, images):
    images = images.requires_grad_()
    tokmerge.patch(model, tokmerge.TopR(8))(images)[0].sum().backward()
    assert images.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda m: tokmerge.patch(m, tokmerge.TopR([1, 2, 3])), ValueError, "3 r values for a model of 4 blocks"),
        (lambda m: tokmerge.patch(torch.nn.Linear(2, 2), None), TypeError, "Linear"),
        (lambda m: tokmerge.patch(m, 0.9), TypeError, r"policy is a float: use a policy such as tokmerge\.Threshold"),
        (lambda m: tokmerge.patch(m, None, precision="int3"), ValueError, "int3"),
        (lambda m: tokmerge.patch(m, None, split_layer=5), ValueError, "split_layer is 5"),
        (lambda m: tokmerge.patch(build(block_fn=ParallelScalingBlock), None), TypeError, "ParallelScalingBlock"),
        (lambda m: tokmerge.patch(m, None)(torch.zeros(1, 3, 24, 24)), ValueError, r"\(24, 24\) pixels, .* \(32, 32\)"),
        (lambda m: tokmerge.patch(m, None)(torch.zeros(1, 1, 32, 32)), ValueError, "1 channels"),
        (lambda m: tokmerge.patch(m, None)(torch.zeros(3, 32, 32)), ValueError, r"\(B, C, H, W\)"),
        (lambda m: tokmerge.patch(m, None).train()(torch.zeros(1, 3, 32, 32)), RuntimeError, "eval"),
    ],
)
def test_bad_input_is_named(model, make, error, message):
    with pytest.raises(error, match=message):
        make(model)


BACKBONES = {
    "deit_small_patch16_224": {},
    "deit_base_distilled_patch16_224": {},
    "deit3_small_patch16_224": {},
    "vit_large_patch16_224": {},
    "flexivit_small": {"img_size": 96},
    "vit_small_patch14_dinov2": {"img_size": 98, "num_classes": 5},
    "vit_small_patch14_reg4_dinov2": {"img_size": 98, "num_classes": 5},
    "vit_base_patch16_siglip_224": {"img_size": 96, "num_classes": 5},
    "vit_base_patch16_siglip_gap_224": {"img_size": 96, "num_classes": 5},
    "vit_base_patch16_clip_quickgelu_224": {"img_size": 96},
}


@pytest.mark.parametrize("name", BACKBONES)
def test_backbones_of_timm_are_unchanged_without_merging(name):
    torch.manual_seed(0)
    model = timm.create_model(name, depth=2, **BACKBONES[name]).eval()
    for head in (model.head, getattr(model, "head_dist", None)):
        if head is not None:
            torch.nn.init.normal_(head.weight)  # timm's own start is zero
    images = torch.randn(2, 3, *model.patch_embed.img_size)
    with torch.inference_mode():
        expected = model(images)
        found, _ = tokmerge.patch(model, None)(images)
        tokens = tokmerge.patch(model, tokmerge.TopR(3))(images)[1].tokens
    assert expected.std() > 0
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (tokens[:, 0] - tokens[:, 2]).tolist() == [6, 6]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("beit_base_patch16_224", "a timm VisionTransformer or Eva is needed"),
        ("vit_relpos_small_patch16_224", "in a VisionTransformerRelPos"),
        ("vit_base_patch16_rpn_224", "block 0 of the model is a ResPostBlock"),
    ],
)
def test_other_backbones_of_timm_are_refused(name, message):
    with pytest.raises(TypeError, match=message):
        tokmerge.patch(timm.create_model(name, depth=1), None)
