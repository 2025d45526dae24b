"""Who is like whom: what a policy sees of one layer, the best matches, and the merges it answers with.

Bipartite matching follows ToMe (Bolya et al., 2210.09461, section 3), written anew for packed batches.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from tokmerge.merging.packed import Layout, host

FEATURES = ("tokens", "keys")
NEEDS = ("class token", "places", "confidence")
# Similarities computed at a time: what is kept of them is the best of each row.
BLOCK = 2**20


class Merges(NamedTuple):
    """M merges of a batch: row ``src[i]`` disappears into row ``dst[i]``."""

    src: Tensor  #: (M,) packed rows, each at most once, none of them a dst
    dst: Tensor  #: (M,) packed rows of the same image
    lost: Tensor  #: (B,) int64, rows that disappear from each image
    dropped: Tensor | None = None  #: rows that disappear without a trace, neither src nor dst; None for none
    weights: Tensor | None = None  #: (T,) positive weights of the rows in the average; None for their sizes
    keep_norm: bool = False  #: give every average the largest norm among those it was made of


class Matches(NamedTuple):
    """Every token of set A with its best match in set B, padded over the batch."""

    similarity: Tensor  #: (B, A) cosine with the best match; -inf where there is no such token or no match
    best: Tensor  #: (B, A) int64, which token of set B that is
    layout: Layout  #: of the batch
    first: int  #: protected tokens
    order: Tensor | None  #: (B, U) places of the unprotected tokens as they alternate; None for one after the other

    def take(self, above: float | Tensor = -torch.inf, most: int | Tensor | None = None) -> Merges:
        """The merges of pairs that are more similar than a number, and of each image no more than the ``most`` similar.

        Args:
            above: for all images, or (B, 1).
            most: for all images, or (B, 1); of pairs that are alike the first. None: all.
        """
        chosen = self.similarity > above
        taken = host(chosen if most is None else chosen & largest(self.similarity, most))
        best, offsets = host(self.best), host(self.layout.offsets)
        image, number = (torch if isinstance(taken, Tensor) else np).where(taken)
        a, b, start = 2 * number, 2 * best[image, number] + 1, offsets[image] + self.first
        if self.order is not None:
            order = host(self.order)
            a, b = order[image, a], order[image, b]
        return Merges(torch.as_tensor(start + a), torch.as_tensor(start + b), torch.as_tensor(taken.sum(1)))


@dataclass(frozen=True)
class Context:
    """What a policy sees at one layer."""

    layer: int  #: block index l, from 0
    depth: int  #: number of blocks L
    protected: int  #: leading tokens that never merge (CLS, registers, distillation)
    metric: Tensor  #: (T, d) matching features of unit length (see `matching_features`)
    sizes: Tensor | None  #: (T,) patches each token stands for; None for all ones
    layout: Layout  #: which rows belong to which image
    qkv: Tensor | None = None  #: (T, 3, H, d) queries, keys and values of the layer; None where there are none
    place: Tensor | None = None  #: (T, 2) row and column of each token in the patch grid; None where it is not known
    #: gives each image's `confidence`; None where no model classifies
    read_out: Callable[[], Tensor] | None = None

    @cached_property
    def padded_metric(self) -> Tensor:
        """(B, longest, d)."""
        return self.layout.pad(self.metric)

    @property
    def places(self) -> Tensor:
        """``place``, for policies that cannot do without; ValueError where it is not known."""
        if self.place is None:
            raise ValueError("the policy needs the places of tokens in the patch grid, which are not known here")
        return self.place

    @cached_property
    def confidence(self) -> Tensor:
        """(B,) how far the class that the model would name now is ahead of the next, as probabilities: 0 to 1.

        Raises:
            ValueError: no model that classifies is at work here.
        """
        if self.read_out is None:
            raise ValueError("the policy needs the confidence of a classifier, and this model is none")
        return self.read_out()

    @cached_property
    def class_attention(self) -> Tensor:
        """(T,) what each image's class token (its first) attends to, mean over heads: sums to 1 over an image.

        Raises:
            ValueError: the model has no class token, or attention is not known here.
        """
        if self.qkv is None or self.protected == 0:
            raise ValueError("the policy needs the attention of a class token, and this model has none to give")
        layout, (queries, keys) = self.layout, widen(self.qkv[:, :2]).unbind(1)
        scores = (queries[layout.offsets][layout.image] * keys).sum(-1) * keys.shape[-1] ** -0.5
        if self.sizes is not None:
            scores = scores + self.sizes.log()[:, None]
        padded = layout.pad(scores).masked_fill(~layout.valid[..., None], float("-inf"))
        return padded.softmax(1).mean(-1)[layout.valid]


def matching_features(kind: str, x: Tensor, keys: Tensor) -> Tensor:
    """What two tokens must be alike in to merge: (T, D) or (T, d), of unit length.

    "tokens": the residual stream x (T, D) after attention, which is what merging averages. "keys": the mean of keys
    (T, H, d) over heads, as ToMe has it. In float32 at least: 16 bits cannot tell close similarities apart.
    """
    # The mean over heads, up to its length, which normalising removes.
    features = widen(x) if kind == "tokens" else widen(keys).sum(1)
    return features / torch.linalg.vector_norm(features, dim=-1, keepdim=True).clamp_min_(1e-12)


def widen(values: Tensor) -> Tensor:
    """The values in float32, or as they are if they are as wide or wider."""
    return values if values.dtype.itemsize >= 4 else values.float()


def ranked(scores: Tensor, valid: Tensor, descending: bool = False) -> Tensor:
    """(B, U) places in the order of (B, U) scores, equal ones as they were.

    What is not a finite number comes after all that is, and what is not ``valid``, (B, U) bool, after that.

    >>> scores = torch.tensor([[float("nan"), 2.0, 9.0, 1.0]])
    >>> ranked(scores, torch.tensor([[True, True, False, True]]))
    tensor([[3, 1, 0, 2]])
    """
    last = -1.0 if descending else 1.0
    keys = torch.where(scores.isfinite(), scores, last * torch.finfo(scores.dtype).max)
    return keys.masked_fill(~valid, last * float("inf")).argsort(dim=1, descending=descending, stable=True)


def largest(values: Tensor, r: int | Tensor) -> Tensor:
    """(B, A) bool: the r largest finite values of each row; of equal values the first. r: one for all, or (B, 1)."""
    seen = host(values)
    if isinstance(seen, np.ndarray) and isinstance(r, int):
        taken = np.zeros(seen.shape, bool)
        np.put_along_axis(taken, np.argsort(-seen, axis=1, kind="stable")[:, :r], True, axis=1)
        return torch.from_numpy(taken & np.isfinite(seen))
    finite = values.isfinite()
    order = values.masked_fill(~finite, float("-inf")).argsort(dim=1, descending=True, stable=True)
    chosen = torch.zeros_like(finite)
    if isinstance(r, int):
        return chosen.scatter_(1, order[:, :r], True) & finite
    return chosen.scatter_(1, order, torch.arange(values.shape[1], device=values.device) < r) & finite


class Sides(NamedTuple):
    """Sets A and B of a batch, to be compared."""

    a: Tensor  #: (B, A, d) features
    b: Tensor  #: (B, d, b) features
    valid: Tensor | None  #: (B, U) bool, which of the unprotected tokens an image has; None: all
    numbers: Tensor | None  #: (B, U) of their groups; None: all are of one
    inverse: Tensor | None  #: (B, U) one over their sizes; None: similarity is the cosine
    order: Tensor | None  #: as of `Matches`

    @classmethod
    def of(
        cls, context: Context, group: Tensor | None = None, order: Tensor | None = None, size_aware: bool = False
    ) -> "Sides":
        """The unprotected tokens, every other one in set A; arguments as of `match`."""
        layout, first = context.layout, context.protected
        metric = context.padded_metric[:, first:]
        valid = None if layout.uniform else layout.valid[:, first:]
        numbers = inverse = None
        if group is not None:
            numbers = layout.pad(group)[:, first:].double()
            # Padding comes last, so what is valid stays where it was.
            numbers = numbers if valid is None else numbers.masked_fill(~valid, float("inf"))
            numbers, order = numbers.sort(dim=1, stable=True)
        if size_aware and context.sizes is not None:
            inverse = layout.pad(1 / context.sizes)[:, first:]
            inverse = inverse if order is None else inverse.gather(1, order)
        if order is not None:
            metric = metric.gather(1, order[..., None].expand_as(metric))
        return cls(metric[:, ::2], metric[:, 1::2].transpose(1, 2), valid, numbers, inverse, order)

    def scores(self, some: slice = slice(None)) -> Tensor:
        """(B, A, b) similarities of all or some of set A; -inf where there is no such b, or none of the group."""
        scores = torch.bmm(self.a[:, some], self.b)
        if self.inverse is not None:
            weight = (2 / (self.inverse[:, ::2][:, some, None] + self.inverse[:, None, 1::2])).sqrt_()
            scores = scores.sub_(1).mul_(weight).add_(1)
        if self.valid is not None:
            scores.masked_fill_(~self.valid[:, None, 1::2], float("-inf"))
        if self.numbers is not None:
            others = self.numbers[:, ::2][:, some, None] != self.numbers[:, None, 1::2]
            scores.masked_fill_(others, float("-inf"))
        return scores


def match(
    context: Context, group: Tensor | None = None, order: Tensor | None = None, size_aware: bool = False
) -> Matches:
    """Alternate the unprotected tokens between A and B; each a in A takes its most similar b in B.

    Args:
        context: the layer's.
        group: (T,) numbers; tokens alternate within those of one number, and only match each other. None: all do.
        order: (B, U) places of the unprotected tokens in which they alternate, those beyond an image's end last. None:
            as they are.
        size_aware: similarity is 1 - sqrt(h) (1 - cosine), h the harmonic mean of the two tokens' sizes, instead of the
            cosine. What averaging two tokens costs in squares is h / 2 times their squared distance (Ward, 1963); the
            root damps that.
    """
    sides = Sides.of(context, group, order, size_aware)
    (n_images, n), width = sides.a.shape[:2], sides.b.shape[2]
    if width == 0:
        similarity = sides.a.new_full((n_images, n), float("-inf"))
        best = torch.zeros_like(similarity, dtype=torch.int64)
        return Matches(similarity, best, context.layout, context.protected, sides.order)
    found = [_row_maximum(sides.scores(slice(*part))) for part in blocks(n, n_images * width)]
    similarity, best = found[0] if len(found) == 1 else map(partial(torch.cat, dim=1), zip(*found, strict=True))
    if sides.valid is not None:
        similarity = similarity.masked_fill(~sides.valid[:, ::2], float("-inf"))
    return Matches(similarity, best, context.layout, context.protected, sides.order)


def _row_maximum(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Values and places of the largest along the last dimension of (B, A, b)."""
    given = host(scores)
    if not isinstance(given, np.ndarray):
        return scores.max(dim=-1)
    best = torch.from_numpy(given.argmax(-1))
    return scores.gather(-1, best[..., None])[..., 0], best


def best_among(queries: Tensor, keys: Tensor, allowed: Tensor) -> Tensor:
    """(B, n) which of the allowed, (B, m) bool, of (B, m, d) features is most similar to each of (B, n, d)."""
    found = [
        torch.bmm(queries[:, start:stop], keys.transpose(1, 2)).masked_fill_(~allowed[:, None], float("-inf")).argmax(2)
        for start, stop in blocks(queries.shape[1], allowed.numel())
    ]
    return torch.cat(found, dim=1) if found else allowed.new_empty(len(queries), 0, dtype=torch.int64)


def blocks(n: int, width: int) -> Iterator[tuple[int, int]]:
    """Starts and ends of n rows, in parts that hold no more than `BLOCK` values where each row takes ``width``.

    >>> list(blocks(5, 2**19))
    [(0, 2), (2, 4), (4, 5)]
    """
    size = max(1, BLOCK // max(1, width))
    return ((start, min(n, start + size)) for start in range(0, n, size))


def bipartite_macs(n: Tensor, d: int) -> Tensor:
    """MACs of the similarities that `match` computes among n (any shape) unprotected tokens with d-wide features."""
    a = n - n // 2
    return a * (n - a) * d


@runtime_checkable
class Policy(Protocol):
    """Which tokens merge into which, at each layer: what the engine asks of a policy.

    A policy may also say, as attribute ``needs``, what a model must give it, some of `NEEDS`; as ``compares`` and
    ``averages``, False where it does without the metric or without means; and as ``first``, the first layer at which
    it asks for confidence.
    """

    @property
    def feature(self) -> str:
        """What similarity is measured on, one of `FEATURES`."""
        ...

    def check(self, depth: int) -> None:
        """Raise ValueError if the policy does not fit ``depth`` blocks."""

    def active(self, layer: int) -> bool:
        """False where nothing can merge: the layer is left exactly as it is."""
        ...

    def select(self, context: Context) -> Merges:
        """The merges of one layer, for the whole batch."""
        ...

    def match_macs(self, n: Tensor, d: int) -> Tensor:
        """Multiply-accumulates of choosing among ``n`` (any shape) unprotected tokens with d-wide features."""
        ...


def needed_by(policy: Policy) -> Sequence[str]:
    """What a model must give a policy, some of `NEEDS`."""
    return getattr(policy, "needs", ())


def compares(policy: Policy) -> bool:
    """Whether a policy asks for the metric."""
    return getattr(policy, "compares", True)


def averages(policy: Policy) -> bool:
    """Whether a policy makes means of tokens."""
    return getattr(policy, "averages", True)
