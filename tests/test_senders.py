"""Who competes."""

import pandas as pd
import pytest
import tokmerge
import torch
from conftest import build
from tokmerge import evaluate
from tokmerge.analog import Learned, Linear
from tokmerge.data import Batch
from tokmerge.policies import Threshold
from tokmerge.senders import analog_member, as_tensors, late_profiles, learned, thin_out, token_members


@pytest.fixture
def batch(images):
    return Batch(list("abcde"), images, torch.arange(5))


def test_late_profiles_merge_before_the_split_only(batch):
    model = build()
    calibration = evaluate.calibrate(model, [batch])
    policies = late_profiles(calibration, 3, [0.5, 1.0])
    assert len(policies) == 4
    for policy in policies:
        assert policy.thresholds[3] == 1.0, "nothing merges after the split"
        assert list(policy.thresholds[:3]) == sorted(policy.thresholds[:3], reverse=True)
    assert policies[2].thresholds[0] == 1.0, "the second start is one block later"
    left = [tokmerge.patch(model, policy, split_layer=3).edge(batch.images).lengths.sum() for policy in policies]
    assert left[1] < left[0]


def test_thinning_out_leaves_the_staircase_evenly_spread():
    table = pd.DataFrame({"tokens": [10, 20, 21, 40, 80, 160], "top1": [0.5, 0.6, 0.55, 0.7, 0.69, 0.9]})
    assert thin_out(table, 9).tokens.tolist() == [10, 20, 40, 160]
    assert thin_out(table, 2).tokens.tolist() == [10, 160]
    assert thin_out(table[:1], 3).tokens.tolist() == [10]


def test_members_share_the_prototype_of_the_search_images(batch):
    test = batch._replace(images=batch.images.flip(0))
    members = token_members("adaptive", "0.6", build(), Threshold(0.6), 2, batch, test, ["int4", "int8"])
    assert [(one.family, one.precision, one.sending) for one in members] == [
        ("adaptive", "int4", "cut off"), ("adaptive", "int8", "cut off")]  # fmt: skip
    for one in members:
        assert torch.equal(one.search.prototype, one.test.prototype)
        assert torch.equal(one.search.edge_macs, one.test.edge_macs.flip(0))


def test_analog_members_know_search_tokens_alone(batch):
    test = batch._replace(images=batch.images * 2)
    (member,) = token_members("adaptive", "0.6", build(), Threshold(0.6), 2, batch, test, ["float32"])
    made = analog_member("analog", member)
    assert made.sending == "analog"
    assert isinstance(made.search.codec, Linear)
    assert made.search.codec is made.test.codec
    assert torch.allclose(made.search.codec.mean[:48], member.search.tokens.x.mean(0), atol=1e-5)


def test_learned_codecs_survive_their_file():
    torch.manual_seed(0)
    codec = Learned(5, 2, hidden=8).eval()
    codec.power.fill_(0.3)
    tensors = as_tensors(codec, 1.5) | as_tensors(Learned(5, 3), 2.0)
    again, weight = learned(tensors, 2)
    assert weight == 1.5
    x = torch.randn(7, 5)
    assert torch.equal(again.encode(x, 2), codec.encode(x, 2))
    with pytest.raises(ValueError, match="no learned codec of 8 symbols per token: there are those of 2, 3"):
        learned(tensors, 8)
