"""Payloads in code blocks: which tokens a lost block takes with it, and what the server does without them.

The bytes of a payload fill code blocks one after the other. A block that is not decoded damages the chunks that it
holds a byte of, and the payload as a whole if that byte is of the header (`tokmerge.wire`). Nothing here decodes: the
lengths say it all, for many payloads at once. The shortcut counts a block with one wrong bit as lost altogether, as a
receiver does that checks its blocks; `wire.decode` gives at least those tokens.

Tokens travel in a scattered order that the server undoes, so that what is lost together did not lie together.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokmerge import wire
from tokmerge.merging.packed import Layout, Packed, join
from tokmerge.models.classifier import MergedClassifier

# Tokens per chunk where blocks get lost: fewer than `wire.CHUNK_TOKENS`, so that a lost block takes few with it.
LINK_CHUNK = 4
CONCEALMENTS = ("drop", "mean", "zero")


def travel_order(layout: Layout, protected: int) -> Tensor:
    """(T,) rows of a batch in the order in which they are sent: protected tokens first, the others scattered.

    Position i of an image goes where the fractional part of i times the golden ratio sorts it: neighbours end up far
    apart, at every scale.

    >>> travel_order(Layout(torch.tensor([5, 2])), 1).tolist()
    [0, 2, 4, 1, 3, 5, 6]
    """
    position = layout.position
    key = (position * 0.6180339887498949) % 1.0
    key = torch.where(position < protected, (position - protected) / (protected + 1), key)
    # Twice the image: keys lie between -1 and 1.
    return (2.0 * layout.image.double() + key.double()).argsort(stable=True)


def encode_payloads(merged: MergedClassifier, tokens: Packed, chunk_tokens: int = LINK_CHUNK) -> list[bytes]:
    """The payload of each image, as the device sends it: its tokens at the split, in the order of travel."""
    order = travel_order(tokens.layout, merged.protected)
    sizes, source = merged.sent_sizes(tokens), merged.sent_source(tokens)
    return wire.encode_images(tokens.x, tokens.layout.counts, sizes, merged.precision, chunk_tokens, order, source)


@dataclass(frozen=True)
class Segmentation:
    """Which code blocks of its payload each part of it lies in.

    Attributes:
        n_bytes, blocks: (B,) of each payload.
        header: (B,) last block with a byte of the header.
        image, first, last: (C,) of each chunk: its image, its first and its last block.
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
    def of_tokens(
        cls, layout: Layout, embed_dim: int, precision: str, sizes: Tensor | None, info_bits: Tensor | int,
        chunk_tokens: int, source: Tensor | None = None,
    ) -> "Segmentation":  # fmt: skip
        """Tokens in blocks of so many information bits, one number or (B,); sizes, if sent, in the order of travel."""
        header, image, chunk = wire.part_bytes(layout.lengths, embed_dim, precision, sizes, chunk_tokens, source)
        n_bytes = header.index_add(0, image, chunk)
        bits = torch.as_tensor(info_bits).expand(len(header))
        body = n_bytes - header
        start = chunk.cumsum(0) - chunk + (header - body.cumsum(0) + body)[image]
        counts = -(-layout.lengths // chunk_tokens)
        return cls(
            n_bytes=n_bytes,
            blocks=-(-8 * n_bytes // bits),
            header=(8 * header - 1) // bits,
            image=image,
            first=8 * start // bits[image],
            last=(8 * (start + chunk) - 1) // bits[image],
            chunk=(counts.cumsum(0) - counts)[layout.image] + layout.position // chunk_tokens,
        )

    @classmethod
    def of_files(cls, n_bytes: Tensor, info_bits: Tensor | int) -> "Segmentation":
        """Files in blocks: each is of use only as a whole, as if it were one token."""
        every, last = torch.arange(len(n_bytes)), (8 * n_bytes - 1) // info_bits
        return cls(n_bytes, last + 1, last, every, torch.zeros_like(last), last, every)

    def received(self, lost: Tensor) -> Tensor:
        """(T,) bool, in the order of travel: which tokens arrive when (B, longest) blocks are lost."""
        before = torch.nn.functional.pad(lost.long().cumsum(1), (1, 0))
        whole = before[self.image, self.last + 1] == before[self.image, self.first]
        headed = before.gather(1, self.header[:, None] + 1)[:, 0] == 0
        return (whole & headed[self.image])[self.chunk]


def conceal(tokens: Packed, received: Tensor, prototype: Tensor, patches: int, how: str = "drop") -> Packed:
    """The tokens the server goes on with when (T,) bool ``received`` of them arrive.

    Args:
        tokens: of a batch, all of them; those not received are not looked at.
        received: which are.
        prototype: (P, D) average of the P protected tokens over other images: stands in for those that are lost.
        patches: patches of an image, which its other tokens' sizes add up to.
        how: "drop": lost tokens are left out; "mean": the average of those received, by size, stands for all patches
            that are lost; "zero": every lost token is a zero of size 1.
    """
    if how not in CONCEALMENTS:
        raise ValueError(f"unknown concealment {how!r}: use one of {', '.join(CONCEALMENTS)}")
    protected = tokens.layout.position < len(prototype)
    replaced, present = protected & ~received, protected | received
    x, sizes = tokens.x.clone(), tokens.full_sizes.clone()
    x[replaced], sizes[replaced] = prototype[tokens.layout.position[replaced]], 1.0
    if how == "zero":
        sizes[~present] = 1.0
        return replace(tokens, x=x * present[:, None], sizes=sizes)
    # Sizes of one weigh nothing; without them attention is faster.
    unsized = tokens.sizes is None and how == "drop"
    left = replace(tokens, x=x, sizes=None if unsized else sizes).keep(present)
    return left if how == "drop" else _add_means(left, len(prototype), patches)


def _add_means(tokens: Packed, protected: int, patches: int) -> Packed:
    """A further token for each image that lacks patches: the average of those it has stands for the others."""
    assert tokens.sizes is not None
    batch, patch = len(tokens.lengths), tokens.layout.position >= protected
    image, x, sizes = tokens.layout.image[patch], tokens.x[patch], tokens.sizes[patch]
    weight = torch.zeros(batch).index_add_(0, image, sizes)
    total = torch.zeros(batch, x.shape[1]).index_add_(0, image, x * sizes[:, None])
    lacking = (weight > 0) & (weight < patches)
    means = (total / weight.clamp(min=1)[:, None])[lacking]
    both = join([tokens, Packed(means, Layout(lacking.long()), (patches - weight)[lacking])])
    # Each image's own tokens, then its further one.
    both = both.images(torch.arange(2 * batch).view(2, batch).T.flatten())
    source = tokens.source
    if source is not None:
        # The further token comes last.
        source = torch.where((source < 0) & lacking[:, None], tokens.lengths[:, None], source)
    return replace(both, layout=Layout(tokens.lengths + lacking), source=source)


def protected_means(tokens: Packed, protected: int) -> Tensor:
    """(P, D) averages of the protected tokens over the images of a batch, see `conceal`."""
    return tokens.x[tokens.layout.offsets[:, None] + torch.arange(protected)].mean(0)
