"""Visual tokens on their way from the vision tower to the language model: merged once more, sent, counted."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokmerge import wire
from tokmerge.merging.matching import Context, Policy, matching_features
from tokmerge.merging.merge import apply
from tokmerge.merging.packed import Packed


@dataclass(frozen=True)
class VisualTokens:
    """B images as they are sent, and what that took so far."""

    tokens: Packed  #: of the tower or of the projector; their source map is of patches, if it was asked for
    first: Tensor | None  #: (T,) int64 first patch that each token stands for; None if the server need not know
    weighed: bool  #: the server needs the tokens' sizes
    n_patches: int  #: tokens of an unmerged image
    precision: str  #: of the values in the payload, one of `tokmerge.wire.PRECISIONS`
    layers: Tensor  #: (B, l + 1) int64, tokens entering each layer of the tower, and after the last
    vision_macs: Tensor  #: (B,) int64, of the tower
    projector_macs: Tensor  #: (B,) int64, of the projector and the merging after it, wherever they run

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def sizes(self) -> Tensor:
        """(T,) int64 patches that each token stands for."""
        return self.tokens.full_sizes.round().long()

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
        return wire.encode_images(self.tokens.x, self.tokens.layout.counts, self.numbers, self.precision)

    def pick(self, images: Tensor) -> "VisualTokens":
        """Some images (B',), in that order, each as often as it occurs: many questions about one image."""
        return replace(
            self,
            tokens=self.tokens.images(images),
            first=None if self.first is None else self.first[self.tokens.layout.rows(images)],
            layers=self.layers[images],
            vision_macs=self.vision_macs[images],
            projector_macs=self.projector_macs[images],
        )


@dataclass(frozen=True)
class LlavaRecord:
    """What answering B questions took, each counted as if it had been asked alone."""

    visual_tokens: VisualTokens  #: the images as they were sent
    owner: Tensor  #: (images,) int64, the question that each image belongs to
    prompt: Tensor  #: (B,) int64, tokens the language model read, the images' included
    left: Tensor  #: (B,) int64, those of them that the language model's last layers read
    generated: Tensor  #: (B,) int64, tokens of the answer, end of text included; 0 if nothing was generated
    prefill_macs: Tensor  #: (B,) int64
    decode_macs: Tensor  #: (B,) int64
    scores: Tensor | None = None  #: (B, vocabulary) of the first answer token; None if nothing was generated

    def per_question(self, values: Tensor) -> Tensor:
        """(B,) sums over each question's images of (images,) values."""
        return torch.zeros_like(self.prompt).index_add_(0, self.owner, values)

    @property
    def visual(self) -> Tensor:
        """(B,) int64, visual tokens the language model read."""
        return self.per_question(self.visual_tokens.tokens.lengths)

    @property
    def vision_macs(self) -> Tensor:
        """(B,) int64, of the tower."""
        return self.per_question(self.visual_tokens.vision_macs)

    @property
    def projector_macs(self) -> Tensor:
        """(B,) int64, of the projector and the merging after it, wherever they run."""
        return self.per_question(self.visual_tokens.projector_macs)

    @property
    def macs(self) -> Tensor:
        """(B,) int64, vision + projector + prefill + decode."""
        return self.vision_macs + self.projector_macs + self.prefill_macs + self.decode_macs

    @property
    def payload_bytes(self) -> Tensor:
        """(B,) int64, bytes sent."""
        return self.per_question(self.visual_tokens.payload_bytes)


def merge_output(tokens: Packed, policy: Policy) -> tuple[Packed, Tensor]:
    """A projector's output merged once, by the cosine of the tokens themselves, and the (B,) MACs of that.

    The policy sees layer 0 of 1 and no protected tokens; counted are matching, normalising and, where anything merged,
    averaging.
    """
    n, dim = tokens.lengths, tokens.x.shape[1]
    if not policy.active(0):
        return tokens, torch.zeros_like(n)
    metric = matching_features("tokens", tokens.x, tokens.x)
    context = Context(0, 1, 0, metric, tokens.sizes, tokens.layout, place=tokens.place)
    merged = apply(tokens, policy.select(context))
    left = merged.lengths
    return merged, policy.match_macs(n, dim) + 2 * n * dim + (n != left) * (n + left) * dim


def first_patches(tokens: Packed) -> Tensor:
    """The first patch that each token stands for, from the source map: (T,) int64; ValueError if there is none.

    >>> from tokmerge.merging.packed import Layout
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
