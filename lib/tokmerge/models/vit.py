"""Merging in a timm VisionTransformer: the only module that touches its internals.

`patch` wraps a model; the model itself, its class and its state_dict stay as they are.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from tokmerge import wire
from tokmerge.merging.matching import Policy
from tokmerge.merging.merge import unmerge_tokens
from tokmerge.merging.packed import Packed, attend, pack
from tokmerge.models.cost import ViTCost
from tokmerge.models.merged import MergedTransformer, check_policy

# What happens to the tokens between device and server.
TokenChannel = Callable[[Packed], Packed]
POOLS = ("token", "avg", "max", "avgmax", "map")


@dataclass(frozen=True)
class Record:
    """What one forward pass did."""

    tokens: Tensor  #: (B, L + 1) int64, tokens entering each block, and after the last
    macs: Tensor  #: (B,) int64, multiply-accumulates, merging overhead included
    payload_bytes: Tensor  #: (B,) int64, length of what `tokmerge.wire.encode` produces for each image
    edge_macs: Tensor  #: (B,) int64, those of ``macs`` that are spent before the tokens are sent
    source: Tensor | None = None  #: (B, N) int64 source map, or None if it was not asked for


def unmerge(packed: Packed, record: Record) -> Tensor:
    """The full token grid (B, N, D): every surviving token copied to the places it stands for.

    Args:
        packed: what ``merged.features(images)`` gives.
        record: of the same images, made with ``source=True``.

    Raises:
        ValueError: the record has no source map, or is of another batch.
    """
    if record.source is None:
        raise ValueError("the record has no source map: run merged(images, source=True)")
    if not torch.equal(record.tokens[:, -1], packed.lengths):
        raise ValueError("packed tokens and record are not of the same batch")
    return unmerge_tokens(packed, record.source)


class MergedViT(MergedTransformer):
    """A timm VisionTransformer that merges tokens as a policy says. Made by `patch`.

    Attributes:
        model: the wrapped model, unchanged.
        policy, precision, split_layer: as of `patch`.
    """

    def __init__(self, model: VisionTransformer, policy: Policy | None, precision: str, split_layer: int) -> None:
        super().__init__(model, policy, len(model.blocks), model.num_prefix_tokens)
        self.precision = precision
        self.split_layer = split_layer
        self._costs: dict[tuple[int, ...], ViTCost] = {}

    def cost(self, image_shape: tuple[int, ...]) -> ViTCost:
        """What the wrapped model costs for (C, H, W) images."""
        if image_shape not in self._costs:
            self._costs[image_shape] = ViTCost.of(self.model, image_shape)
        return self._costs[image_shape]

    def forward(
        self, images: Tensor, source: bool = False, through: TokenChannel | None = None
    ) -> tuple[Tensor, Record]:
        """Class scores (B, classes) and what they took.

        Args:
            images: (B, C, H, W).
            source: also keep the source map (needed by `unmerge`).
            through: what happens to the tokens at the split on their way to the server, such as quantisation, noise or
                loss of tokens; None for nothing. The record counts what was sent, and after that what was received.
        """
        packed, record = self.forward_features(images, source, through)
        return self.forward_head(packed), record

    def features(self, images: Tensor) -> Packed:
        """The packed tokens before the head (final norm included): (B, C, H, W) -> Packed."""
        return self.forward_features(images)[0]

    def edge(self, images: Tensor, source: bool = False) -> Packed:
        """What the device runs and sends: the tokens after ``split_layer`` blocks, (B, C, H, W) -> Packed."""
        return self._edge(images, source)[0]

    def serve(self, tokens: Packed) -> Tensor:
        """What the server runs: class scores (B, classes) from the tokens that `edge` sent."""
        return self.forward_head(self._server(tokens)[0])

    def forward_features(
        self, images: Tensor, source: bool = False, through: TokenChannel | None = None
    ) -> tuple[Packed, Record]:
        """Packed tokens before the head, and the Record."""
        sent, before = self._edge(images, source)
        received = sent if through is None else through(sent)
        tokens, after = self._server(received)
        cost, policy, split = self.cost(tuple(images.shape[1:])), self.policy, self.split_layer
        counts = torch.stack(before + after, dim=1)
        blocks = cost.blocks(counts, policy)
        if received is not sent:
            # What got lost was computed all the same.
            counts_sent = torch.stack([*before, sent.lengths, *after[1:]], dim=1)
            blocks = torch.cat([cost.blocks(counts_sent, policy)[:, :split], blocks[:, split:]], dim=1)
        edge_macs = cost.embed + blocks[:, :split].sum(1)
        record = Record(
            tokens=counts,
            macs=edge_macs + blocks[:, split:].sum(1) + cost.pooling(counts),
            payload_bytes=wire.payload_bytes(sent.lengths, self.model.embed_dim, self.precision, self.sent_sizes(sent)),
            edge_macs=edge_macs,
            source=tokens.source,
        )
        return tokens, record

    def sent_sizes(self, sent: Packed) -> Tensor | None:
        """(T,) sizes that travel with the tokens; None where the server does not need them."""
        return sent.full_sizes if self.server_needs_sizes else None

    @property
    def server_needs_sizes(self) -> bool:
        """After the last block a class-token head reads no sizes; everything else weighs tokens by them."""
        reads_none = self.split_layer == self.depth and self.model.global_pool == "token"
        return self.policy is not None and not reads_none

    def _edge(self, images: Tensor, source: bool) -> tuple[Packed, list[Tensor]]:
        """The tokens at the split, and the (B,) counts that entered each block before it."""
        self._check_images(images)
        model = self.model
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
        return self.run_layers(pack(x, source), range(self.split_layer))

    def _server(self, tokens: Packed) -> tuple[Packed, list[Tensor]]:
        """The tokens before the head; the (B,) counts that entered each block after the split, and left the last."""
        tokens, lengths = self.run_layers(tokens, range(self.split_layer, self.depth))
        return tokens.with_x(self.model.norm(tokens.x)), [*lengths, tokens.lengths]

    def forward_head(self, packed: Packed) -> Tensor:
        """Pool and classify packed tokens: logits (B, classes). Pools weigh tokens by their size."""
        model, layout, first = self.model, packed.layout, self.model.num_prefix_tokens
        if model.global_pool == "token":
            rows = layout.offsets[:, None] + torch.arange(first, device=packed.x.device)
            return model.forward_head(packed.x[rows])
        padded, valid = layout.pad(packed.x), layout.valid
        weights = layout.pad(packed.full_sizes.to(packed.x.dtype)) * valid
        if not model.pool_include_prefix:
            padded, weights = padded[:, first:], weights[:, first:]
        if model.global_pool == "map":
            x = model.attn_pool(padded, attn_mask=weights.log()[:, None, None, :])
        else:
            mean = (padded * weights[..., None]).sum(1) / weights.sum(1, keepdim=True)
            peak = padded.masked_fill((weights == 0)[..., None], float("-inf")).amax(1)
            x = {"avg": mean, "max": peak, "avgmax": 0.5 * (peak + mean)}[model.global_pool]
        return model.head(model.head_drop(model.fc_norm(x)))

    def _check_images(self, images: Tensor) -> None:
        self.check_inference()
        if images.ndim != 4:
            raise ValueError(f"images must be (B, C, H, W), got shape {tuple(images.shape)}")
        model = self.model
        if images.shape[1] != model.in_chans:
            raise ValueError(f"images have {images.shape[1]} channels, the model takes {model.in_chans}")
        wanted = tuple(model.patch_embed.img_size)
        if not model.dynamic_img_size and tuple(images.shape[2:]) != wanted:
            raise ValueError(f"images are {tuple(images.shape[2:])} pixels, the model takes {wanted}: resize them")

    def attention(self, layer: int, tokens: Packed) -> tuple[Tensor, Tensor]:
        """timm's Attention on packed rows."""
        block = self.model.blocks[layer]
        attn, x = block.attn, block.norm1(tokens.x)
        qkv = attn.qkv(x).view(len(x), 3, attn.num_heads, attn.head_dim)
        if not (isinstance(attn.q_norm, nn.Identity) and isinstance(attn.k_norm, nn.Identity)):
            q, k, v = qkv.unbind(1)
            qkv = torch.stack([attn.q_norm(q), attn.k_norm(k), v], dim=1)
        out = attn.norm(attend(qkv, tokens.layout, tokens.sizes))
        if attn.gate is not None:
            out = out * attn.gate(x).sigmoid()
        return block.drop_path1(block.ls1(attn.proj_drop(attn.proj(out)))), qkv

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        block = self.model.blocks[layer]
        return block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def patch(
    model: nn.Module, policy: Policy | None, *, precision: str = "float16", split_layer: int | None = None
) -> MergedViT:
    """Attach a merge policy to a timm VisionTransformer, or replace the one a patched model has.

    Args:
        model: timm VisionTransformer with standard pre-norm blocks (class token or none, registers,
            distilled, layer scale, qk-norm; pooling token, avg, max, avgmax or map), or a patched one.
        policy: what merges; None for nothing.
        precision: of the token values in the payload, one of `tokmerge.wire.PRECISIONS`.
        split_layer: how many blocks run before the tokens are sent; all of them by default.

    Returns:
        A module that maps images to (logits, Record). The model's class and state_dict are unchanged.

    Raises:
        TypeError: the model or the policy is of an unsupported kind.
        ValueError: the policy does not fit the model, or an unknown precision or split.
    """
    if isinstance(model, MergedViT):
        model = model.model
    if not isinstance(model, VisionTransformer):
        raise TypeError(
            f"cannot merge tokens in a {type(model).__name__}: a timm VisionTransformer is needed "
            "(timm.create_model('deit_small_patch16_224') makes one)"
        )
    for layer, block in enumerate(model.blocks):
        if type(block) is not Block or type(block.attn) is not Attention:
            kind = f"{type(block).__name__} with {type(getattr(block, 'attn', None)).__name__}"
            raise TypeError(f"block {layer} of the model is a {kind}: only timm's Block with Attention is supported")
    if model.global_pool not in POOLS:
        raise TypeError(f"global_pool={model.global_pool!r} is not supported: use one of {', '.join(POOLS)}")
    depth = len(model.blocks)
    check_policy("policy", policy, depth)
    if precision not in wire.PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}: use one of {', '.join(wire.PRECISIONS)}")
    split_layer = depth if split_layer is None else split_layer
    if not 0 <= split_layer <= depth:
        raise ValueError(f"split_layer is {split_layer}, but the model has {depth} blocks")
    return MergedViT(model, policy, precision, split_layer).train(model.training)


def unpatch(merged: MergedViT) -> VisionTransformer:
    """The model as it was before `patch`."""
    return merged.model
