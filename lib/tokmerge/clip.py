"""Merging in transformers' CLIP and SigLIP vision towers: the only module that touches their internals.

`patch` wraps a tower; the tower itself, its class and its state_dict stay as they are. One layer (pre-norm):

    x = x + attention(layer_norm1(x))   proportional: softmax_j(q_i.k_j / sqrt(d) + log s_j)
    x = merge(x)                        the policy chooses pairs by tokens or mean-over-heads keys (`policy.feature`)
    x = x + mlp(layer_norm2(x))         on the survivors

A multimodal model reads one hidden layer, usually the last but one. Layers beyond it are not run, so a policy
has one threshold for every layer that is run, and only those cost.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionModel, SiglipVisionModel
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

from tokmerge import merge
from tokmerge.cost import ViTCost, linear_macs, module_macs
from tokmerge.packed import Layout, Packed, attend, pack
from tokmerge.policies import Policy

# The layer class of each tower class, and its tokens that stand for no patch.
TOWERS = {CLIPVisionModel: (CLIPEncoderLayer, 1), SiglipVisionModel: (SiglipEncoderLayer, 0)}


@dataclass(frozen=True)
class TowerRecord:
    """What one pass through the tower did.

    Attributes:
        tokens: (B, l + 1) int64, tokens entering each layer that was run, and after the last; CLS counts.
        macs: (B,) int64, multiply-accumulates, patch embedding and merging overhead included.
        source: (B, N) int64: which of its image's features each patch is part of, -1 if it was dropped;
            None if it was not asked for.
    """

    tokens: Tensor
    macs: Tensor
    source: Tensor | None = None


class MergedTower(nn.Module):
    """A vision tower that merges tokens as a policy says. Made by `patch`.

    Attributes:
        model: the wrapped tower, unchanged.
        policy: what merges; None for nothing.
        depth: layers that are run.
        skip: leading tokens left out of the features.
        n_features: features of an unmerged image.
        protected: leading tokens that never merge: CLS, and whatever is left out of the features.
    """

    def __init__(self, model: CLIPVisionModel | SiglipVisionModel, policy: Policy | None, depth: int, skip: int):
        super().__init__()
        self.model = model
        self.policy = policy
        self.depth = depth
        self.skip = skip
        class_tokens = TOWERS[type(model)][1]
        self.n_features = model.embeddings.num_positions - skip
        self.protected = max(class_tokens, skip)
        self._cost: ViTCost | None = None

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The wrapped tower's state_dict, under its own names."""
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load into the wrapped tower."""
        return self.model.load_state_dict(*args, **kwargs)

    @property
    def cost(self) -> ViTCost:
        """What the layers that are run cost; the tower has no head."""
        if self._cost is None:
            config: Any = self.model.config
            layers, side = self._layers(), config.image_size
            self._cost = ViTCost(
                embed=module_macs(self.model.embeddings.patch_embedding, 1, config.num_channels, side, side),
                attn_linear=tuple(linear_macs(layer.self_attn) for layer in layers),
                mlp_linear=tuple(linear_macs(layer.mlp) for layer in layers),
                attn_dim=layers[0].self_attn.num_heads * layers[0].self_attn.head_dim,
                head_dim=layers[0].self_attn.head_dim,
                embed_dim=config.hidden_size,
                pool_per_token=0,
                head=0,
                protected=self.protected,
            )
        return self._cost

    def forward(self, images: Tensor, source: bool = False) -> tuple[Packed, TowerRecord]:
        """The chosen hidden layer, and what it took.

        Args:
            images: (B, C, H, W), of the size the tower was made for.
            source: also keep the source map.

        Returns:
            The packed features, of width D and without the leading tokens, and the TowerRecord.

        Raises:
            RuntimeError: the tower is in training mode.
            ValueError: images of another shape.
        """
        self._check_images(images)
        x = self.model.embeddings(images)
        tokens = pack(self.model.pre_layrnorm(x) if isinstance(self.model, CLIPVisionModel) else x)
        if self.policy is not None:
            tokens = replace(tokens, place=self._places(x.device).repeat(len(x), 1))
        if source:
            batch, n = x.shape[:2]
            tokens = replace(tokens, source=torch.arange(n, device=x.device).repeat(batch, 1))
        lengths = [tokens.lengths]
        for index in range(self.depth):
            tokens = self._layer(tokens, index)
            lengths.append(tokens.lengths)
        counts = torch.stack(lengths, dim=1)
        features = drop_leading(tokens, self.skip)
        return features, TowerRecord(counts, self.cost.total(counts, self.policy), features.source)

    def _places(self, device: torch.device) -> Tensor:
        """(N, 2) row and column of each patch; CLS, which never merges, is at the first one's."""
        n = self.model.embeddings.num_positions
        config: Any = self.model.config
        patch = torch.arange(n, device=device).sub(TOWERS[type(self.model)][1]).clamp(min=0)
        side = config.image_size // config.patch_size
        return torch.stack([patch // side, patch % side], dim=1).float()

    def _layers(self) -> list[Any]:
        return list(self.model.encoder.layers)[: self.depth]

    def _check_images(self, images: Tensor) -> None:
        if self.training:
            raise RuntimeError("token merging is for inference: call .eval() first")
        config = self.model.config
        wanted = (config.num_channels, config.image_size, config.image_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != wanted:
            raise ValueError(
                f"images must be (B, {', '.join(map(str, wanted))}) for this tower, got {tuple(images.shape)}"
            )

    def _layer(self, tokens: Packed, index: int) -> Packed:
        layer: Any = self.model.encoder.layers[index]
        tokens = self._attend(layer, tokens, index)
        return tokens.with_x(tokens.x + layer.mlp(layer.layer_norm2(tokens.x)))

    def _attend(self, layer: Any, tokens: Packed, index: int) -> Packed:
        """Attention and merging, by themselves: queries, keys and values are gone before the MLP needs the memory."""
        out, qkv = _attention(layer.self_attn, layer.layer_norm1(tokens.x), tokens.layout, tokens.sizes)
        tokens = tokens.with_x(tokens.x + out)
        return merge.step(tokens, self.policy, layer=index, depth=self.depth, protected=self.protected, qkv=qkv)


def _attention(attn: Any, x: Tensor, layout: Layout, sizes: Tensor | None) -> tuple[Tensor, Tensor]:
    """CLIP's and SigLIP's attention on packed rows: (T, D) -> (T, D), and the (T, 3, H, d) queries, keys, values."""
    parts = [
        project(x).view(len(x), attn.num_heads, attn.head_dim) for project in (attn.q_proj, attn.k_proj, attn.v_proj)
    ]
    qkv = torch.stack(parts, dim=1)
    return attn.out_proj(attend(qkv, layout, sizes)), qkv


def drop_leading(tokens: Packed, n: int) -> Packed:
    """Leave the first ``n`` tokens of every image out; the source map then counts without them.

    >>> left = drop_leading(pack(torch.arange(6.0).view(2, 3, 1)), 1)
    >>> left.x.flatten().tolist(), left.lengths.tolist()
    ([1.0, 2.0, 4.0, 5.0], [2, 2])
    """
    if n == 0:
        return tokens
    layout = tokens.layout
    keep = torch.ones(len(tokens.x), dtype=torch.bool, device=tokens.x.device)
    keep[layout.offsets[:, None] + torch.arange(n, device=keep.device)] = False
    source = tokens.source
    if source is not None:
        source = torch.where(source < 0, source, source - n)[:, n:]
    sizes = None if tokens.sizes is None else tokens.sizes[keep]
    place = None if tokens.place is None else tokens.place[keep]
    return Packed(tokens.x[keep], Layout(layout.lengths - n), sizes, source, place)


def patch(tower: nn.Module, policy: Policy | None, *, layer: int = -2, skip: int | None = None) -> MergedTower:
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
    encoder: Any = tower.encoder
    layers = encoder.layers
    for index, block in enumerate(layers):
        if type(block) is not kind:
            raise TypeError(
                f"layer {index} of the tower is a {type(block).__name__}: only {kind.__name__} is supported"
            )
    states = len(layers) + 1
    if not -states <= layer < states:
        raise ValueError(f"there is no hidden state {layer} in a tower of {len(layers)} layers")
    depth = layer % states
    if depth == 0:
        raise ValueError(f"hidden state {layer} comes before the first layer: nothing can merge there")
    if policy is not None:
        if not isinstance(policy, Policy):
            raise TypeError(
                f"policy is a {type(policy).__name__}: use one of tokmerge.policies or tokmerge.peers, or None"
            )
        policy.check(depth)
    merged = MergedTower(tower, policy, depth, class_tokens if skip is None else skip)  # type: ignore[arg-type]
    return merged.train(tower.training)


def unpatch(merged: MergedTower) -> CLIPVisionModel | SiglipVisionModel:
    """The tower as it was before `patch`."""
    return merged.model
