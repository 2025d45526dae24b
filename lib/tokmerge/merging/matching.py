"""Who is like whom: what a policy sees of one layer, the best matches, and the merges it answers with.

Bipartite matching follows ToMe (Bolya et al., 2210.09461, section 3), written anew for packed batches.
"""

from dataclasses import dataclass
from functools import cached_property, reduce
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F

from tokmerge.merging.packed import Layout

FEATURES = ("tokens", "keys")


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
    src: Tensor  #: (B, A) packed row of each token in A
    dst: Tensor  #: (B, A) packed row of its best match

    def merges(self, chosen: Tensor) -> Merges:
        """The merges of the chosen (B, A) bool entries."""
        entries = chosen.flatten().nonzero().squeeze(1)
        return Merges(self.src.take(entries), self.dst.take(entries), chosen.sum(1))


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

    @cached_property
    def padded_metric(self) -> Tensor:
        """(B, longest, d)."""
        return self.layout.pad(self.metric)

    @cached_property
    def class_attention(self) -> Tensor:
        """(T,) what each image's class token (its first) attends to, mean over heads: sums to 1 over an image.

        Raises:
            ValueError: the model has no class token, or attention is not known here.
        """
        if self.qkv is None or self.protected == 0:
            raise ValueError("the policy needs the attention of a class token, and this model has none to give")
        layout, (queries, keys) = self.layout, self.qkv[:, :2].unbind(1)
        scores = (queries[layout.offsets][layout.image] * keys).sum(-1) * keys.shape[-1] ** -0.5
        if self.sizes is not None:
            scores = scores + self.sizes.log().to(scores.dtype)[:, None]
        padded = layout.pad(scores).masked_fill(~layout.valid[..., None], float("-inf"))
        return padded.softmax(1).mean(-1)[layout.valid]


def matching_features(kind: str, x: Tensor, keys: Tensor) -> Tensor:
    """What two tokens must be alike in to merge: (T, D) or (T, d), of unit length.

    "tokens": the residual stream x (T, D) after attention, which is what merging averages. "keys": the mean of keys
    (T, H, d) over heads, as ToMe has it.
    """
    # The mean over heads, up to its length, which normalising removes.
    return F.normalize(x if kind == "tokens" else reduce(torch.add, keys.unbind(1)), dim=-1)


def match(context: Context, group: Tensor | None = None) -> Matches:
    """Alternate the unprotected tokens between A and B; each a in A takes its most similar b in B.

    Args:
        context: the layer's.
        group: (T,) numbers; tokens alternate within those of one number, and only match each other. None: all do.
    """
    layout, first = context.layout, context.protected
    metric = context.padded_metric[:, first:]
    order = torch.arange(metric.shape[1], device=metric.device)[None]
    valid = None if layout.uniform else layout.valid[:, first:]
    if group is not None:
        numbers = layout.pad(group)[:, first:].double()
        # Padding comes last, so what is valid stays where it was.
        numbers = numbers if valid is None else numbers.masked_fill(~valid, float("inf"))
        numbers, order = numbers.sort(dim=1, stable=True)
        metric = metric.gather(1, order[..., None].expand_as(metric))
    rows = layout.offsets[:, None] + (order + first)
    scores = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
    if scores.shape[2] == 0:
        return Matches(scores.new_full(scores.shape[:2], float("-inf")), rows[:, ::2], rows[:, ::2])
    if valid is not None:
        scores.masked_fill_(~valid[:, None, 1::2], float("-inf"))
    if group is not None:
        scores = scores.masked_fill(numbers[:, ::2, None] != numbers[:, None, 1::2], float("-inf"))
    similarity, best = scores.max(dim=-1)
    if valid is not None:
        similarity = similarity.masked_fill(~valid[:, ::2], float("-inf"))
    return Matches(similarity, rows[:, ::2], rows[:, 1::2].gather(1, best))


def bipartite_macs(n: Tensor, d: int) -> Tensor:
    """MACs of the similarities that `match` computes among n (any shape) unprotected tokens with d-wide features."""
    a = n - n // 2
    return a * (n - a) * d


@runtime_checkable
class Policy(Protocol):
    """Which tokens merge into which, at each layer: what the engine asks of a policy."""

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
