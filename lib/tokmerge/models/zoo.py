"""Vision transformers: the trained ones that ship with the package, and any timm checkpoint.

The shipped models, of one architecture, have the token geometry of DeiT at 224/16 on a small canvas: 28x28 input,
14x14 = 196 patches + CLS = 197 tokens, depth 12, built from timm's VisionTransformer. Its patch embedding is a
three-convolution stem (Xiao et al., "Early convolutions help transformers see better", 2106.14881).
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.data import create_transform, resolve_model_data_config
from timm.layers import HybridEmbed
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_hybrid import ConvStem
from torch import nn

from tokmerge.io import paths, store
from tokmerge.models.saliency import SALIENCY_VIT, load_saliency_vit

FASHION_VIT, FASHION_VIT_TAUGHT = "fashion-vit", "fashion-vit-taught"
# Their files. The second met pooled and partial token grids in its training, the first has unlearned that.
SHIPPED = {FASHION_VIT: "fashion_vit", FASHION_VIT_TAUGHT: "fashion_vit_taught"}
# Mean and standard deviation of the 60,000 training photos' pixels, in [0, 1].
FASHION_MEAN, FASHION_STD = 0.2860, 0.3530


def build_fashion_vit(patch_drop_rate: float = 0.0) -> VisionTransformer:
    """The shipped model's architecture with fresh weights: (B, 1, 28, 28) -> (B, 10).

    A share ``patch_drop_rate`` of the patches is left out in training mode.
    """
    stem = ConvStem(in_chans=1, depth=3, channels=(32, 64, 64), kernel_size=3, stride=(1, 2, 1), act_layer=nn.GELU)
    model: Any = VisionTransformer(
        img_size=28, patch_size=1, in_chans=1, num_classes=10, embed_dim=64, depth=12, num_heads=2, init_values=0.1,
        patch_drop_rate=patch_drop_rate, embed_layer=partial(HybridEmbed, backbone=stem),
    )  # fmt: skip
    model.pretrained_cfg = {
        "architecture": FASHION_VIT, "input_size": (1, 28, 28), "mean": (FASHION_MEAN,), "std": (FASHION_STD,),
        "crop_pct": 1.0, "interpolation": "bicubic",
    }  # fmt: skip
    return model


def load_weights(model: nn.Module, weights: Path, sha256: str | None) -> None:
    """Load what was saved in 16 bits; ValueError if it is not what the sha256 (None: any) is of."""
    if sha256 is not None and store.sha256(weights) != sha256:
        raise ValueError(f"{weights} does not match its card: restore it with `git checkout -- {weights}`")
    model.load_state_dict({key: value.float() for key, value in store.load_tensors(weights).items()})


def load_model(name: str, checkpoint: str | Path | None = None, **kwargs: Any) -> nn.Module:
    """A model ready to evaluate.

    Args:
        name: one of `SHIPPED`, `tokmerge.models.saliency.SALIENCY_VIT`, or any name timm knows.
        checkpoint: local weights file; without it the shipped weights or timm's pretrained ones.
        **kwargs: passed to ``timm.create_model``.

    Raises:
        ValueError: unknown name, or shipped weights that do not match their card.
        FileNotFoundError: no such checkpoint.
    """
    if checkpoint is not None and not Path(checkpoint).is_file():
        raise FileNotFoundError(f"checkpoint {checkpoint} of model {name!r} does not exist")
    if name in SHIPPED:
        model: nn.Module = build_fashion_vit()
        weights = Path(checkpoint or paths.ASSETS / "train_vit" / f"{SHIPPED[name]}.safetensors")
        load_weights(model, weights, vit_card(name)["sha256"] if checkpoint is None else None)
    elif name == SALIENCY_VIT:
        model = load_saliency_vit(checkpoint, paths.data())
    elif not timm.is_model(name):
        close = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:3])
        known, such = ", ".join(map(repr, (*SHIPPED, SALIENCY_VIT))), f" such as {close}" if close else ""
        raise ValueError(f"unknown model {name!r}: use {known} or a timm name{such}")
    else:
        model = timm.create_model(name, pretrained=checkpoint is None, checkpoint_path=checkpoint, **kwargs)
    return model.eval()


def vit_card(name: str = FASHION_VIT) -> dict[str, Any]:
    """A shipped model's card: data, split, recipe, seed, accuracy, sha256 of its weights."""
    return store.load_json(paths.ASSETS / "train_vit" / f"{SHIPPED[name]}.json")


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
