"""What a sceptic would send, against the same done step by step."""

import io

import numpy as np
import pytest
import tokmerge
import torch
from conftest import build
from PIL import Image
from tokmerge import wire
from tokmerge.data.image_sets import Batch
from tokmerge.evaluation import payload_baselines

MEAN, STD = 0.5, 0.25


def model_of(channels):
    model = build(in_chans=channels)
    model.pretrained_cfg = {"mean": (MEAN,) * channels, "std": (STD,) * channels, "input_size": (channels, 32, 32)}
    return model


def pictures(channels):
    coarse = np.random.default_rng(0).integers(0, 256, (4, 8, 8, *[3] * (channels == 3)), np.uint8)
    return [Image.fromarray(pixels).resize((32, 32), Image.Resampling.BILINEAR) for pixels in coarse]


def tensor(picture):
    values = torch.from_numpy(np.array(picture, np.float32) / 255)
    return ((values[None] if values.ndim == 2 else values.permute(2, 0, 1)) - MEAN) / STD


def batch_of(images, labels):
    return Batch([str(i) for i in range(len(images))], images, labels)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("format", "options"), [("jpeg", {"optimize": True}), ("webp", {"method": 6})])
def test_images_are_sent_as_pillow_writes_them(channels, format, options):
    model, shots = model_of(channels), pictures(channels)
    batch = batch_of(torch.stack([tensor(shot) for shot in shots]), torch.arange(4))
    found = payload_baselines.send_images(model, [batch], format, 30)
    for i, shot in enumerate(shots):
        buffer = io.BytesIO()
        shot.save(buffer, format.upper(), quality=30, **options)
        assert found.payload_bytes[i] == len(buffer.getvalue())
        received = tensor(Image.open(buffer).convert("L" if channels == 1 else "RGB"))
        assert found.prediction[i] == model(received[None]).argmax().item()
    smaller = found.scan_bytes < found.payload_bytes
    assert smaller.all() if format == "jpeg" else not smaller.any()
    assert found.label.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("split", [2, 4])
@pytest.mark.parametrize("policy", [None, tokmerge.Threshold(0.2)])
def test_tokens_are_sent_as_they_are_encoded(model, images, batch, split, policy):
    found = payload_baselines.send_tokens(model, policy, [batch], ["float16", "int4"], split)
    for precision, rows in found.groupby("precision", sort=False):
        merged = tokmerge.patch(model, policy, precision=precision, split_layer=split)
        record = merged(images)[1]
        assert rows.payload_bytes.tolist() == record.payload_bytes.tolist()
        for i, image in enumerate(images):
            sent = merged.edge(image[None])
            payload = wire.encode(sent.x, merged.sent_sizes(sent), precision)
            received = sent.with_x(wire.decode(payload).tokens)
            assert rows.prediction.iloc[i] == merged.serve(received).argmax().item()


def test_the_average_head_classifies_means_of_all_patches():
    # Brightness is the class.
    model = build(num_classes=2)
    level = torch.tensor([-1.0, 1.0] * 30)[:, None, None, None]
    shots = level + 0.1 * torch.randn(60, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1] * 30)
    other = payload_baselines.average_head(model, [batch_of(shots[:40], labels[:40])])
    logits = other(shots[40:])
    assert torch.equal(logits.argmax(1), labels[40:])
    pooled = model.forward_features(shots[40:])[:, 1:].mean(1)
    torch.testing.assert_close(logits, pooled @ other.head.weight.T + other.head.bias, atol=1e-4, rtol=1e-4)
    packed = tokmerge.patch(other, None)(shots[40:])[0]
    torch.testing.assert_close(packed, logits, atol=1e-4, rtol=1e-4)
    assert model.global_pool == "token", "the model itself is left alone"
    payload = tokmerge.patch(other, tokmerge.TopR(8))(shots[:2])[1].payload_bytes
    assert (payload > tokmerge.patch(model, tokmerge.TopR(8))(shots[:2])[1].payload_bytes).all(), "sizes are sent too"


def test_the_average_head_knows_the_classes_it_has_seen():
    shots = torch.randn(30, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([2, 5, 7] * 10)
    other = payload_baselines.average_head(build(), [batch_of(shots, labels)])
    assert set(other(torch.randn(40, 3, 32, 32)).argmax(1).tolist()) <= {2, 5, 7}
    assert (other(shots).argmax(1) == labels).double().mean() > 0.8
    with pytest.raises(ValueError, match="all 10 images are of one class"):
        payload_baselines.average_head(build(), [batch_of(shots[:10], torch.zeros(10))])


def test_class_token_bytes():
    assert payload_baselines.class_token_bytes(build()) == len(wire.encode(torch.zeros(1, 48)))
    assert payload_baselines.class_token_bytes(build("registers")) == len(wire.encode(torch.zeros(5, 48)))
