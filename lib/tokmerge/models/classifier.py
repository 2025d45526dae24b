"""A classifier whose tokens merge, cut in two: what device and server run, whatever transformer it is."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from tokmerge import wire
from tokmerge.merging.matching import Policy, widen
from tokmerge.merging.merge import unmerge_tokens
from tokmerge.merging.packed import Packed, pack
from tokmerge.models.cost import ViTCost
from tokmerge.models.merged import MergedTransformer

# What happens to the tokens between device and server.
TokenChannel = Callable[[Packed], Packed]


@dataclass(frozen=True)
class Record:
    """What one forward pass did; what it cost is counted when it is asked for."""

    tokens: Tensor  #: (B, L + 1) int64, tokens entering each block, and after the last
    source: Tensor | None  #: (B, N) int64 source map, or None if it was not asked for
    counts_sent: Tensor  #: (B, L + 1) int64, the same as if nothing had been lost between device and server
    model_cost: ViTCost
    policy: Policy | None
    split_layer: int
    #: arguments of `tokmerge.wire.payload_bytes`: (B,) tokens sent, their width, the precision, their sizes and the
    #: source map if these are sent
    payload: tuple[Tensor, int, str, Tensor | None, Tensor | None]

    @cached_property
    def payload_bytes(self) -> Tensor:
        """(B,) int64, length of what `tokmerge.wire.encode` produces for each image, with its own length of chunks.

        Where tokens may get lost chunks are shorter, and a payload one to two hundredths longer
        (`tokmerge.channel.segmentation.LINK_CHUNK`).
        """
        lengths, width, precision, sizes, source = self.payload
        return wire.payload_bytes(lengths, width, precision, sizes, source=source)

    @cached_property
    def edge_macs(self) -> Tensor:
        """(B,) int64, those of ``macs`` that are spent before the tokens are sent."""
        blocks = self.model_cost.blocks(self.counts_sent, self.policy)
        return self.model_cost.embed + blocks[:, : self.split_layer].sum(1)

    @cached_property
    def macs(self) -> Tensor:
        """(B,) int64, multiply-accumulates, merging overhead included."""
        blocks = self.model_cost.blocks(self.tokens, self.policy)
        return self.edge_macs + blocks[:, self.split_layer :].sum(1) + self.model_cost.pooling(self.tokens)


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


class MergedClassifier(MergedTransformer):
    """A vision transformer that merges tokens as a policy says. Made by `tokmerge.patch`.

    Attributes:
        model: the wrapped model, unchanged.
        policy, precision, split_layer: as of `tokmerge.patch`.
        embed_dim, n_patches: width of the tokens; patches of an image of the model's own size.
    """

    embed_dim: int
    n_patches: int
    sends_source = False  #: the head needs to know which patches a token stands for

    def __init__(
        self, model: nn.Module, policy: Policy | None, precision: str, split_layer: int | None, depth: int,
        protected: int,
    ) -> None:  # fmt: skip
        super().__init__(model, policy, depth, protected)
        if precision not in wire.PRECISIONS:
            raise ValueError(f"unknown precision {precision!r}: use one of {', '.join(wire.PRECISIONS)}")
        self.precision, self.split_layer = precision, depth if split_layer is None else split_layer
        if not 0 <= self.split_layer <= depth:
            raise ValueError(f"split_layer is {split_layer}, but the model has {depth} blocks")
        if self.wants_places and self.split_layer < depth:
            raise ValueError(f"split_layer is {split_layer}: rotary positions do not travel, cut after the last block")
        self._costs: dict[tuple[Any, ...], ViTCost] = {}

    @abstractmethod
    def embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """(B, C, H, W) images to (B, N, D) tokens, the protected ones first, and rows and columns of the patches."""

    @abstractmethod
    def last_norm(self, x: Tensor) -> Tensor:
        """What comes between the last block and the head: (T, D) -> (T, D)."""

    @abstractmethod
    def forward_head(self, packed: Packed) -> Tensor:
        """Pool and classify packed tokens: (B, classes) scores. Averages weigh tokens by their sizes."""

    @abstractmethod
    def measure_cost(self, image_shape: tuple[int, ...]) -> ViTCost:
        """What the wrapped model costs for (C, H, W) images."""

    @property
    @abstractmethod
    def head(self) -> tuple[Any, ...]:
        """What the head consists of: another head is another cost."""

    @property
    @abstractmethod
    def reads_one_token(self) -> bool:
        """The head reads protected tokens alone."""

    @abstractmethod
    def check_images(self, images: Tensor) -> None:
        """Raise ValueError if they are not what the model takes."""

    def cost(self, image_shape: tuple[int, ...]) -> ViTCost:
        """What the wrapped model costs for (C, H, W) images."""
        key = (image_shape, *self.head)
        if key not in self._costs:
            self._costs[key] = self.measure_cost(image_shape)
        return self._costs[key]

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
        self.check_ready()
        return self.forward_head(self._server(tokens)[0])

    def forward_features(
        self, images: Tensor, source: bool = False, through: TokenChannel | None = None
    ) -> tuple[Packed, Record]:
        """Packed tokens before the head, and the Record."""
        sent, before = self._edge(images, source)
        received = sent if through is None else through(sent)
        tokens, after = self._server(received)
        counts = counts_sent = torch.stack(before + after, dim=1)
        if received is not sent:
            # What got lost was computed all the same.
            counts_sent = torch.stack([*before, sent.lengths, *after[1:]], dim=1)
        payload = sent.lengths, self.embed_dim, self.precision, self.sent_sizes(sent), self.sent_source(sent)
        cost = self.cost(tuple(images.shape[1:]))
        return tokens, Record(counts, tokens.source, counts_sent, cost, self.policy, self.split_layer, payload)

    def sent_sizes(self, sent: Packed) -> Tensor | None:
        """(T,) sizes that travel with the tokens; None where the server does not need them."""
        return sent.full_sizes if self.server_needs_sizes else None

    def sent_source(self, sent: Packed) -> Tensor | None:
        """(B, N) source map that travels with the tokens; None where the server does not need it."""
        return sent.source if self.sends_source and self.policy is not None else None

    @property
    def server_needs_sizes(self) -> bool:
        """After the last block a class-token head reads no sizes; a source map says them; all else weighs tokens."""
        if self.policy is None or self.sends_source:
            return False
        return self.split_layer < self.depth or not self.reads_one_token

    def read_out(self, tokens: Packed) -> Callable[[], Tensor] | None:
        return partial(self.confidence, tokens) if self.classifies else None

    def confidence(self, tokens: Packed) -> Tensor:
        """(B,) of what the last norm and the head make of the tokens as they are (the logit lens)."""
        tokens = pack(self.leading(tokens, self.protected)) if self.reads_one_token else tokens
        first, second = widen(self.forward_head(tokens.with_x(self.last_norm(tokens.x)))).softmax(1).topk(2).values.T
        return first - second

    def _edge(self, images: Tensor, source: bool) -> tuple[Packed, list[Tensor]]:
        """The tokens at the split, and the (B,) counts that entered each block before it."""
        self.check_ready()
        if images.ndim != 4:
            raise ValueError(f"images must be (B, C, H, W), got shape {tuple(images.shape)}")
        self.check_images(images)
        x, grid = self.embed(images)
        source = source or self.sends_source
        return self.run_layers(self.pack_embedded(x, grid, self.protected, source), range(self.split_layer))

    def _server(self, tokens: Packed) -> tuple[Packed, list[Tensor]]:
        """The tokens before the head; the (B,) counts that entered each block after the split, and left the last."""
        tokens, lengths = self.run_layers(tokens, range(self.split_layer, self.depth))
        return tokens.with_x(self.last_norm(tokens.x)), [*lengths, tokens.lengths]

    def leading(self, packed: Packed, n: int) -> Tensor:
        """(B, n, D) the first n tokens of every image."""
        if packed.layout.uniform:
            return packed.layout.pad(packed.x)[:, :n]
        return packed.x[packed.layout.offsets[:, None] + torch.arange(n, device=packed.x.device)]

    def average(self, packed: Packed, skip: int) -> Tensor:
        """(B, D) mean of all but the first tokens, weighted by their sizes; summed in float32 at least."""
        padded = packed.layout.pad(packed.x)[:, skip:]
        weights = packed.layout.pad(packed.full_sizes)[:, skip:]
        mean = (widen(padded) * weights[..., None]).sum(1) / weights.sum(1, keepdim=True)
        return mean.to(packed.x.dtype)
