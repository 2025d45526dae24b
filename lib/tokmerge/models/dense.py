"""Models whose head reads the whole grid of tokens: saliency, segmentation, depth; and merging in them.

Merged tokens are copied back to the places they stand for (`tokmerge.unmerge`) before the decoder reads them, so the
server needs to know these: the source map travels with the tokens, and its bytes count.
"""

from dataclasses import replace
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tokmerge.merging.merge import unmerge_tokens
from tokmerge.merging.packed import Packed
from tokmerge.models.cost import ViTCost, module_macs
from tokmerge.models.vit import MergedViT


class DenseViT(VisionTransformer):
    """timm's VisionTransformer with a decoder of the token grid as its head: (B, C, H, W) -> what the decoder gives.

    Args:
        decoder: (B, D, rows, columns) grids of tokens, after the last norm, to maps.
        **arguments: of timm's VisionTransformer.
    """

    def __init__(self, decoder: nn.Module, **arguments: Any) -> None:
        super().__init__(num_classes=0, global_pool="", **arguments)
        self.decoder = decoder

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The map of (B, N, D) tokens, the leading ones left out."""
        patches = x[:, self.num_prefix_tokens :]
        return patches if pre_logits else self.decoder(patches.transpose(1, 2).unflatten(2, self.patch_embed.grid_size))


class MergedDense(MergedViT):
    """A `DenseViT` that merges tokens as a policy says: images to what the decoder makes of the unmerged grid."""

    model: DenseViT
    sends_source = True

    @property
    def head(self) -> tuple[Any, ...]:
        return (self.model.decoder,)

    @property
    def reads_one_token(self) -> bool:
        return False

    def forward_head(self, packed: Packed) -> Tensor:
        if packed.source is None:
            raise ValueError(
                "a decoder needs to know which patches a token stands for: tokens came without a source map"
            )
        return self.model.forward_head(unmerge_tokens(packed, packed.source))

    def _server(self, tokens: Packed) -> tuple[Packed, list[Tensor]]:
        """As of the base, with the detail of every patch: what a merge on the server takes from it is not forgotten."""
        if tokens.source is None or self.policy is None or self.split_layer == self.depth:
            return super()._server(tokens)
        lost = (tokens.source < 0)[..., None]
        none = tokens.x.new_zeros(*tokens.source.shape, self.embed_dim)
        after, lengths = self.run_layers(replace(tokens, detail=none), range(self.split_layer, self.depth))
        assert after.source is not None
        whole = self.last_norm(unmerge_tokens(after, after.source)).masked_fill(lost, 0.0)
        normed = replace(after, x=self.last_norm(after.x), detail=None)
        left = whole - unmerge_tokens(normed, after.source)
        return replace(normed, detail=left), [*lengths, after.lengths]

    def measure_cost(self, image_shape: tuple[int, ...]) -> ViTCost:
        decoder = module_macs(self.model.decoder, 1, self.embed_dim, *self.model.patch_embed.grid_size)
        return replace(super().measure_cost(image_shape), head=decoder)
