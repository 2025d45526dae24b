"""Merging in transformers' CLIP and SigLIP vision towers: the only module that touches their internals.

A multimodal model reads one hidden layer, usually the last but one. Layers beyond it are not run, so a policy
has one threshold for every layer that is run, and only those cost.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from tokmerge.io.extras import extra
from tokmerge.merging.matching import Policy
from tokmerge.merging.packed import Packed, attend
from tokmerge.models.cost import ViTCost, linear_macs
from tokmerge.models.merged import MergedTransformer

with extra("llava"):
    from transformers import CLIPVisionModel, SiglipVisionModel
    from transformers.models.clip.modeling_clip import CLIPEncoderLayer
    from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

# The layer class of each tower class, and its tokens that stand for no patch.
TOWERS = {CLIPVisionModel: (CLIPEncoderLayer, 1), SiglipVisionModel: (SiglipEncoderLayer, 0)}


@dataclass(frozen=True)
class TowerRecord:
    """What one pass through the tower did."""

    tokens: Tensor  #: (B, l + 1) int64, tokens entering each layer that was run, and after the last; CLS counts
    macs: Tensor  #: (B,) int64, multiply-accumulates, patch embedding and merging overhead included
    #: (B, N) int64: which of its image's features each patch is part of, -1 if dropped; None unless asked for
    source: Tensor | None = None


class MergedTower(MergedTransformer):
    """A vision tower that merges tokens as a policy says. Made by `patch_tower`; further attributes as of its base.

    Attributes:
        skip: leading tokens left out of the features; neither they nor CLS ever merge.
        n_features: features of an unmerged image.
    """

    def __init__(self, model: CLIPVisionModel | SiglipVisionModel, policy: Policy | None, depth: int, skip: int):
        self.class_tokens = TOWERS[type(model)][1]
        self.has_class_token = self.class_tokens > 0
        super().__init__(model, policy, depth, max(self.class_tokens, skip))
        self.skip = skip
        self.n_features = model.embeddings.num_positions - skip

    @property
    def blocks(self) -> Any:
        return list(self.model.encoder.layers)[: self.depth]

    def passed_over(self) -> list[nn.Module]:
        blocks = self.blocks
        return [*super().passed_over(), self.model.encoder, *blocks, *(block.self_attn for block in blocks)]

    @cached_property
    def cost(self) -> ViTCost:
        """What the layers that are run cost; the tower has no head."""
        model, layers = self.model, [(block.self_attn, block.mlp) for block in self.blocks]
        return ViTCost.of_layers(
            model.embeddings.patch_embedding, self.image_shape, layers, layers[0][0].num_heads,
            embed_dim=model.config.hidden_size, protected=self.protected,
        )  # fmt: skip

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images that the tower takes."""
        config = self.model.config
        return config.num_channels, config.image_size, config.image_size

    def forward(self, images: Tensor, source: bool = False) -> tuple[Packed, TowerRecord]:
        """The chosen hidden layer of (B, C, H, W) images, without the leading tokens, and what it took.

        Raises:
            RuntimeError: the tower is in training mode.
            ValueError: images of another size than the tower was made for.
        """
        self.check_ready()
        if images.ndim != 4 or images.shape[1:] != self.image_shape:
            wanted = ", ".join(map(str, self.image_shape))
            raise ValueError(f"images must be (B, {wanted}) for this tower, got {tuple(images.shape)}")
        x, side = self.model.embeddings(images), self.model.config.image_size // self.model.config.patch_size
        x = self.model.pre_layrnorm(x) if isinstance(self.model, CLIPVisionModel) else x
        tokens = self.pack_embedded(x, (side, side), self.class_tokens, source)
        tokens, lengths = self.run_layers(tokens, range(self.depth))
        counts = torch.stack([*lengths, tokens.lengths], dim=1)
        features = tokens.drop_leading(self.skip)
        return features, TowerRecord(counts, self.cost.total(counts, self.policy), features.source)

    def attention(self, layer: int, block: Any, tokens: Packed) -> tuple[Tensor, Tensor]:
        """CLIP's and SigLIP's attention on packed rows."""
        attn, x = block.self_attn, block.layer_norm1(tokens.x)
        parts = [project(x) for project in (attn.q_proj, attn.k_proj, attn.v_proj)]
        qkv = torch.stack([part.view(len(x), attn.num_heads, attn.head_dim) for part in parts], dim=1)
        return attn.out_proj(attend(qkv, tokens.layout, tokens.sizes)), qkv

    def mlp(self, block: Any, x: Tensor) -> Tensor:
        return block.mlp(block.layer_norm2(x))


def patch_tower(tower: nn.Module, policy: Policy | None, *, layer: int = -2, skip: int | None = None) -> MergedTower:
    """Attach a merge policy to a vision tower, or replace the one a patched tower has.

    Args:
        tower: transformers' CLIPVisionModel or SiglipVisionModel, or a patched one.
        policy: what merges, with one entry per layer that is run; None for nothing.
        layer: which hidden state the features are, counted as transformers does: 0 is the embedding, -1 the
            last layer's output (before the final norm), -2 the last but one.
        skip: leading tokens left out of the features; by default those that stand for no patch (CLS).

    Raises:
        TypeError: the tower or the policy is of an unsupported kind.
        ValueError: the policy does not fit the tower, or there is no such layer.
    """
    if isinstance(tower, MergedTower):
        tower = tower.model
    if type(tower) not in TOWERS:
        names = " or ".join(kind.__name__ for kind in TOWERS)
        raise TypeError(f"cannot merge tokens in a {type(tower).__name__}: a transformers {names} is needed")
    kind, class_tokens = TOWERS[type(tower)]
    layers: Any = tower.get_submodule("encoder.layers")
    for index, block in enumerate(layers):
        found = type(block)
        if found is not kind:
            raise TypeError(f"layer {index} of the tower is a {found.__name__}: only {kind.__name__} is supported")
        linear_macs(block)
    states = len(layers) + 1
    if not -states <= layer < states:
        raise ValueError(f"there is no hidden state {layer} in a tower of {len(layers)} layers")
    depth = layer % states
    if depth == 0:
        raise ValueError(f"hidden state {layer} comes before the first layer: nothing can merge there")
    return MergedTower(tower, policy, depth, class_tokens if skip is None else skip)  # type: ignore[arg-type]
