"""Visual tokens on their way from the vision tower to the language model: merged once more, sent, counted."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from tokmerge import merge, wire
from tokmerge.packed import Layout, Packed
from tokmerge.policies import Policy


@dataclass(frozen=True)
class Seen:
    """B images as they are sent, and what that took so far.

    Attributes:
        tokens: packed (T, D) tokens, of the tower or of the projector; their source map says which token each
            patch is part of, if it was asked for.
        first: (T,) int64 first patch that each token stands for; None if the server need not know.
        weighed: the server needs the tokens' sizes.
        n_patches: tokens of an unmerged image.
        precision: of the values in the payload, one of `tokmerge.wire.PRECISIONS`.
        layers: (B, l + 1) int64, tokens entering each layer of the tower, and after the last.
        vision_macs: (B,) int64, of the tower.
        projector_macs: (B,) int64, of the projector and the merging after it, wherever they run.
    """

    tokens: Packed
    first: Tensor | None
    weighed: bool
    n_patches: int
    precision: str
    layers: Tensor
    vision_macs: Tensor
    projector_macs: Tensor

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def sizes(self) -> Tensor:
        """(T,) int64 patches that each token stands for."""
        sizes = self.tokens.sizes
        whole = sizes if sizes is not None else self.tokens.x.new_ones(len(self.tokens.x))
        return whole.round().long()

    @property
    def numbers(self) -> Tensor | None:
        """(T,) int64, what travels in the wire format's field for sizes; None for nothing.

        Sizes, or first patches plus one; of both, n_patches (size - 1) + first + 1.
        """
        if self.first is None:
            return self.sizes if self.weighed else None
        return self.first + 1 + (self.n_patches * (self.sizes - 1) if self.weighed else 0)

    @property
    def payload_bytes(self) -> Tensor:
        """(B,) int64, length of each of the `payloads`."""
        return wire.payload_bytes(self.tokens.lengths, self.tokens.x.shape[1], self.precision, self.numbers)

    def payloads(self) -> list[bytes]:
        """Each image's bytes."""
        counts, numbers = self.tokens.layout.counts, self.numbers
        split = [None] * len(counts) if numbers is None else numbers.split(counts)
        pairs = zip(self.tokens.split(), split, strict=True)
        return [wire.encode(x, number, self.precision) for x, number in pairs]

    def pick(self, rows: Tensor) -> "Seen":
        """The images at ``rows`` (B',), in that order, each as often as it occurs: many questions, one look."""
        old, new = self.tokens.layout, Layout(self.tokens.lengths[rows])
        shift = (old.offsets[rows] - new.offsets).repeat_interleave(new.lengths)
        index = torch.arange(len(shift), device=shift.device) + shift
        sizes, source, place = self.tokens.sizes, self.tokens.source, self.tokens.place
        return replace(
            self,
            tokens=Packed(
                self.tokens.x[index],
                new,
                None if sizes is None else sizes[index],
                None if source is None else source[rows],
                None if place is None else place[index],
            ),
            first=None if self.first is None else self.first[index],
            layers=self.layers[rows],
            vision_macs=self.vision_macs[rows],
            projector_macs=self.projector_macs[rows],
        )


@dataclass(frozen=True)
class LlavaRecord:
    """What answering B questions took, each counted as if it had been asked alone.

    Attributes:
        seen: the images as they were sent.
        prompt: (B,) int64, tokens the language model read, the image's included.
        left: (B,) int64, those of them that the language model's last layers read.
        generated: (B,) int64, tokens of the answer, end of text included; 0 if nothing was generated.
        scores: (B, vocabulary) of the first answer token; None if nothing was generated.
        prefill_macs: (B,) int64.
        decode_macs: (B,) int64.
    """

    seen: Seen
    prompt: Tensor
    left: Tensor
    generated: Tensor
    prefill_macs: Tensor
    decode_macs: Tensor
    scores: Tensor | None = None

    @property
    def visual(self) -> Tensor:
        """(B,) int64, visual tokens the language model read."""
        return self.seen.tokens.lengths

    @property
    def macs(self) -> Tensor:
        """(B,) int64, vision + projector + prefill + decode."""
        return self.seen.vision_macs + self.seen.projector_macs + self.prefill_macs + self.decode_macs

    @property
    def payload_bytes(self) -> Tensor:
        """(B,) int64, bytes sent."""
        return self.seen.payload_bytes


def merge_output(tokens: Packed, policy: Policy) -> tuple[Packed, Tensor]:
    """Merge a projector's output once, by the cosine of the tokens themselves.

    Args:
        tokens: packed (T, D).
        policy: sees them as layer 0 of 1, none of them protected.

    Returns:
        The tokens, and the (B,) MACs of matching, normalising and (where anything merged) averaging.
    """
    n, dim = tokens.lengths, tokens.x.shape[1]
    if not policy.active(0):
        return tokens, torch.zeros_like(n)
    metric = F.normalize(tokens.x, dim=-1)
    context = merge.Context(
        layer=0, depth=1, protected=0, metric=metric, sizes=tokens.sizes, layout=tokens.layout, place=tokens.place
    )  # fmt: skip
    merged = merge.apply(tokens, policy.select(context))
    left = merged.lengths
    return merged, policy.match_macs(n, dim) + 2 * n * dim + (n != left) * (n + left) * dim


def first_patches(tokens: Packed) -> Tensor:
    """The first patch that each token stands for: (T,) int64, from the source map.

    Raises:
        ValueError: the tokens have no source map.

    >>> first_patches(Packed(torch.zeros(2, 1), Layout(torch.tensor([2])), source=torch.tensor([[1, 0, 1, -1]])))
    tensor([1, 0])
    """
    source = tokens.source
    if source is None:
        raise ValueError("the tokens have no source map")
    n, kept = source.shape[1], source >= 0
    first = torch.full((len(tokens.x),), n - 1, device=source.device)
    patches = torch.arange(n, device=source.device).expand_as(source)[kept]
    return first.scatter_reduce(0, (source + tokens.layout.offsets[:, None])[kept], patches, "amin")
