import json
import re
import shutil

import pandas as pd
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from tokmerge import data, fashion, models, paths, store


def test_the_shipped_model_has_deits_token_geometry():
    model = models.build_fashion_vit()
    assert model.patch_embed.num_patches + model.num_prefix_tokens == 197
    assert len(model.blocks) == 12
    assert type(model) is timm.models.VisionTransformer
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_the_shipped_weights_match_their_card():
    card = models.card()
    file = paths.ASSETS / "fashion_vit.safetensors"
    assert card["sha256"] == store.sha256(file)
    assert file.stat().st_size <= 6_000_000
    assert card["test_top1"] >= 0.91
    assert card["n_train"] + card["n_search"] == 60_000
    assert card["parameters"] == sum(p.numel() for p in models.load(models.FASHION_VIT).parameters())


def test_the_shipped_model_classifies_the_shipped_photos():
    model = models.load(models.FASHION_VIT)
    assert not model.training
    hits = []
    for split in ("train", "test"):
        batch = data.tensors(fashion.sample(split), models.transform(model))
        with torch.inference_mode():
            hits.append(model(batch.images).argmax(1) == batch.labels)
    # 512 held-back photos: three standard errors around 91 %.
    assert torch.cat(hits).float().mean() > 0.87


def test_changed_weights_are_refused(tmp_path, monkeypatch):
    for name in ("fashion_vit.json", "fashion_vit.safetensors"):
        shutil.copy(paths.ASSETS / name, tmp_path)
    monkeypatch.setattr(paths, "ASSETS", tmp_path)
    content = bytearray((tmp_path / "fashion_vit.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "fashion_vit.safetensors").write_bytes(content)
    named = re.escape(str(tmp_path / "fashion_vit.safetensors"))
    with pytest.raises(ValueError, match=rf"does not match its card.*git checkout -- {named}`"):
        models.load(models.FASHION_VIT)


def test_a_local_timm_checkpoint_is_loaded(tmp_path):
    source = timm.create_model("vit_tiny_patch16_224", num_classes=3)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    model = models.load("vit_tiny_patch16_224", tmp_path / "w.safetensors", num_classes=3)
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in model.state_dict().items())


def test_bad_names_and_checkpoints_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"unknown model 'deit_smal'.*deit"):
        models.load("deit_smal")
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors of model 'fashion-vit'"):
        models.load("fashion-vit", tmp_path / "none.safetensors")


def test_transform_is_the_models_own():
    model = models.build_fashion_vit()
    example = next(fashion.sample().examples())
    expected = torch.tensor(list(example.image.tobytes())).view(1, 28, 28) / 255
    expected = (expected - models.FASHION_MEAN) / models.FASHION_STD
    torch.testing.assert_close(models.transform(model)(example.image), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("channels", "mode"), [(1, "RGB"), (3, "L"), (3, "RGBA")])
def test_images_come_with_the_models_channels(channels, mode):
    model = VisionTransformer(img_size=28, patch_size=4, embed_dim=16, depth=1, num_heads=2, in_chans=channels)
    model.pretrained_cfg = {
        "input_size": (channels, 28, 28),
        "crop_pct": 1.0,
        "mean": (0,) * channels,
        "std": (1,) * channels,
    }
    grey = next(fashion.sample().examples()).image
    made = models.transform(model)(grey.convert(mode))
    expected = torch.tensor(list(grey.tobytes())).view(1, 28, 28) / 255
    torch.testing.assert_close(made, expected.expand(channels, 28, 28))


def test_pixels_undo_the_transform():
    model = models.build_fashion_vit()
    example = next(fashion.sample().examples())
    shown = models.pixels(model, models.transform(model)(example.image))
    assert shown.shape == (28, 28, 1)
    assert shown.tobytes() == example.image.tobytes()


def test_reload_gives_what_was_recorded(tmp_path):
    params = {
        "dataset": "sample",
        "data_path": None,
        "search_source": "train",
        "test_source": "test",
        "model_name": "fashion-vit",
        "checkpoint": None,
    }
    ids = {"search": fashion.sample("train").ids[5:9], "test": fashion.sample("test").ids[:3]}
    splits = pd.DataFrame(
        [(name, identifier) for name, part in ids.items() for identifier in part], columns=["split", "id"]
    )
    _, search, test = models.reload(json.loads(json.dumps({"params": params})), splits)
    assert list(search.ids) == ids["search"]
    assert [example.id for example in test.examples()] == ids["test"]
    splits.loc[0, "id"] = "train-99999"
    with pytest.raises(ValueError, match="3 of the 4 recorded search images"):
        models.reload({"params": params}, splits)
