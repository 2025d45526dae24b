"""Small models with the structure of the real ones, and images that hold both plain and busy regions."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer

torch.set_num_threads(1)

GEOMETRY = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 10}
VARIANTS = {
    "cls": (VisionTransformer, {}),
    "no_cls_avg": (VisionTransformer, {"class_token": False, "global_pool": "avg"}),
    "cls_avg": (VisionTransformer, {"global_pool": "avg"}),
    "avgmax": (VisionTransformer, {"class_token": False, "global_pool": "avgmax"}),
    "max": (VisionTransformer, {"global_pool": "max"}),
    "map": (VisionTransformer, {"class_token": False, "global_pool": "map"}),
    "registers": (VisionTransformer, {"reg_tokens": 4, "no_embed_class": True}),
    "distilled": (VisionTransformerDistilled, {}),
    "layer_scale": (VisionTransformer, {"init_values": 0.5}),
    "qk_norm": (VisionTransformer, {"qk_norm": True}),
    "pre_norm": (VisionTransformer, {"pre_norm": True}),
    "include_prefix": (VisionTransformer, {"global_pool": "avg", "pool_include_prefix": True}),
}


def build(variant="cls", **overrides):
    """A small random model whose tokens are as spread out as a trained one's."""
    kind, arguments = VARIANTS[variant]
    torch.manual_seed(7)
    model = kind(**{**GEOMETRY, **arguments, **overrides}).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3 if name == "pos_embed" else 1.5 * parameter.shape[-1] ** -0.5)
    return model.requires_grad_(False)


@pytest.fixture(params=VARIANTS)
def any_model(request):
    return build(request.param)


@pytest.fixture
def model():
    return build()


@pytest.fixture
def images():
    """(5, 3, 32, 32): noise on growing parts of plain canvases, so that images differ in redundancy."""
    generator = torch.Generator().manual_seed(3)
    canvas = torch.zeros(5, 3, 32, 32) + torch.linspace(-1, 1, 5)[:, None, None, None]
    for i in range(5):
        rows = 4 + 7 * i
        canvas[i, :, :rows] += torch.randn(3, min(rows, 32), 32, generator=generator)
    return canvas


def hub_folder(folder, splits, size=(28, 28), classes=10):
    """A local data set with the hub's columns, one parquet file per split."""
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=[f"class {i}" for i in range(classes)])
    )
    rng = np.random.default_rng(1)
    photos = {}
    (folder / "data").mkdir(parents=True)
    for split, n in splits.items():
        photos[split] = [Image.fromarray(rng.integers(0, 256, size, np.uint8)) for _ in range(n)]
        rows = datasets.Dataset.from_dict(
            {"image": photos[split], "label": [i % classes for i in range(n)]}, features=features
        )
        rows.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return photos
