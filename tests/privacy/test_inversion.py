import pytest
import tokmerge
import torch
from conftest import build
from tokmerge.privacy.defence import Defence
from tokmerge.privacy.inversion import invert, replayed


def test_replay_repeats_what_was_decided_on_other_images(model, images):
    policy = tokmerge.Threshold(0.6)
    replay = tokmerge.patch(model, replayed(policy))
    first = replay.edge(images)
    assert torch.equal(first.x, tokmerge.patch(model, policy).edge(images).x)
    other = images.flip(0)
    assert torch.equal(replay.edge(other).lengths, first.lengths)
    assert not torch.equal(tokmerge.patch(model, policy).edge(other).lengths, first.lengths)


@pytest.mark.parametrize("policy", [None, tokmerge.Threshold(0.6)])
def test_gradient_attack_nears_the_image(policy):
    model = build(depth=1)
    truth = torch.nn.functional.interpolate(torch.rand(2, 3, 4, 4), size=32)
    half = torch.full((3,), 0.5)
    distort = Defence("clean").receive
    rebuilt, curve = invert(model, policy, truth, distort, mean=half, std=half, steps=100, tv_weight=1.0)
    assert curve.loss.iloc[-1] < 0.2 * curve.loss.iloc[0]
    assert (rebuilt - truth).square().mean() < 0.7 * (0.5 - truth).square().mean()
    assert all(not parameter.requires_grad for parameter in model.parameters())
