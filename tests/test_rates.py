import numpy as np
import pytest
import reference
import tokmerge
import torch
from tokmerge import rates
from tokmerge.data import Batch


@pytest.fixture
def batches(images):
    return [Batch(list("abc"), images[:3], torch.zeros(3)), Batch(list("de"), images[3:], torch.zeros(2))]


def merge_most_similar(x, sizes, pairs, r):
    values, weights, gone = [x[i] * sizes[i] for i in range(len(x))], list(sizes), set()
    for a in sorted(pairs, key=lambda a: -pairs[a][0])[:r]:
        b = pairs[a][1]
        values[b], weights[b] = values[b] + x[a] * sizes[a], weights[b] + sizes[a]
        gone.add(a)
    left = [i for i in range(len(x)) if i not in gone]
    return torch.stack([values[i] / weights[i] for i in left]), [weights[i] for i in left]


@pytest.mark.parametrize("policy", [None, tokmerge.TopR(6)])
def test_similarity_statistics_by_loops(model, images, batches, policy):
    means, deviations = rates.similarity_statistics(model, batches, policy)
    for layer in (0, 2):
        per_image = []
        for image in images:
            x, sizes = reference.embed(model, image), [1.0] * 65
            for block in model.blocks[:layer]:
                out, keys = reference.attention(block.attn, block.norm1(x), sizes)
                x = x + out
                if policy is not None:
                    pairs = reference.best_matches(keys, 1)
                    x, sizes = merge_most_similar(x, sizes, pairs, policy.r)
                x = x + block.mlp(block.norm2(x))
            _, keys = reference.attention(model.blocks[layer].attn, model.blocks[layer].norm1(x), sizes)
            per_image.append(np.mean([c for c, _ in reference.best_matches(keys, 1).values()]))
        assert means[layer] == pytest.approx(np.mean(per_image), abs=1e-5)
        assert deviations[layer] == pytest.approx(np.std(per_image, ddof=1), abs=1e-5)


def test_thresholds_reach_the_mean_rates(model, images, batches):
    wanted = [4.2, 0.0, 7.0, 1.4]
    policy = rates.thresholds_for_rates(model, batches, wanted)
    assert policy.thresholds[1] == 1.0
    tokens = tokmerge.patch(model, policy)(images)[1].tokens
    assert (-tokens.diff(dim=1)).float().mean(0).tolist() == pytest.approx(wanted)
    assert len(set(tokens[:, -1].tolist())) > 1, "every image loses what it can spare"


def test_more_than_there_is_merges_everything(model, images, batches):
    policy = rates.thresholds_for_rates(model, batches, [0, 0, 0, 1000])
    tokens = tokmerge.patch(model, policy)(images)[1].tokens
    assert tokens[:, -1].tolist() == [33] * 5
    with pytest.raises(ValueError, match="2 rates for a model of 4 blocks"):
        rates.thresholds_for_rates(model, batches, [1, 2])
