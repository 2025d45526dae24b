import numpy as np
import pandas as pd
import pytest
import tokmerge
import torch
from conftest import build
from members import file, measured_link, member
from PIL import Image
from tokmerge.channel.analog import LinearCodec
from tokmerge.channel.schemes import Slot, analog_member, late_profiles, send_files, thin_out, token_members
from tokmerge.data.image_sets import Example, ImageSet
from tokmerge.evaluation import image_codecs
from tokmerge.evaluation.calibrate import calibrate
from tokmerge.merging.policies import Threshold


def test_caps_are_the_fastest_that_get_through():
    link, cut_off = measured_link(), member("a", "a", 1, sending="cut off")
    assert cut_off.caps(link, 2.5, 2) == [3, 4]
    assert cut_off.caps(link, 60.0, 3) == [9, 10, 11]
    assert cut_off.caps(link, -40.0, 2) == [0]
    assert member("a", "a", 1).caps(link, 2.5, 2) == [11]


def test_at_a_deadline_computing_takes_time_from_the_channel():
    one, slot = file(100), Slot(deadline_s=0.1, symbols_per_s=1e5, edge_macs_per_s=2e8, server_macs_per_s=2e9)
    assert slot.computing_s(one).tolist() == pytest.approx([0.05 + 0.01] * 40)
    assert slot.uses_for(one).tolist() in ([4000] * 40, [3999] * 40)
    assert Slot(123).uses_for(one) == 123


def test_late_profiles_merge_before_the_split_only(batch):
    model = build()
    policies = late_profiles(calibrate(model, [batch]), 3, [0.5, 1.0])
    assert len(policies) == 4
    for policy in policies:
        assert policy.thresholds[3] == 1.0, "nothing merges after the split"
        assert list(policy.thresholds[:3]) == sorted(policy.thresholds[:3], reverse=True)
    assert policies[2].thresholds[0] == 1.0, "the second start is one block later"
    left = [tokmerge.patch(model, policy, split_layer=3).edge(batch.images).lengths.sum() for policy in policies]
    assert left[1] < left[0]


def test_thinning_out_leaves_the_staircase_evenly_spread():
    table = pd.DataFrame({"tokens": [10, 20, 21, 40, 80, 160], "score": [0.5, 0.6, 0.55, 0.7, 0.69, 0.9]})
    assert thin_out(table, 9).tokens.tolist() == [10, 20, 40, 160]
    assert thin_out(table, 2).tokens.tolist() == [10, 160]
    assert thin_out(table[:1], 3).tokens.tolist() == [10]


def test_members_know_select_images_alone(batch):
    test = batch._replace(images=batch.images.flip(0) * 2)
    members = token_members("adaptive", "0.6", build(), Threshold(0.6), 2, batch, test, ["int4", "float32"])
    assert [(one.family, one.precision, one.sending) for one in members] == [
        ("adaptive", "int4", "cut off"), ("adaptive", "float32", "cut off")]  # fmt: skip
    for one in members:
        assert torch.equal(one.select.server.prototype, one.test.server.prototype)
        assert not torch.equal(one.select.tokens.x, one.test.tokens.x)
    made = analog_member("analog", members[1])
    assert made.sending == "analog"
    assert isinstance(made.select.codec, LinearCodec)
    assert made.select.codec is made.test.codec
    assert torch.allclose(made.select.codec.mean[:48], members[1].select.tokens.x.mean(0), atol=1e-5)


def test_files_are_classified_as_the_server_sees_them():
    model = build()
    model.pretrained_cfg = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0}
    photos = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)) for i in range(3)]
    examples = [Example(str(i), photo, i) for i, photo in enumerate(photos)]
    images = ImageSet("noise", "test", tuple("abc"), list("012"), np.arange(3), lambda start: iter(examples))
    for format in ("jpeg", "webp"):
        got = send_files(model, images, format, 30)
        for i, photo in enumerate(photos):
            payload = image_codecs.compress(photo, format, 30)
            assert got.n_bytes[i] == (image_codecs.scan_bytes(payload) if format == "jpeg" else len(payload))
            pixels = torch.from_numpy(np.array(image_codecs.decompress(payload))).permute(2, 0, 1)[None].float()
            assert got.answers[i] == model(pixels / 127.5 - 1).argmax()
        assert not got.edge_macs.any()
        assert (got.macs > 0).all()
