import re
import shutil

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from tokmerge.data import fashion_mnist, image_sets
from tokmerge.io import paths, store
from tokmerge.models import zoo


def test_the_shipped_model_has_deits_token_geometry():
    model = zoo.build_fashion_vit()
    assert model.patch_embed.num_patches + model.num_prefix_tokens == 197
    assert len(model.blocks) == 12
    assert type(model) is timm.models.VisionTransformer
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_the_shipped_weights_match_their_card():
    card = zoo.vit_card()
    file = paths.ASSETS / "train_vit" / "fashion_vit.safetensors"
    assert card["sha256"] == store.sha256(file)
    assert file.stat().st_size <= 6_000_000
    assert card["test_top1"] >= 0.91
    assert card["n_train"] + card["n_search"] == 60_000
    assert card["parameters"] == sum(p.numel() for p in zoo.load_model(zoo.FASHION_VIT).parameters())


def test_the_shipped_model_classifies_the_shipped_photos():
    model = zoo.load_model(zoo.FASHION_VIT)
    assert not model.training
    hits = []
    for split in ("train", "test"):
        batch = image_sets.tensors(fashion_mnist.sample(split), zoo.transform(model))
        with torch.inference_mode():
            hits.append(model(batch.images).argmax(1) == batch.labels)
    # 512 held-back photos: three standard errors around 91 %.
    assert torch.cat(hits).float().mean() > 0.87


def test_changed_weights_are_refused(tmp_path, monkeypatch):
    shutil.copytree(paths.ASSETS / "train_vit", tmp_path / "train_vit")
    monkeypatch.setattr(paths, "ASSETS", tmp_path)
    file = tmp_path / "train_vit" / "fashion_vit.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    named = re.escape(str(file))
    with pytest.raises(ValueError, match=rf"does not match its card.*git checkout -- {named}`"):
        zoo.load_model(zoo.FASHION_VIT)


def test_a_local_timm_checkpoint_is_loaded(tmp_path):
    source = timm.create_model("vit_tiny_patch16_224", num_classes=3)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    model = zoo.load_model("vit_tiny_patch16_224", tmp_path / "w.safetensors", num_classes=3)
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in model.state_dict().items())


def test_bad_names_and_checkpoints_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"unknown model 'deit_smal'.*deit"):
        zoo.load_model("deit_smal")
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors of model 'fashion-vit'"):
        zoo.load_model("fashion-vit", tmp_path / "none.safetensors")


def test_transform_is_the_models_own():
    model = zoo.build_fashion_vit()
    example = next(fashion_mnist.sample().examples())
    expected = torch.tensor(list(example.image.tobytes())).view(1, 28, 28) / 255
    expected = (expected - zoo.FASHION_MEAN) / zoo.FASHION_STD
    torch.testing.assert_close(zoo.transform(model)(example.image), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("channels", "mode"), [(1, "RGB"), (3, "L"), (3, "RGBA")])
def test_images_come_with_the_models_channels(channels, mode):
    model = VisionTransformer(img_size=28, patch_size=4, embed_dim=16, depth=1, num_heads=2, in_chans=channels)
    model.pretrained_cfg = {
        "input_size": (channels, 28, 28),
        "crop_pct": 1.0,
        "mean": (0,) * channels,
        "std": (1,) * channels,
    }
    grey = next(fashion_mnist.sample().examples()).image
    made = zoo.transform(model)(grey.convert(mode))
    expected = torch.tensor(list(grey.tobytes())).view(1, 28, 28) / 255
    torch.testing.assert_close(made, expected.expand(channels, 28, 28))


def test_pixels_undo_the_transform():
    model = zoo.build_fashion_vit()
    example = next(fashion_mnist.sample().examples())
    shown = zoo.pixels(model, zoo.transform(model)(example.image))
    assert shown.shape == (28, 28, 1)
    assert shown.tobytes() == example.image.tobytes()
