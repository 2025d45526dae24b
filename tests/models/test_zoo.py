import re
import shutil

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from tokmerge.data import fashion_mnist, image_sets
from tokmerge.io import paths, store
from tokmerge.models import tiny_llava, zoo


def pixels_of(image):
    return torch.tensor(list(image.tobytes())).view(1, 28, 28) / 255


def test_the_shipped_model_has_deits_token_geometry():
    model = zoo.build_fashion_vit()
    assert model.patch_embed.num_patches + model.num_prefix_tokens == 197
    assert len(model.blocks) == 12
    assert type(model) is timm.models.VisionTransformer
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_the_shipped_weights_match_their_card_and_classify_the_shipped_photos():
    model, card, hits = zoo.load_model(zoo.FASHION_VIT), zoo.vit_card(), []
    assert (paths.ASSETS / "train_vit" / "fashion_vit.safetensors").stat().st_size <= 6_000_000
    assert card["test_top1"] >= 0.92
    assert card["n_train"] + card["n_search"] + card["n_select"] == 60_000
    assert card["parameters"] == sum(p.numel() for p in model.parameters())
    assert not model.training
    for split in ("train", "test"):
        batch = image_sets.tensors(fashion_mnist.sample(split), zoo.transform(model))
        with torch.inference_mode():
            hits.append(model(batch.images).argmax(1) == batch.labels)
    # 512 held-back photos: three standard errors around 91 %.
    assert torch.cat(hits).float().mean() > 0.87


def test_no_image_is_in_two_splits_and_they_are_those_that_are_cut_again():
    splits = store.load_table(paths.ASSETS / "train_vit" / "splits.parquet")
    assert splits.id.is_unique
    assert splits.split.value_counts().to_dict() == {"train": 55000, "test": 10000, "select": 4000, "search": 1000}
    assert set(fashion_mnist.sample("train").ids) <= set(splits.id[splits.split.isin(["search", "select"])])


@pytest.mark.parametrize(
    ("weights", "load"),
    [
        ("train_vit/fashion_vit.safetensors", lambda: zoo.load_model(zoo.FASHION_VIT)),
        ("train_llava/scenes_llava.safetensors", lambda: tiny_llava.load_tiny_llava("scenes-llava")),
    ],
)
def test_changed_weights_are_refused(tmp_path, monkeypatch, weights, load):
    file = tmp_path / weights
    shutil.copytree((paths.ASSETS / weights).parent, file.parent)
    monkeypatch.setattr(paths, "ASSETS", tmp_path)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"does not match its card.*git checkout -- {re.escape(str(file))}`"):
        load()


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
    with pytest.raises(ValueError, match="no model 'clip'"):
        tiny_llava.load_tiny_llava("clip")


def test_transform_is_the_models_own_and_pixels_undo_it():
    model, image = zoo.build_fashion_vit(), next(fashion_mnist.sample().examples()).image
    made = zoo.transform(model)(image)
    torch.testing.assert_close(made, (pixels_of(image) - zoo.FASHION_MEAN) / zoo.FASHION_STD, atol=1e-6, rtol=0)
    shown = zoo.pixels(model, made)
    assert shown.shape == (28, 28, 1)
    assert shown.tobytes() == image.tobytes()


@pytest.mark.parametrize(("channels", "mode"), [(1, "RGB"), (3, "L"), (3, "RGBA")])
def test_images_come_with_the_models_channels(channels, mode):
    model = VisionTransformer(img_size=28, patch_size=4, embed_dim=16, depth=1, num_heads=2, in_chans=channels)
    means = {"mean": (0,) * channels, "std": (1,) * channels}
    model.pretrained_cfg = {"input_size": (channels, 28, 28), "crop_pct": 1.0, **means}
    grey = next(fashion_mnist.sample().examples()).image
    torch.testing.assert_close(zoo.transform(model)(grey.convert(mode)), pixels_of(grey).expand(channels, 28, 28))
