import pytest
import tokmerge
import torch
from tokmerge.evaluation import counterparts
from tokmerge.search import baselines


def test_the_same_for_all_costs_as_much_as_what_every_image_gets(model, images):
    merged = tokmerge.patch(model, tokmerge.Threshold([0.7, 0.6, 0.5, 0.4]))
    _, record = merged(images)
    assert len(set(record.tokens[:, -1].tolist())) > 1
    cost = merged.cost(tuple(images.shape[1:]))
    macs = record.macs.double().mean().item()
    policy = counterparts.same_counts(record.tokens, macs, cost, lambda r: tokmerge.TopR(r, "tokens"))
    _, fixed = tokmerge.patch(model, policy)(images)
    assert len(set(fixed.macs.tolist())) == 1
    assert fixed.macs[0].item() == pytest.approx(macs, rel=0.01)
    lost = -record.tokens.double().mean(0).diff()
    assert torch.allclose(torch.tensor(policy.r).double(), lost, atol=2)


def test_of_ways_to_pool_the_one_that_costs_as_much_is_found(model, images):
    ways = baselines.pooling(4, 40)
    records = [tokmerge.patch(model, policy)(images[:1])[1] for policy in ways]
    cost = tokmerge.patch(model, None).cost(tuple(images.shape[1:]))
    wanted = sorted(record.macs.item() for record in records)[20]
    found = counterparts.nearest(ways, [record.tokens for record in records], wanted, cost)
    assert tokmerge.patch(model, found)(images[:1])[1].macs.item() == wanted
