"""Payloads over a link, many at once: what arrives, and what the server answers."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from tokmerge import wire
from tokmerge.channel.bler import ErrorRates
from tokmerge.channel.phy import Channel
from tokmerge.channel.segmentation import LINK_CHUNK, Segmentation, encode_payloads, protected_means, travel_order
from tokmerge.channel.server import Responder
from tokmerge.evaluation.outcomes import decide
from tokmerge.merging.packed import Packed, join
from tokmerge.models.classifier import MergedClassifier
from tokmerge.models.patching import patch

# One for all payloads, or one for each: (B, 1) decibels, (B,) channel uses.
Decibels = float | np.ndarray
Uses = int | Tensor
REMEMBERED = 64


@dataclass(frozen=True)
class Link:
    """A channel for payloads, each of which has a slot of channel uses to itself.

    Attributes:
        channel: what happens to a code block.
        rates: how often a block is lost, measured with what the channel's receiver knows.
        fading: whether a gain holds for a "payload" or for one "block".
    """

    channel: Channel
    rates: ErrorRates
    fading: str = "payload"

    def select_schemes(self, n_bytes: Tensor, uses: Uses, cap: int) -> tuple[Tensor, Tensor, Tensor]:
        """(B,) most robust scheme that carries a payload, else ``cap``; blocks that it needs, and that a slot holds."""
        schemes = self.rates.schemes[: cap + 1]
        blocks = torch.stack([scheme.blocks(n_bytes) for scheme in schemes])
        per_block = torch.tensor([self.channel.uses(scheme) for scheme in schemes])
        fits = blocks * per_block[:, None] <= uses
        fits[cap] = True  # a payload too long for the fastest is cut off
        chosen = fits.int().argmax(0)
        return chosen, blocks.gather(0, chosen[None])[0], uses // per_block[chosen]

    def lose_blocks(
        self, n_bytes: Tensor, snr_db: Decibels, uses: Uses, cap: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """(B,) information bits of a block; (B, longest) bool, which blocks are lost. Arguments: see `Sent.deliver`."""
        scheme, blocks, limit = self.select_schemes(n_bytes, uses, cap)
        gains = self.channel.gains_db(len(blocks), int(blocks.max()) if self.fading == "block" else 1, generator)
        lost = self.rates.draw(scheme, blocks, limit, gains, snr_db, generator)
        return torch.tensor([one.info_bits for one in self.rates.schemes])[scheme], lost

    def used(self, n_bytes: Tensor, uses: Uses, cap: int) -> Tensor:
        """(B,) channel uses that (B,) payloads really take of their slots."""
        scheme, blocks, limit = self.select_schemes(n_bytes, uses, cap)
        per_block = torch.tensor([self.channel.uses(one) for one in self.rates.schemes])
        return torch.minimum(blocks, limit) * per_block[scheme]


@dataclass(frozen=True)
class Sent(ABC):
    """What a device sends for B images or questions.

    Attributes:
        edge_macs, macs: (B,) on the device and in all.
    """

    edge_macs: Tensor
    macs: Tensor

    @abstractmethod
    def deliver(self, link: Link, snr_db: Decibels, uses: Uses, cap: int, generator: torch.Generator) -> Tensor:
        """(B, ...) answers when each image or question has a slot of the link for itself.

        Args:
            link: the channel, and how well its code blocks get through.
            snr_db, uses: average SNR, and channel uses of a slot.
            cap: fastest scheme that may be used: a payload that is too long even for it is cut off.
            generator: of gains and errors.
        """


@dataclass(frozen=True)
class SentPayloads(Sent):
    """What is sent as payloads: each kind has a `segmentation`, and an answer to what arrives."""

    @abstractmethod
    def segmentation(self, info_bits: Tensor | int) -> Segmentation:
        """How the payloads lie in code blocks of so many information bits."""

    @abstractmethod
    def _answer(self, received: Tensor, how: str) -> Tensor:
        """(B,) answers when (T,) tokens arrive."""

    @cached_property
    def n_bytes(self) -> Tensor:
        """(B,) of each payload."""
        return self.segmentation(1).n_bytes

    @cached_property
    def _answered(self) -> dict[bytes, Tensor]:
        return {}

    @torch.inference_mode()
    def answer(self, received: Tensor, how: str = "drop") -> Tensor:
        """(B,) answers when (T,) tokens arrive; ``how`` others are concealed, see `segmentation.conceal`."""
        # Many draws lose the same tokens: all of them, or none.
        key = how.encode() + np.packbits(received.numpy()).tobytes()
        if key not in self._answered:
            if len(self._answered) >= REMEMBERED:
                self._answered.clear()
            self._answered[key] = self._answer(received, how)
        return self._answered[key]

    def deliver(self, link: Link, snr_db: Decibels, uses: Uses, cap: int, generator: torch.Generator) -> Tensor:
        info_bits, lost = link.lose_blocks(self.n_bytes, snr_db, uses, cap, generator)
        return self.answer(self.segmentation(info_bits).received(lost))


@dataclass(frozen=True)
class SentTokens(SentPayloads):
    """Images of which the tokens at the split are sent, at one policy and precision.

    Attributes:
        server: the model, cut at its split, and what it puts in the place of lost tokens.
        tokens, chunk_tokens: of all images, as they arrive if nothing is lost; tokens per chunk.
    """

    server: Responder
    tokens: Packed
    chunk_tokens: int

    @cached_property
    def order(self) -> Tensor:
        """(T,) the order of travel."""
        return travel_order(self.tokens.layout, len(self.server.prototype))

    @cached_property
    def sizes(self) -> Tensor | None:
        """(T,) sizes in the order of travel, if they are sent."""
        sizes = self.server.merged.sent_sizes(self.tokens)
        return None if sizes is None else sizes[self.order]

    @cached_property
    @torch.inference_mode()
    def answers(self) -> Tensor:
        """(B, ...) what the server answers if nothing is lost, see `tokmerge.evaluation.outcomes.decide`."""
        parts = torch.arange(len(self.macs)).split(64)
        return torch.cat([decide(self.server.serve(self.tokens.images(part))) for part in parts])

    @cached_property
    @torch.inference_mode()
    def blind_answer(self) -> Tensor:
        """(...) what it answers if nothing arrives."""
        any_image = self.tokens.images(torch.tensor([0]))
        return decide(self.server.classify(any_image, torch.zeros(len(any_image.x), dtype=torch.bool)))[0]

    def segmentation(self, info_bits: Tensor | int) -> Segmentation:
        layout, dim, precision = self.tokens.layout, self.tokens.x.shape[1], self.server.merged.precision
        source = self.server.merged.sent_source(self.tokens)
        return Segmentation.of_tokens(layout, dim, precision, self.sizes, info_bits, self.chunk_tokens, source)

    def payload(self, index: int) -> bytes:
        """The bytes of one image's payload."""
        return encode_payloads(self.server.merged, self.tokens.images(torch.tensor([index])), self.chunk_tokens)[0]

    def _answer(self, received: Tensor, how: str) -> Tensor:
        layout, arrived = self.tokens.layout, received[self.order.argsort()]
        count = torch.zeros_like(layout.lengths).index_add_(0, layout.image, arrived.long())
        answers = self.answers.clone()
        answers[count == 0] = self.blind_answer
        touched = ((count > 0) & (count < layout.lengths)).nonzero()[:, 0]
        for part in touched.split(128) if len(touched) else ():
            answers[part] = decide(self.server.classify(self.tokens.images(part), arrived[layout.rows(part)], how))
        return answers


@torch.inference_mode()
def send_image_tokens(
    merged: MergedClassifier, images: Tensor, precisions: Sequence[str], prototype: Tensor | None = None,
    chunk_tokens: int = LINK_CHUNK,
) -> dict[str, SentTokens]:  # fmt: skip
    """Run the device on images once, for payloads of each precision.

    Args:
        merged, images: the model with policy and split; (B, C, H, W), pre-processed.
        precisions, chunk_tokens: of the payloads.
        prototype: averages of the protected tokens over other images, see `protected_means`; of these by default.
    """
    parts: list[Packed] = []

    def keep(tokens: Packed) -> Packed:
        # The channel is the CPU's.
        parts.append(tokens.to("cpu"))
        return tokens

    device = next(merged.parameters()).device
    records = [merged(some.to(device), through=keep)[1] for some in images.split(64)]
    edge_macs, macs = (torch.cat([getattr(record, name) for record in records]).cpu() for name in ("edge_macs", "macs"))
    tokens = join(parts)
    prototype = protected_means(tokens, merged.protected) if prototype is None else prototype
    sent = {}
    for precision in precisions:
        server = Responder(patch(merged, merged.policy, precision=precision, split_layer=merged.split_layer), prototype)
        arriving = tokens.with_x(wire.quantise(tokens.x, precision))
        sent[precision] = SentTokens(edge_macs, macs, server, arriving, chunk_tokens)
    return sent
