"""Image-classification data sets behind one schema: a fixed order of (id, image, label) that can start anywhere.

The embedded profile uses Fashion-MNIST (`tokmerge.fashion`), the paper profile ImageNet, from a folder or the hub.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

IMAGENET_HUB = "ILSVRC/imagenet-1k"
SOURCES = ("sample", "fashion-mnist", "imagefolder", "imagenet-1k")


class DataError(ValueError):
    """A data set is missing, damaged or not what it should be."""


class Example(NamedTuple):
    """One labelled image."""

    id: str
    image: Image.Image
    label: int


class Batch(NamedTuple):
    """B transformed examples: ids, images (B, C, H, W) float32, labels (B,) int64."""

    ids: list[str]
    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class ImageSet:
    """A labelled set of images in a fixed order.

    Attributes:
        name: what results computed on it must be labelled with.
        split: which part of it.
        classes: class names; a label is an index into them.
        ids: id of each example.
        labels: (N,) class of each example.
        stream: ``stream(start)`` yields the examples from that position on.
        at: ``at(position)`` is one example, where that costs less than streaming up to it.
    """

    name: str
    split: str
    classes: tuple[str, ...]
    ids: Sequence[str]
    labels: np.ndarray
    stream: Callable[[int], Iterator[Example]]
    at: Callable[[int], Example] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def examples(self, start: int = 0) -> Iterator[Example]:
        """The examples in order, from position ``start`` on.

        Raises:
            ValueError: ``start`` is negative or beyond the end.
        """
        if not 0 <= start <= len(self):
            raise ValueError(f"cannot start at {start} of {len(self)} examples")
        return self.stream(start)


def load(
    source: str, split: str = "test", *, path: str | Path | None = None, data_dir: str | Path = "data"
) -> ImageSet:
    """A data set by name.

    Args:
        source: one of `SOURCES`.
        split: "train" or "test" (sample, fashion-mnist); a label for imagefolder; the hub's split name.
        path: where it lies; required for imagefolder, optional for fashion-mnist and imagenet-1k.
        data_dir: where a fetched copy is kept.

    Raises:
        DataError: unknown name, or the data cannot be had.
    """
    from tokmerge import fashion

    if source == "sample":
        return fashion.sample(split)
    if source == "fashion-mnist":
        return fashion.fashion_mnist(split, path, data_dir)
    if source == "imagefolder":
        if path is None:
            raise DataError("imagefolder needs a path: a folder with one folder of images per class")
        return image_folder(path, split)
    if source == "imagenet-1k":
        return imagenet_hub(split, str(path or IMAGENET_HUB))
    raise DataError(f"unknown data set {source!r}: use one of {', '.join(SOURCES)}")


def batches(images: ImageSet, transform: Callable[[Any], Tensor], batch_size: int, start: int = 0) -> Iterator[Batch]:
    """Transformed batches in order, the last one as long as it comes.

    Args:
        images: the data set.
        transform: PIL image -> (C, H, W) float tensor, such as `tokmerge.models.transform` gives.
        batch_size: images per batch.
        start: position of the first example.

    Raises:
        ValueError: ``batch_size`` is not positive, or ``start`` outside the set.
    """
    if batch_size < 1:
        raise ValueError(f"cannot cut {len(images)} examples into batches of {batch_size}")
    stream = images.examples(start)
    while chunk := list(islice(stream, batch_size)):
        yield Batch(
            [example.id for example in chunk],
            torch.stack([transform(example.image) for example in chunk]),
            torch.tensor([example.label for example in chunk]),
        )


def tensors(images: ImageSet, transform: Callable[[Any], Tensor]) -> Batch:
    """The whole set as one batch, for sets that fit in memory."""
    return next(batches(images, transform, len(images)))


def subset(images: ImageSet, positions: Sequence[int] | np.ndarray) -> ImageSet:
    """The examples at the given positions (or under a boolean mask), each once, in the set's own order.

    Raises:
        IndexError: a position outside the set.
    """
    index = np.asarray(positions) if len(positions) else np.array([], int)
    chosen: list[int] = np.unique(np.arange(len(images))[index]).tolist()
    part = replace(images, ids=[images.ids[i] for i in chosen], labels=images.labels[chosen])
    one = images.at
    if one is not None:
        return replace(part, stream=lambda start: map(one, chosen[start:]), at=lambda position: one(chosen[position]))

    def stream(start: int) -> Iterator[Example]:
        wanted = set(chosen[start:])
        if wanted:
            first = min(wanted)
            for position, example in enumerate(islice(images.examples(first), max(wanted) - first + 1), first):
                if position in wanted:
                    yield example

    return replace(part, stream=stream)


def stretch(images: ImageSet, n: int, skip: int, split: str) -> ImageSet:
    """n examples of a split in its order, after the first ``skip``.

    Raises:
        ValueError: the set holds fewer.
    """
    if skip + n > len(images):
        raise ValueError(f"{n} images after the first {skip} are asked for: the {split} split has {len(images)}")
    return subset(images, range(skip, skip + n))


def search_split(labels: Sequence[int] | np.ndarray | Tensor, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut a stratified search split off a training set.

    Args:
        labels: (N,) class of each example.
        n: size of the search split; every class gives its share.
        seed: of the draw.

    Returns:
        Sorted indices (search, rest): disjoint, together all of 0..N-1.

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
    for c in np.argsort(take - quota, kind="stable")[: n - take.sum()]:
        take[c] += 1
    search = np.concatenate(
        [rng.permutation(np.flatnonzero(labels == c))[:t] for c, t in zip(classes, take, strict=True)]
    )
    return np.sort(search), np.setdiff1d(np.arange(len(labels)), search)


def image_folder(path: str | Path, split: str = "val") -> ImageSet:
    """A folder with one folder of images per class (ImageNet's val layout: n01440764/*.JPEG).

    Classes are the sorted folder names, the order is by class and file name, an id is the path below
    ``path``. Images come as RGB.

    Raises:
        DataError: no such folder, a class without images, or (while reading) an unreadable image.
    """
    from torchvision.datasets import ImageFolder

    root = Path(path)
    if not root.is_dir():
        raise DataError(f"image folder {root} is not a folder")
    try:
        listing = ImageFolder(str(root))
    except FileNotFoundError as error:
        raise DataError(f"image folder {root}: one folder of images per class is needed ({error})") from error

    ids = [Path(file).relative_to(root).as_posix() for file, _ in listing.samples]

    def at(position: int) -> Example:
        file, label = listing.samples[position]
        return Example(ids[position], open_rgb(file, file), label)

    def stream(start: int) -> Iterator[Example]:
        return map(at, range(start, len(ids)))

    title = f"ImageFolder {root.absolute().name}"
    return ImageSet(title, split, tuple(listing.classes), ids, np.array(listing.targets), stream, at)


def imagenet_hub(split: str = "validation", name: str = IMAGENET_HUB) -> ImageSet:
    """ImageNet-1k streamed from the Hugging Face hub, or any data set with columns image and label.

    Args:
        split: the hub's name of the split.
        name: hub name, or a local folder of parquet files with the same columns.

    Raises:
        DataError: no access, no such data, a wrong schema, or (while reading) an unreadable image.
    """
    import datasets

    try:
        rows = datasets.load_dataset(name, split=split, streaming=True)
        features = rows.features or {}
        if not isinstance(features.get("label"), datasets.ClassLabel) or "image" not in features:
            raise DataError(
                f"data set {name}: columns image and label (a ClassLabel) are needed, it has {list(features)}"
            )
        # Named to the parquet reader, so that the images (6.7 GB in ImageNet's validation split) stay where they are.
        only_labels = datasets.load_dataset(name, split=split, streaming=True, columns=["label"])
        labels = np.array([row["label"] for row in only_labels])
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"data set {name}, split {split!r}: {type(error).__name__}: {error}\n"
            "ImageNet needs its licence accepted at huggingface.co/datasets/ILSVRC/imagenet-1k and a token "
            "(`hf auth login` or HF_TOKEN); without network give a local folder as path."
        ) from error
    # Decoded here, because the library would also turn photos by their EXIF orientation, unlike an image folder.
    encoded = rows.cast_column("image", datasets.Image(decode=False))
    ids = [f"{split}-{index:08d}" for index in range(len(labels))]

    def stream(start: int) -> Iterator[Example]:
        for identifier, row in zip(ids[start:], encoded.skip(start), strict=True):
            yield Example(identifier, open_rgb(io.BytesIO(row["image"]["bytes"]), identifier), int(row["label"]))

    title = "ImageNet-1k" if name == IMAGENET_HUB else f"hub data {Path(name).name}"
    return ImageSet(title, split, tuple(features["label"].names), ids, labels, stream)


def open_rgb(file: str | Path | io.BytesIO, name: str) -> Image.Image:
    """An image file as RGB.

    Args:
        file: path, or the file's bytes.
        name: what an error calls it.

    Raises:
        DataError: it cannot be read, for whatever reason.
    """
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    # On damaged files decoders raise nearly anything: OSError, SyntaxError, ValueError, DecompressionBombError.
    except Exception as error:
        raise DataError(f"image {name} cannot be read: {error}") from error
