"""transformers' ViT, DeiT, DINOv2 and DINOv3."""

import checks
import pytest
import tiny
import tokmerge
import torch
import transformers as hf
from tokmerge.models.encoders import ENCODERS

GEOMETRY = {**tiny.TOWER, "num_hidden_layers": 3}
CONFIGS = {
    hf.ViTForImageClassification: hf.ViTConfig,
    hf.DeiTForImageClassification: hf.DeiTConfig,
    hf.DeiTForImageClassificationWithTeacher: hf.DeiTConfig,
    hf.Dinov2ForImageClassification: hf.Dinov2Config,
    hf.Dinov2WithRegistersForImageClassification: hf.Dinov2WithRegistersConfig,
    hf.DINOv3ViTModel: hf.DINOv3ViTConfig,
}


@pytest.fixture(params=ENCODERS, ids=lambda kind: kind.__name__)
def encoder(request):
    extra = {"num_register_tokens": 4} if request.param.__name__.startswith(("Dinov2With", "DINOv3")) else {}
    return tiny.spread(request.param(CONFIGS[request.param](**GEOMETRY, **extra, num_labels=7)))


def scores(model, images):
    found = model(pixel_values=images)
    return found.logits if hasattr(found, "logits") else found.pooler_output


def test_merging_off_is_the_unpatched_model(encoder, images):
    for policy in (None, tokmerge.Threshold(tokmerge.Threshold.OFF)):
        torch.testing.assert_close(
            tokmerge.patch(encoder, policy)(images)[0], scores(encoder, images), atol=2e-5, rtol=1e-4
        )


def test_a_batch_equals_its_images_alone_and_costs_what_torch_counts(encoder, images):
    record = checks.equals_alone(tokmerge.patch(encoder, tokmerge.Threshold(0.6)), images)
    assert len(set(record.tokens[:, -1].tolist())) > 1
    merged = tokmerge.patch(encoder, None)
    counted = checks.counted_macs(lambda: encoder(pixel_values=images[:1]))
    assert merged(images[:1])[1].macs.item() == pytest.approx(counted, rel=0.01)


def test_the_model_is_left_alone(encoder, images):
    checks.leaves_model_alone(encoder, lambda model: tokmerge.patch(model, None), lambda m: m(images))


def test_other_models_and_images_are_refused(images):
    with pytest.raises(TypeError, match="cannot merge tokens in a CLIPVisionModel: one of ViTForImageClassification"):
        tokmerge.patch(tiny.tower(), None)
    with pytest.raises(TypeError, match=r"LlavaForConditionalGeneration: .*tokmerge\.llava\.patch is for LLaVAs"):
        tokmerge.patch(tiny.llava(), None)
    model = tiny.spread(hf.ViTForImageClassification(hf.ViTConfig(**GEOMETRY)))
    with pytest.raises(ValueError, match=r"images must be \(B, 3, 32, 32\)"):
        tokmerge.patch(model, None)(torch.rand(1, 3, 36, 36))
    larger = tiny.spread(hf.Dinov2ForImageClassification(hf.Dinov2Config(**GEOMETRY)))
    wide = torch.rand(1, 3, 32, 48)
    torch.testing.assert_close(tokmerge.patch(larger, None)(wide)[0], larger(wide).logits, atol=2e-5, rtol=1e-4)
