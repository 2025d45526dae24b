"""Models: the trained vision transformer that ships with the package, and any timm checkpoint.

The shipped model has the token geometry of DeiT at 224/16 on a small canvas: 28x28 input, 14x14 = 196
patches + CLS = 197 tokens, depth 12, built from timm's VisionTransformer. Its patch embedding is a
three-convolution stem (Xiao et al., "Early convolutions help transformers see better", 2106.14881).
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import timm
import torch
from timm.data import create_transform, resolve_model_data_config
from timm.layers import HybridEmbed
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_hybrid import ConvStem
from torch import nn

from tokmerge import data, paths, store

FASHION_VIT = "fashion-vit"
# Mean and standard deviation of the 60,000 training photos' pixels, in [0, 1].
FASHION_MEAN, FASHION_STD = 0.2860, 0.3530


def build_fashion_vit(patch_drop_rate: float = 0.0) -> VisionTransformer:
    """The shipped model's architecture with fresh weights: (B, 1, 28, 28) -> (B, 10).

    Args:
        patch_drop_rate: share of patches left out in training mode (no effect in eval mode).
    """
    stem = ConvStem(in_chans=1, depth=3, channels=(32, 64, 64), kernel_size=3, stride=(1, 2, 1), act_layer=nn.GELU)
    model = VisionTransformer(
        img_size=28,
        patch_size=1,
        in_chans=1,
        num_classes=10,
        embed_dim=64,
        depth=12,
        num_heads=2,
        init_values=0.1,
        patch_drop_rate=patch_drop_rate,
        embed_layer=partial(HybridEmbed, backbone=stem),
    )
    cfg: Any = {
        "architecture": FASHION_VIT,
        "input_size": (1, 28, 28),
        "mean": (FASHION_MEAN,),
        "std": (FASHION_STD,),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
    }
    model.pretrained_cfg = cfg
    return model


def load(name: str, checkpoint: str | Path | None = None, **kwargs: Any) -> nn.Module:
    """A model ready to evaluate.

    Args:
        name: ``"fashion-vit"`` (ships with the package) or any name timm knows.
        checkpoint: local weights file; without it the shipped weights or timm's pretrained ones.
        **kwargs: passed to ``timm.create_model``.

    Raises:
        ValueError: unknown name, or shipped weights that do not match their card.
        FileNotFoundError: no such checkpoint.
    """
    if checkpoint is not None and not Path(checkpoint).is_file():
        raise FileNotFoundError(f"checkpoint {checkpoint} of model {name!r} does not exist")
    if name == FASHION_VIT:
        weights = Path(checkpoint or paths.ASSETS / "fashion_vit.safetensors")
        if checkpoint is None and store.sha256(weights) != card()["sha256"]:
            raise ValueError(f"{weights} does not match its card: restore it with `git checkout -- {weights}`")
        model: nn.Module = build_fashion_vit()
        model.load_state_dict({key: value.float() for key, value in store.load_tensors(weights).items()})
    elif not timm.is_model(name):
        close = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:3])
        raise ValueError(
            f"unknown model {name!r}: use {FASHION_VIT!r} or a timm name" + (f" such as {close}" if close else "")
        )
    elif checkpoint is not None:
        model = timm.create_model(name, pretrained=False, checkpoint_path=str(checkpoint), **kwargs)
    else:
        model = timm.create_model(name, pretrained=True, **kwargs)
    return model.eval()


def card() -> dict[str, Any]:
    """The shipped model's card: data, split, recipe, seed, accuracy, sha256 of its weights."""
    return store.load_json(paths.ASSETS / "fashion_vit.json")


def transform(model: nn.Module) -> Callable[[Any], torch.Tensor]:
    """The model's own evaluation transform: any PIL image -> (C, H, W) float tensor of its channels."""
    config = resolve_model_data_config(model)
    made, mode = create_transform(**config, is_training=False), "L" if config["input_size"][0] == 1 else "RGB"
    return lambda image: made(image.convert(mode))


def pixels(model: nn.Module, image: torch.Tensor) -> np.ndarray:
    """What the model was shown: undo the normalisation of one (C, H, W) image; (H, W, C) uint8."""
    config = resolve_model_data_config(model)
    mean, std = (torch.tensor(config[name]).view(-1, 1, 1) for name in ("mean", "std"))
    return ((image.cpu() * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def recorded(inputs_dir: str | Path) -> tuple[dict[str, Any], pd.DataFrame]:
    """What notebook 10_inputs settled on, for `reload`: its inputs.json and its splits.parquet.

    Raises:
        FileNotFoundError: it has not been run.
    """
    return (
        store.load_json(paths.need(f"{inputs_dir}/inputs.json", made_by="10_inputs")),
        store.load_table(paths.need(f"{inputs_dir}/splits.parquet", made_by="10_inputs")),
    )


def reload(
    inputs: dict[str, Any], splits: pd.DataFrame, device: str | torch.device = "cpu"
) -> tuple[nn.Module, data.ImageSet, data.ImageSet]:
    """The model and the search and test split that notebook 10_inputs settled on.

    Args:
        inputs: its inputs.json.
        splits: its splits.parquet.
        device: where the model goes.

    Returns:
        model, search split, test split.

    Raises:
        ValueError: the data no longer holds the ids that were recorded.
    """
    params = inputs["params"]
    model = load(params["model_name"], params["checkpoint"]).to(device)
    parts = {}
    for name in ("search", "test"):
        source = params[f"{name}_source"]
        images = data.load(params["dataset"], source, path=params["data_path"], data_dir=paths.root() / "data")
        wanted = set(splits.id[splits.split == name])
        part = data.subset(images, [i for i, identifier in enumerate(images.ids) if identifier in wanted])
        if len(part) != len(wanted):
            raise ValueError(
                f"{images.name} has {len(part)} of the {len(wanted)} recorded {name} images: run 10_inputs again"
            )
        parts[name] = part
    return model, parts["search"], parts["test"]
