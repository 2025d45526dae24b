import numpy as np
import pytest
import reference
import tokmerge
import torch
from tokmerge.evaluation.calibrate import calibrate, similarity_statistics, thresholds_for_rates
from tokmerge.evaluation.outcomes import evaluate


@pytest.mark.parametrize("policy", [None, tokmerge.TopR(6)])
def test_similarity_statistics_by_loops(model, images, batches, policy):
    means, deviations = similarity_statistics(model, batches, policy)
    found = [[] for _ in model.blocks]

    def decide(layer):
        found[layer.index].append(np.mean([c for c, _ in layer.matches.values()]))
        return {"pairs": [] if policy is None else reference.largest(layer.matches, policy.r)}

    for image in images:
        reference.run(model, image, decide, "keys")
    for layer, per_image in enumerate(found):
        assert means[layer] == pytest.approx(np.mean(per_image), abs=6e-5)
        assert deviations[layer] == pytest.approx(np.std(per_image, ddof=1), abs=6e-5)


def over(model, batches):
    """What runs a model on batches with a policy."""
    return lambda policy: evaluate(tokmerge.patch(model, policy), batches)


def test_thresholds_reach_the_mean_rates(model, batch):
    wanted = [4.2, 0.0, 7.0, 1.4]
    policy = thresholds_for_rates(over(model, [batch]), wanted)
    assert policy.thresholds[1] == 1.0
    tokens = tokmerge.patch(model, policy)(batch.images)[1].tokens
    assert (-tokens.diff(dim=1)).float().mean(0).tolist() == pytest.approx(wanted)
    assert len(set(tokens[:, -1].tolist())) > 1, "every image loses what it can spare"


def test_thresholds_are_means_over_batches(model, batches):
    wanted = [4.0, 0.0, 0.0, 0.0]
    each = [thresholds_for_rates(over(model, [part]), wanted).thresholds[0] for part in batches]
    assert thresholds_for_rates(over(model, batches), wanted).thresholds == (np.mean(each), 1.0, 1.0, 1.0)


def test_more_than_there_is_merges_what_is_alike_at_all(model, images, batches):
    policy = thresholds_for_rates(over(model, batches), [0, 0, 0, 1000])
    assert policy.thresholds == (1.0, 1.0, 1.0, 0.0)
    with pytest.raises(ValueError, match="2 rates for a model of 4 blocks"):
        thresholds_for_rates(over(model, batches), [1, 2])


def test_calibration_is_the_similarity_of_the_unmerged_model(model, images, batches):
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    block = model.blocks[0]
    keys = block.attn.qkv(block.norm1(tokens)).view(5, -1, 3, block.attn.num_heads, 16)[:, 1:, 1].mean(2)
    attended = (tokens + block.attn(block.norm1(tokens)))[:, 1:]
    for feature, values in (("tokens", attended), ("keys", keys)):
        found = calibrate(model, batches, feature).quantiles
        assert found.shape == (len(model.blocks), 1001)
        metric = torch.nn.functional.normalize(values, dim=-1)
        best = (metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)).amax(2).double()
        np.testing.assert_allclose(found[0], np.quantile(best.detach(), np.linspace(0, 1, 1001)), atol=1e-6)
