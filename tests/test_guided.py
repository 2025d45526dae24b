"""The guided threshold against its definition, image by image, and what its guide learns."""

import math

import numpy as np
import pytest
import reference
import tokmerge
import torch
from conftest import build
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from tokmerge import evaluate, guided
from tokmerge.data import Batch

SURE, UNSURE = [0.1, -1.0, 0.4, 0.0], [0.6, 0.9, 1.0, 0.8]


def photos(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 3, 32, 32, generator=generator)
    images[:, :, 16:] = torch.linspace(-2, 2, n)[:, None, None, None]
    return Batch([f"{seed}-{i}" for i in range(n)], images, torch.zeros(n, dtype=torch.long))


@pytest.fixture(scope="module")
def model():
    return build(num_classes=3)


@pytest.fixture(scope="module")
def guide(model):
    return guided.fit(model, list(evaluate.split_batch(photos(40), 16)))


def class_value(block, x):
    """The class token's value, from the block's weights."""
    width = x.shape[1]
    attn = block.attn
    return block.norm1(x)[0] @ attn.qkv.weight[2 * width :].T + attn.qkv.bias[2 * width :]


def doubt(guide, value, layer):
    scores = [float(value @ guide.weights[layer, :, c] + guide.biases[layer, c]) for c in range(len(guide.biases[0]))]
    powers = [math.exp(score - max(scores)) for score in scores]
    shares = [power / sum(powers) for power in powers]
    return -sum(p * math.log(p) for p in shares if p > 0) / math.log(len(shares))


def plain(model, image, policy):
    """One image, token by token; also whether it counted as sure at each layer."""
    x, counts, seen = reference.embed(model, image), [], []
    sizes, groups = [1.0] * len(x), [{i} for i in range(len(x))]
    for layer, block in enumerate(model.blocks):
        seen.append(layer > 0 and doubt(policy.guide, class_value(block, x), layer) < policy.limits[layer])
        threshold = (policy.sure if seen[-1] else policy.unsure)[layer]
        out, _ = reference.attention(block.attn, block.norm1(x), sizes)
        x = x + out
        pairs = reference.best_matches(x[None], 1)
        chosen = [a for a, (c, _) in pairs.items() if c > threshold and threshold < 1]
        tokens, sizes, groups = reference.merge_tokens(list(x), sizes, groups, pairs, chosen)
        x = torch.stack(tokens)
        x = x + block.mlp(block.norm2(x))
        counts.append(len(x))
    return model.forward_head(model.norm(x)[None])[0], counts, seen


def test_equals_the_plain_implementation(model, guide):
    policy = tokmerge.GuidedThreshold(SURE, UNSURE, guide.limits(0.5), guide)
    batch = photos(8, seed=1)
    logits, record = tokmerge.patch(model, policy)(batch.images)
    everything_seen = []
    for i, image in enumerate(batch.images):
        expected, counts, seen = plain(model, image, policy)
        torch.testing.assert_close(logits[i], expected, atol=1e-4, rtol=0)
        assert record.tokens[i, 1:].tolist() == counts
        everything_seen += seen[1:]
    assert 0 < sum(everything_seen) < len(everything_seen), "both kinds of image occur"


def test_an_image_does_not_depend_on_its_batch(model, guide):
    merged = tokmerge.patch(model, tokmerge.GuidedThreshold(SURE, UNSURE, guide.limits(0.5), guide))
    batch = photos(6, seed=2)
    together = merged(batch.images)[0]
    alone = torch.cat([merged(image[None])[0] for image in batch.images])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_equal_thresholds_are_the_plain_threshold(model, guide):
    images = photos(5, seed=3).images
    both = tokmerge.patch(model, tokmerge.GuidedThreshold(0.4, 0.4, 0.5, guide))(images)
    one = tokmerge.patch(model, tokmerge.Threshold(0.4))(images)
    assert torch.equal(both[0], one[0])
    assert torch.equal(both[1].tokens, one[1].tokens)
    extra = guide.weights[0].numel() * len(model.blocks)
    assert torch.equal(both[1].macs, one[1].macs + extra), "reading the class token is paid for"


def test_thresholds_of_one_switch_everything_off(model, guide):
    images = photos(5, seed=4).images
    merged = tokmerge.patch(model, tokmerge.GuidedThreshold(1.0, 1.0, 0.5, guide))
    assert torch.equal(merged(images)[0], tokmerge.patch(model, None)(images)[0])
    half = tokmerge.patch(model, tokmerge.GuidedThreshold(-1.0, 1.0, guide.limits(0.5), guide))(images)[1]
    assert (half.tokens[:, 1] == 65).all(), "the first block takes the unsure images' threshold"
    assert half.tokens[:, -1].min() < 65


def test_the_guide_is_a_discriminant_analysis_of_the_models_own_predictions(model, guide):
    batch = photos(40)
    predicted = model(batch.images).argmax(1).numpy()
    kinds = np.unique(predicted)
    x = model.norm_pre(model._pos_embed(model.patch_embed(batch.images)))
    for layer, block in enumerate(model.blocks):
        if layer:
            values = torch.stack([class_value(block, tokens) for tokens in x]).double().numpy()
            analysis = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(values, predicted)
            shares = analysis.predict_proba(values)
            expected = -(shares * np.log(shares.clip(1e-300))).sum(1) / np.log(len(kinds))
            found = guide.doubt(torch.tensor(values), layer).numpy()
            np.testing.assert_allclose(found, expected, atol=1e-3)
            np.testing.assert_allclose(guide.limits(0.3)[layer], np.quantile(expected, 0.3), atol=2e-2)
        x = block(x)
    assert not guide.weights[0].any()


def test_two_classes(model):
    values = np.random.default_rng(0).normal(size=(60, 4))
    classes = (values[:, 0] > 0).astype(int)
    weights, biases = guided._discriminant(values, classes)
    analysis = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(values, classes)
    found = (torch.tensor(values, dtype=torch.float32) @ weights + biases).softmax(1)
    np.testing.assert_allclose(found, analysis.predict_proba(values), atol=1e-5)


def test_bad_input_is_named(model, guide):
    with pytest.raises(TypeError, match=r"GuidedThreshold: sure\[1\] is 'x'"):
        tokmerge.GuidedThreshold([0.5, "x"], 0.5, 0.5, guide)
    with pytest.raises(ValueError, match="2 unsure for a model of 4 blocks"):
        tokmerge.patch(model, tokmerge.GuidedThreshold(0.5, [0.5, 0.5], 0.5, guide))
    with pytest.raises(ValueError, match="a guide of 4 blocks for a model of 3"):
        tokmerge.patch(build(depth=3), tokmerge.GuidedThreshold(0.5, 0.5, 0.5, guide))
    same = photos(1)
    with pytest.raises(ValueError, match="one class in all 1 calibration images"):
        guided.fit(model, [same])
    without = build("no_cls_avg")
    with pytest.raises(ValueError, match="this model has none"):
        guided.fit(without, [photos(4)])
