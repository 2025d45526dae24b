"""Merging in transformers' image encoders: ViT, DeiT, DINOv2, DINOv2 with registers, and DINOv3.

Classifiers give class scores; DINOv3, which has no head there, its pooled features.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokmerge.io.extras import extra
from tokmerge.merging.matching import Policy
from tokmerge.merging.packed import Packed, attend
from tokmerge.models.classifier import MergedClassifier
from tokmerge.models.cost import ViTCost, linear_macs
from tokmerge.models.rotary import Rotary

with extra("llava"):
    from transformers import (
        DeiTForImageClassification,
        DeiTForImageClassificationWithTeacher,
        Dinov2ForImageClassification,
        Dinov2WithRegistersForImageClassification,
        DINOv3ViTModel,
        ViTForImageClassification,
    )
    from transformers.models.dinov3_vit.modeling_dinov3_vit import rotate_half


@dataclass(frozen=True)
class Encoder:
    """Where the parts of a kind of model are."""

    base: str  #: of the encoder in the model; empty where the model is one
    layers: str  #: of the layers in the encoder
    layer: str  #: class of each
    norms: tuple[str, str]  #: before attention and before the MLP
    scales: tuple[str, str]  #: after them
    prefix: int  #: class and distillation tokens, without registers
    head: Callable[["MergedEncoder", Packed], Tensor]


def _class_token(merged: "MergedEncoder", packed: Packed) -> Tensor:
    return merged.model.classifier(merged.leading(packed, 1)[:, 0])


def _teacher(merged: "MergedEncoder", packed: Packed) -> Tensor:
    first, second = merged.leading(packed, 2).unbind(1)
    return (merged.model.cls_classifier(first) + merged.model.distillation_classifier(second)) / 2


def _class_and_mean(merged: "MergedEncoder", packed: Packed) -> Tensor:
    mean = merged.average(packed, merged.protected)
    return merged.model.classifier(torch.cat([merged.leading(packed, 1)[:, 0], mean], dim=1))


def _features(merged: "MergedEncoder", packed: Packed) -> Tensor:
    return merged.leading(packed, 1)[:, 0]


_PLAIN = ("layernorm_before", "layernorm_after"), ("dropout", "dropout")
_SCALED = ("norm1", "norm2"), ("layer_scale1", "layer_scale2")
ENCODERS: dict[type, Encoder] = {
    ViTForImageClassification: Encoder("vit", "layers", "ViTLayer", *_PLAIN, 1, _class_token),
    DeiTForImageClassification: Encoder("deit", "layers", "DeiTLayer", *_PLAIN, 2, _class_token),
    DeiTForImageClassificationWithTeacher: Encoder("deit", "layers", "DeiTLayer", *_PLAIN, 2, _teacher),
    Dinov2ForImageClassification: Encoder("dinov2", "encoder.layer", "Dinov2Layer", *_SCALED, 1, _class_and_mean),
    Dinov2WithRegistersForImageClassification: Encoder(
        "dinov2_with_registers", "encoder.layer", "Dinov2WithRegistersLayer", *_SCALED, 1, _class_and_mean
    ),
    DINOv3ViTModel: Encoder("", "model.layer", "DINOv3ViTLayer", *_SCALED, 1, _features),
}


class MergedEncoder(MergedClassifier):
    """One of transformers' image encoders that merges tokens. Made by `tokmerge.patch`; attributes as of its base.

    Raises:
        TypeError: the model is of another kind.
    """

    def __init__(self, model: Any, policy: Policy | None, precision: str, split_layer: int | None) -> None:
        if type(model) not in ENCODERS:
            known = ", ".join(kind.__name__ for kind in ENCODERS)
            llava = ": tokmerge.llava.patch is for LLaVAs" if "Llava" in type(model).__name__ else ""
            raise TypeError(f"cannot merge tokens in a {type(model).__name__}: one of {known} is needed{llava}")
        self._kind = kind = ENCODERS[type(model)]
        encoder = model.get_submodule(kind.base)
        layers = encoder.get_submodule(kind.layers)
        for index, layer in enumerate(layers):
            if type(layer).__name__ != kind.layer:
                raise TypeError(f"layer {index} of the model is a {type(layer).__name__}, not a {kind.layer}")
            linear_macs(layer)
        config, self.wants_places = model.config, hasattr(encoder, "rope_embeddings")
        self.classifies = kind.head is not _features
        protected = kind.prefix + getattr(config, "num_register_tokens", 0)
        super().__init__(model, policy, precision, split_layer, len(layers), protected)
        self.embed_dim = config.hidden_size
        self.n_patches = (config.image_size // config.patch_size) ** 2
        self._rotary: Rotary | None = None

    @property
    def encoder(self) -> Any:
        """The model without its head."""
        return self.model.get_submodule(self._kind.base)

    @property
    def blocks(self) -> Any:
        return self.encoder.get_submodule(self._kind.layers)

    def passed_over(self) -> list[nn.Module]:
        blocks = self.blocks
        return [*super().passed_over(), self.encoder, *blocks, *(block.attention for block in blocks)]

    def embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        encoder, patch = self.encoder, self.model.config.patch_size
        grid = images.shape[2] // patch, images.shape[3] // patch
        if self.wants_places:
            cos, sin = encoder.rope_embeddings(images)
            self._rotary = Rotary.of(sin[:, None], cos[:, None], grid)
        return encoder.embeddings(images), grid

    def last_norm(self, x: Tensor) -> Tensor:
        return (self.encoder.norm if self.wants_places else self.encoder.layernorm)(x)

    @property
    def head(self) -> tuple[Any, ...]:
        return tuple(part for name, part in self.model.named_children() if "classifier" in name)

    @property
    def reads_one_token(self) -> bool:
        return self._kind.head is not _class_and_mean

    def forward_head(self, packed: Packed) -> Tensor:
        return self._kind.head(self, packed)

    def measure_cost(self, image_shape: tuple[int, ...]) -> ViTCost:
        config, layers = self.model.config, [(block.attention, block.mlp) for block in self.blocks]
        return ViTCost.of_layers(
            self.encoder.embeddings.patch_embeddings, image_shape, layers, config.num_attention_heads,
            embed_dim=config.hidden_size, protected=self.protected, head=sum(map(linear_macs, self.head)),
        )  # fmt: skip

    def check_images(self, images: Tensor) -> None:
        config, (_, channels, *size) = self.model.config, images.shape
        # ViT and DeiT have a position for every patch of their own size alone.
        fits = (
            [config.image_size] * 2 == size
            if "dropout" in self._kind.scales
            else not any(side % config.patch_size for side in size)
        )
        if channels != config.num_channels or not fits:
            wanted = f"(B, {config.num_channels}, {config.image_size}, {config.image_size})"
            raise ValueError(f"images must be {wanted} for this model, got shape {tuple(images.shape)}")

    def attention(self, layer: int, block: Any, tokens: Packed) -> tuple[Tensor, Tensor]:
        """Its attention on packed rows."""
        attn, x = block.attention, getattr(block, self._kind.norms[0])(tokens.x)
        q, k, v = (project(x).view(len(x), -1, attn.head_dim) for project in (attn.q_proj, attn.k_proj, attn.v_proj))
        if self._rotary is not None:
            sin, cos = self._rotary(tokens, self.protected)
            q, k = ((part * cos + rotate_half(part) * sin).type_as(v) for part in (q, k))
        qkv = torch.stack([q, k, v], dim=1)
        out = attn.o_proj(attend(qkv, tokens.layout, tokens.sizes))
        return getattr(block, self._kind.scales[0])(out), qkv

    def mlp(self, block: Any, x: Tensor) -> Tensor:
        kind = self._kind
        return getattr(block, kind.scales[1])(block.mlp(getattr(block, kind.norms[1])(x)))
