"""Tokens from the device to the server, many images at once: what arrives, and what the server answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokmerge import link, wire
from tokmerge.channel import Channel
from tokmerge.fragments import AIR_CHUNK_TOKENS, Fragments, average, conceal, fit, travel_order
from tokmerge.link import ErrorRates
from tokmerge.packed import Layout, Packed
from tokmerge.vit import MergedViT, patch


@dataclass
class Sent:
    """What a device sends for a set of images at one policy and precision, and what the server answers.

    Attributes:
        merged: the model, cut at its split.
        tokens: packed, of all images, as they arrive if nothing is lost.
        sizes: (T,) in the order of travel, if they are sent.
        order: (T,) the order of travel.
        prototype: see `conceal`.
        edge_macs, macs: (B,) on the device and in all.
        answers: (B,) classes the server gives if nothing is lost.
        chunk_tokens: tokens per chunk.
    """

    merged: MergedViT
    tokens: Packed
    sizes: Tensor | None
    order: Tensor
    prototype: Tensor
    edge_macs: Tensor
    macs: Tensor
    answers: Tensor
    chunk_tokens: int
    nothing: int = field(init=False)
    _told: dict[tuple[str, bytes], Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        lost = Packed(self.prototype, Layout(torch.tensor([len(self.prototype)])))
        with torch.inference_mode():
            self.nothing = int(self.merged.serve(lost).argmax())

    @property
    def patches(self) -> int:
        """Patches of an image."""
        grid: Any = self.merged.model.patch_embed
        return grid.num_patches

    def fragments(self, info_bits: Tensor | int) -> Fragments:
        """How the payloads lie in code blocks."""
        dim, precision = self.tokens.x.shape[1], self.merged.precision
        return Fragments.of(self.tokens.layout, dim, precision, self.sizes, info_bits, self.chunk_tokens)

    def payload(self, index: int) -> bytes:
        """The bytes of one image's payload."""
        rows = self.order[self.tokens.layout.image == index]  # the order of travel stays within an image
        sizes = None if self.sizes is None else self.sizes[self.tokens.layout.image == index]
        return wire.encode(self.tokens.x[rows], sizes, self.merged.precision, self.chunk_tokens)

    @torch.inference_mode()
    def predict(self, received: Tensor, how: str = "drop", batch_size: int = 128) -> Tensor:
        """(B,) classes the server gives when (T,) tokens arrive; ``received`` is in the order of travel."""
        key = (how, np.packbits(received.numpy()).tobytes())
        if key in self._told:
            return self._told[key]
        layout, arrived = self.tokens.layout, torch.empty_like(received)
        arrived[self.order] = received
        count = torch.zeros_like(layout.lengths).index_add_(0, layout.image, arrived.long())
        answers = self.answers.clone()
        answers[count == 0] = self.nothing
        touched = ((count > 0) & (count < layout.lengths)).nonzero()[:, 0]
        for part in touched.split(batch_size) if len(touched) else ():
            tokens, rows = take(self.tokens, part)
            served = conceal(tokens, arrived[rows], self.prototype, self.patches, how)
            answers[part] = self.merged.serve(served).argmax(1)
        self._told = {**self._told, key: answers} if len(self._told) < 64 else {key: answers}
        return answers

    def deliver(
        self, air: "Air", snr_db: float | np.ndarray, uses: int | Tensor, cap: int, generator: torch.Generator
    ) -> Tensor:
        """(B,) classes the server gives when every payload has a slot of the channel for itself.

        Args:
            air: the channel and how well its code blocks get through.
            snr_db: average SNR.
            uses: channel uses of a slot.
            cap: fastest scheme that may be used, see `tokmerge.fragments.fit`.
            generator: of gains and errors.
        """
        return self.predict(self.arrivals(air, snr_db, uses, cap, generator))

    def taken(self, air: "Air", uses: int | Tensor, cap: int) -> Tensor:
        """(B,) channel uses that each payload really takes."""
        return taken(self.fragments(1).n_bytes, air, uses, cap)

    def arrivals(
        self, air: "Air", snr_db: float | np.ndarray, uses: int | Tensor, cap: int, generator: torch.Generator
    ) -> Tensor:
        """(T,) bool: which tokens arrive, in the order of travel. Arguments as of `deliver`."""
        return arrive(self.fragments, air, snr_db, uses, cap, generator)


@dataclass(frozen=True)
class Air:
    """A channel for payloads.

    Attributes:
        channel: what happens to a code block.
        rates: how often a block is lost, measured with what the channel's receiver knows.
        fading: whether a gain holds for a "payload" or for one "block".
    """

    channel: Channel
    rates: ErrorRates
    fading: str = "payload"


def arrive(
    fragments: Callable[[Tensor | int], Fragments], air: Air, snr_db: float | np.ndarray, uses: int | Tensor, cap: int,
    generator: torch.Generator,
) -> Tensor:  # fmt: skip
    """(T,) bool: which tokens arrive, in the order of travel.

    Args:
        fragments: how payloads lie in blocks of so many information bits.
        air, snr_db, uses, cap, generator: as of `Sent.deliver`.
    """
    info_bits, errors = lost(fragments(1).n_bytes, air, snr_db, uses, cap, generator)
    return fragments(info_bits).received(errors)


def lost(
    n_bytes: Tensor, air: Air, snr_db: float | np.ndarray, uses: int | Tensor, cap: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Which code blocks are lost.

    Args:
        n_bytes: (B,) of each payload.
        air, snr_db, uses, cap, generator: as of `Sent.deliver`.

    Returns:
        (B,) information bits of a block; (B, longest) bool, False beyond a payload's own blocks.
    """
    scheme, limit = fit(n_bytes, uses, air.rates.schemes, cap, air.channel.pilots or 0)
    info_bits = torch.tensor([one.info_bits for one in air.rates.schemes])[scheme]
    blocks = -(-8 * n_bytes // info_bits)
    longest = int(blocks.max())
    gains = link.gains_db(air.channel, len(n_bytes), longest if air.fading == "block" else 1, generator)
    errors = air.rates.draw(scheme, blocks, limit, gains, snr_db, generator)
    return info_bits, errors & (torch.arange(longest) < blocks[:, None])


def taken(n_bytes: Tensor, air: Air, uses: int | Tensor, cap: int) -> Tensor:
    """(B,) channel uses that (B,) payloads really take of their slots."""
    pilots = air.channel.pilots or 0
    scheme, limit = fit(n_bytes, uses, air.rates.schemes, cap, pilots)
    info_bits = torch.tensor([one.info_bits for one in air.rates.schemes])[scheme]
    per_block = torch.tensor([one.uses + pilots for one in air.rates.schemes])[scheme]
    return torch.minimum(-(-8 * n_bytes // info_bits), limit) * per_block


def take(tokens: Packed, images: Tensor) -> tuple[Packed, Tensor]:
    """The tokens of some images, in ascending order, and their rows."""
    rows = torch.isin(tokens.layout.image, images).nonzero()[:, 0]
    sizes = None if tokens.sizes is None else tokens.sizes[rows]
    return Packed(tokens.x[rows], Layout(tokens.lengths[images]), sizes), rows


@torch.inference_mode()
def send(
    merged: MergedViT, images: Tensor, precisions: Sequence[str], prototype: Tensor | None = None,
    chunk_tokens: int = AIR_CHUNK_TOKENS, batch_size: int = 64,
) -> dict[str, Sent]:  # fmt: skip
    """Run the device on images (B, C, H, W) once, and the server on what arrives at each precision.

    Args:
        merged: the model with policy and split.
        images: pre-processed.
        precisions: of the payloads, some of `wire.PRECISIONS`.
        prototype: averages of the protected tokens over other images, see `average`; of these images by default.
        chunk_tokens: tokens per chunk.
        batch_size: images per forward pass.
    """
    parts: list[Packed] = []
    columns = []
    for some in images.split(batch_size):

        def keep(tokens: Packed) -> Packed:
            parts.append(tokens)
            return tokens

        _, record = merged(some, through=keep)
        columns.append((record.edge_macs, record.macs))
    edge_macs, macs = (torch.cat(column) for column in zip(*columns, strict=True))
    whole = [part.sizes for part in parts if part.sizes is not None]
    sizes = torch.cat(whole) if whole else None
    lengths, x = torch.cat([part.lengths for part in parts]), torch.cat([part.x for part in parts])
    tokens, protected = Packed(x, Layout(lengths), sizes), merged.model.num_prefix_tokens
    order = travel_order(tokens.layout, protected)
    travelling = merged.sent_sizes(tokens)
    travelling = None if travelling is None else travelling[order]
    prototype = average(tokens, protected) if prototype is None else prototype
    arrived = {}
    for precision in precisions:
        at = patch(merged, merged.policy, precision=precision, split_layer=merged.split_layer)
        received, answers = tokens.with_x(wire.quantise(tokens.x, precision)), []
        for part in torch.arange(len(images)).split(batch_size):
            answers.append(at.serve(take(received, part)[0]).argmax(1))
        arrived[precision] = Sent(
            at, received, travelling, order, prototype, edge_macs, macs, torch.cat(answers), chunk_tokens
        )
    return arrived
