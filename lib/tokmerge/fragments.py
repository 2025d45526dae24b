"""Payloads in code blocks: which tokens a lost block takes with it, and what the server does without them.

The bytes of a payload fill code blocks one after the other. A block that is not decoded damages the chunks that it
holds a byte of, and the payload as a whole if that byte is of the header (`tokmerge.wire`). Nothing here encodes or
decodes: the lengths say it all, for many payloads at once. The shortcut counts a block with one wrong bit as lost
altogether, as a receiver does that checks its blocks; `wire.decode` gives at least those tokens.

Tokens travel in a scattered order that the server undoes, so that what is lost together did not lie together.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokmerge import wire
from tokmerge.channel import Mcs
from tokmerge.packed import Layout, Packed

# Tokens per chunk where blocks get lost: fewer than `wire.CHUNK_TOKENS`, so that a lost block takes few with it.
AIR_CHUNK_TOKENS = 4
CONCEALMENTS = ("drop", "mean", "zero")


def travel_order(layout: Layout, protected: int) -> Tensor:
    """(T,) rows of a batch in the order in which they are sent: protected tokens first, the others scattered.

    Position i of an image goes where the fractional part of i times the golden ratio sorts it: neighbours end up far
    apart, at every scale.

    >>> travel_order(Layout(torch.tensor([5, 2])), 1).tolist()
    [0, 2, 4, 1, 3, 5, 6]
    """
    position = torch.arange(len(layout.image)) - layout.offsets[layout.image]
    key = (position * 0.6180339887498949) % 1.0
    key = torch.where(position < protected, (position - protected) / (protected + 1), key)
    # Twice the image: keys lie between -1 and 1.
    return (2.0 * layout.image.double() + key.double()).argsort(stable=True)


@dataclass(frozen=True)
class Fragments:
    """Which code blocks of its payload each part of it lies in.

    Attributes:
        n_bytes: (B,) of each payload.
        blocks: (B,) code blocks of each payload.
        header: (B,) last block with a byte of the header.
        image: (C,) image of each chunk.
        first, last: (C,) blocks of each chunk.
        chunk: (T,) chunk of each token, in the order of travel.
    """

    n_bytes: Tensor
    blocks: Tensor
    header: Tensor
    image: Tensor
    first: Tensor
    last: Tensor
    chunk: Tensor

    @classmethod
    def of(
        cls, layout: Layout, embed_dim: int, precision: str, sizes: Tensor | None, info_bits: Tensor | int,
        chunk_tokens: int = wire.CHUNK_TOKENS,
    ) -> "Fragments":  # fmt: skip
        """Lay payloads out.

        Args:
            layout: tokens of each image.
            embed_dim: values per token.
            precision: of the values, one of `wire.PRECISIONS`.
            sizes: (T,) in the order of travel; None if they are not sent.
            info_bits: information bits of a block, one number or one for every image.
            chunk_tokens: tokens per chunk.
        """
        header, image, chunk = wire.part_bytes(layout.lengths, embed_dim, precision, sizes, chunk_tokens)
        n_bytes = header.index_add(0, image, chunk)
        bits = torch.as_tensor(info_bits).expand(len(layout.lengths))
        before = chunk.cumsum(0) - chunk
        in_image = torch.zeros_like(header).index_add_(0, image, chunk)
        start = before - (in_image.cumsum(0) - in_image)[image] + header[image]
        counts = -(-layout.lengths // chunk_tokens)
        position = torch.arange(len(layout.image)) - layout.offsets[layout.image]
        return cls(
            n_bytes=n_bytes,
            blocks=-(-8 * n_bytes // bits),
            header=(8 * header - 1) // bits,
            image=image,
            first=8 * start // bits[image],
            last=(8 * (start + chunk) - 1) // bits[image],
            chunk=(counts.cumsum(0) - counts)[layout.image] + position // chunk_tokens,
        )

    def received(self, errors: Tensor) -> Tensor:
        """(T,) bool, in the order of travel: which tokens arrive when (B, longest) blocks are in error."""
        before = torch.nn.functional.pad(errors.long().cumsum(1), (1, 0))
        whole = before[self.image, self.last + 1] == before[self.image, self.first]
        headed = before.gather(1, self.header[:, None] + 1)[:, 0] == 0
        return (whole & headed[self.image])[self.chunk]


def fit(
    n_bytes: Tensor, uses: int | Tensor, schemes: Sequence[Mcs], cap: int, pilots: int = 0
) -> tuple[Tensor, Tensor]:
    """Spend a slot of channel uses on every payload: more robust where it is shorter.

    Args:
        n_bytes: (B,) of each payload.
        uses: channel uses of a slot, one number or (B,).
        schemes: from the most robust to the fastest.
        cap: fastest scheme to use; a payload too long for it is cut off.
        pilots: channel uses that come on top of every block.

    Returns:
        (B,) the most robust scheme that carries the whole payload within the slot, else ``cap``; (B,) how many blocks
        of it the slot holds.

    >>> from tokmerge.channel import LADDER
    >>> fit(torch.tensor([50, 200, 10_000]), 1000, LADDER, 6)
    (tensor([3, 6, 6]), tensor([2, 4, 4]))
    """
    chosen = torch.full_like(n_bytes, cap)
    for index in reversed(range(cap)):
        scheme = schemes[index]
        chosen[scheme.blocks(n_bytes) * (scheme.uses + pilots) <= uses] = index
    return chosen, uses // torch.tensor([scheme.uses + pilots for scheme in schemes])[chosen]


def conceal(tokens: Packed, received: Tensor, prototype: Tensor, patches: int, how: str = "drop") -> Packed:
    """The tokens the server goes on with.

    Args:
        tokens: of a batch, all of them; those not received are not looked at.
        received: (T,) bool.
        prototype: (P, D) average of the P protected tokens over other images: stands in for those that are lost.
        patches: patches of an image, which its other tokens' sizes add up to.
        how: "drop": lost tokens are left out; "mean": the average of those received, by size, stands for all patches
            that are lost; "zero": every lost token is a zero of size 1.

    Raises:
        ValueError: unknown ``how``.
    """
    if how not in CONCEALMENTS:
        raise ValueError(f"unknown concealment {how!r}: use one of {', '.join(CONCEALMENTS)}")
    image, layout, batch = tokens.layout.image, tokens.layout, len(tokens.lengths)
    protected = (torch.arange(len(image)) - layout.offsets[image]) < len(prototype)
    sizes = torch.ones(len(image)) if tokens.sizes is None else tokens.sizes
    x = torch.where((received | ~protected)[:, None], tokens.x, prototype.repeat(batch, 1)[_ranks(protected)])
    sizes = torch.where(received | ~protected, sizes, 1.0)
    if how == "zero":
        arrived = received | protected
        return replace(tokens, x=x * arrived[:, None], sizes=torch.where(arrived, sizes, 1.0), source=None)
    keep = received | protected
    image, x, sizes = image[keep], x[keep], sizes[keep]
    patch = ~protected[keep]
    weight = torch.zeros(batch).index_add_(0, image[patch], sizes[patch])
    if how == "mean" and bool((lacking := (weight > 0) & (weight < patches)).any()):
        total = torch.zeros(batch, x.shape[1]).index_add_(0, image[patch], x[patch] * sizes[patch, None])
        image = torch.cat([image, lacking.nonzero()[:, 0]])
        order = image.argsort(stable=True)
        x = torch.cat([x, (total / weight.clamp(min=1)[:, None])[lacking]])[order]
        sizes, image = torch.cat([sizes, (patches - weight)[lacking]])[order], image[order]
    layout = Layout(torch.bincount(image, minlength=batch))
    # Sizes of one weigh nothing; without them attention is faster.
    return Packed(x, layout, None if tokens.sizes is None and how == "drop" else sizes)


def _ranks(mask: Tensor) -> Tensor:
    """(T,) how many True come before each place: an index into what belongs to the True ones."""
    return (mask.long().cumsum(0) - mask.long()).clamp(max=max(int(mask.sum()) - 1, 0))


def average(tokens: Packed, protected: int) -> Tensor:
    """(P, D) averages of the protected tokens over the images of a batch."""
    return tokens.x[tokens.layout.offsets[:, None] + torch.arange(protected)].mean(0)
