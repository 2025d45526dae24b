"""Image-classification data sets behind one schema: a fixed order of (id, image, label) that can start anywhere."""

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

Item = TypeVar("Item")
#: models are trained on the first, thresholds searched on the second, points chosen on the third, the last is met once
SPLITS = ("train", "search", "select", "test")


class DataError(ValueError):
    """A data set is missing, damaged or not what it should be."""


class Example(NamedTuple):
    """One labelled image; its mask, (H, W) bool, says where there is an object, None where that is not known."""

    id: str
    image: Image.Image
    label: int
    mask: np.ndarray | None = None


class Batch(NamedTuple):
    """B transformed examples: ids, images (B, C, H, W) float32, labels (B,) int64, masks (B, H, W) bool or None."""

    ids: list[str]
    images: Tensor
    labels: Tensor
    masks: Tensor | None = None

    @property
    def truth(self) -> Tensor:
        """What answers are compared with: masks where there are any, else labels."""
        return self.labels if self.masks is None else self.masks


@dataclass(frozen=True)
class ImageSet:
    """A labelled set of images in a fixed order, to be had one by one or as a stream."""

    name: str  #: what results computed on it must be labelled with
    split: str  #: which part of it
    classes: tuple[str, ...] = field(repr=False)  #: class names; a label is an index into them, -1 where there are none
    ids: Sequence[str] = field(repr=False)  #: of each example
    labels: np.ndarray = field(repr=False)  #: (N,) class of each example
    #: the examples from a position on
    stream: Callable[[int], Iterator[Example]] | None = field(default=None, repr=False)
    at: Callable[[int], Example] | None = field(default=None, repr=False)  #: the example at a position

    def __post_init__(self) -> None:
        least = 0 if self.classes else -1
        if len(bad := np.flatnonzero((self.labels < least) | (self.labels >= len(self.classes)))):
            what = f"example {self.ids[bad[0]]} of {self.name}, {self.split}, has label {self.labels[bad[0]]}"
            raise DataError(f"{what}, which is none of its {len(self.classes)} classes: use a split with public labels")

    def __len__(self) -> int:
        return len(self.ids)

    def examples(self, start: int = 0) -> Iterator[Example]:
        """The examples in order, from position ``start`` on; ValueError if that is negative or beyond the end."""
        if not 0 <= start <= len(self):
            raise ValueError(f"cannot start at {start} of {len(self)} examples")
        if self.at is not None:
            return map(self.at, range(start, len(self)))
        assert self.stream is not None
        return self.stream(start)


def batches(images: ImageSet, transform: Callable[[Any], Tensor], batch_size: int, start: int = 0) -> Iterator[Batch]:
    """Transformed batches in order, from position ``start`` on, the last one as long as it comes.

    ``transform`` maps a PIL image to a (C, H, W) float tensor, such as `tokmerge.models.zoo.transform` gives.

    Raises:
        ValueError: ``batch_size`` is not positive, or ``start`` outside the set.
    """
    if batch_size < 1:
        raise ValueError(f"cannot cut {len(images)} examples into batches of {batch_size}")
    stream = images.examples(start)
    while chunk := list(islice(stream, batch_size)):
        ids, pictures, labels, masks = zip(*chunk, strict=True)
        known = None if any(mask is None for mask in masks) else torch.from_numpy(np.stack(masks))
        yield Batch(list(ids), torch.stack([transform(picture) for picture in pictures]), torch.tensor(labels), known)


def tensors(images: ImageSet, transform: Callable[[Any], Tensor]) -> Batch:
    """The whole set as one batch, for sets that fit in memory."""
    return next(batches(images, transform, len(images)))


def split_batch(batch: Batch, size: int) -> Iterable[Batch]:
    """Cut a set held in memory into batches of ``size``."""
    for start in range(0, len(batch.ids), size):
        part = slice(start, start + size)
        masks = None if batch.masks is None else batch.masks[part]
        yield Batch(batch.ids[part], batch.images[part], batch.labels[part], masks)


def subset(images: ImageSet, positions: Sequence[int] | np.ndarray) -> ImageSet:
    """The examples at the given positions (or under a boolean mask), each once, in the set's own order.

    Raises:
        IndexError: a position outside the set.
    """
    chosen, one = ascending(positions, len(images)), images.at
    part = replace(images, ids=[images.ids[i] for i in chosen], labels=images.labels[chosen])
    if one is not None:
        return replace(part, stream=None, at=lambda position: one(chosen[position]))
    return replace(part, stream=lambda start: pass_over(images.examples, chosen[start:]))


def ascending(positions: Sequence[int] | np.ndarray, n: int) -> list[int]:
    """Positions below n as numpy takes them (or a boolean mask), each once, in ascending order."""
    index = np.asarray(positions) if len(positions) else np.array([], int)
    return np.unique(np.arange(n)[index]).tolist()


def pass_over(stream: Callable[[int], Iterator[Item]], chosen: Sequence[int]) -> Iterator[Item]:
    """The items at ascending positions of a stream that can start anywhere; all others are passed over."""
    if chosen:
        wanted, first = set(chosen), chosen[0]
        for position, item in enumerate(islice(stream(first), chosen[-1] - first + 1), first):
            if position in wanted:
                yield item


def stretch(images: ImageSet, n: int, skip: int, split: str) -> ImageSet:
    """n examples of a split in its order, after the first ``skip``; ValueError if it holds fewer."""
    if skip + n > len(images):
        raise ValueError(f"{n} images after the first {skip} are asked for: the {split} split has {len(images)}")
    return subset(images, range(skip, skip + n))


def search_split(labels: Sequence[int] | np.ndarray | Tensor, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut a search split of n examples off a training set with (N,) labels; every class gives its share.

    Gives sorted indices (search, rest): disjoint, together all of 0..N-1. ValueError if n is not between 0 and N.

    >>> search, rest = search_split([0, 0, 1, 1], 2, seed=0)
    >>> len(search), sorted([*search.tolist(), *rest.tolist()])
    (2, [0, 1, 2, 3])
    """
    labels = np.asarray(labels)
    if not 0 < n < len(labels):
        raise ValueError(f"a search split of {n} cannot be cut off {len(labels)} examples")
    rng = np.random.default_rng(seed)
    classes, counts = np.unique(labels, return_counts=True)
    quota = counts * n / len(labels)
    take = np.floor(quota).astype(int)
    take[np.argsort(take - quota, kind="stable")[: n - take.sum()]] += 1
    parts = [rng.permutation(np.flatnonzero(labels == c))[:t] for c, t in zip(classes, take, strict=True)]
    search = np.sort(np.concatenate(parts))
    return search, np.setdiff1d(np.arange(len(labels)), search)


def divide(labels: Sequence[int] | np.ndarray, n_search: int, n_select: int, seed: int) -> dict[str, np.ndarray]:
    """Cut a training set with (N,) labels into "train", "search" and "select": sorted indices, disjoint, together all.

    The same images are held back for the last two, whatever either's share of them. ValueError as of `search_split`.

    >>> {name: len(part) for name, part in divide([0, 1] * 10, 2, 4, seed=0).items()}
    {'train': 14, 'search': 2, 'select': 4}
    """
    held, train = search_split(labels, n_search + n_select, seed)
    search, select = search_split(np.asarray(labels)[held], n_search, seed)
    return {"train": train, "search": held[search], "select": held[select]}


def open_rgb(file: str | Path | io.BytesIO, name: str) -> Image.Image:
    """An image file (path, or its bytes) as RGB, turned as its EXIF says; DataError if it cannot be used."""
    try:
        with Image.open(file) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"it has more than 8 bits a channel (mode {image.mode}): save it with 8")
            if (frames := getattr(image, "n_frames", 1)) > 1:
                raise ValueError(f"it has {frames} frames: save one of them")
            return ImageOps.exif_transpose(image).convert("RGB")
    # On damaged files decoders raise nearly anything: OSError, SyntaxError, ValueError, DecompressionBombError.
    except Exception as error:
        raise DataError(f"image {name} cannot be read: {error}") from error


def flip_and_shift(images: Tensor, by: int, fill: float | None = None) -> Tensor:
    """Mirror (B, C, H, W) images at random, and shift each by up to ``by`` pixels; torch's generator draws.

    What comes in from outside is ``fill``, or without it the edge repeated.
    """
    batch, _, height, width = images.shape
    flipped = torch.where(torch.rand(batch)[:, None, None, None] < 0.5, images.flip(3), images)
    mode = "replicate" if fill is None else "constant"
    padded = F.pad(flipped, (by, by, by, by), mode=mode, value=fill).permute(0, 2, 3, 1)
    rows = torch.randint(0, 2 * by + 1, (batch, 1)) + torch.arange(height)
    columns = torch.randint(0, 2 * by + 1, (batch, 1)) + torch.arange(width)
    return padded[torch.arange(batch)[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
