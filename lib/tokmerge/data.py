"""Image-classification data sets behind one schema: a fixed order of (id, image, label) that can start anywhere.

The embedded profile uses Fashion-MNIST (Xiao et al., 1708.07747), the real 60,000 + 10,000 photos, and a sample
of 512 of them that ships with the package. The paper profile uses ImageNet, from a folder or from the hub.
"""

import gzip
import hashlib
import io
import os
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from tokmerge import paths

FASHION_CLASSES = (
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
# sha256 of the unpacked idx bytes, so that packed, unpacked and hub copies all pass the same check.
FASHION_SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
FASHION_HUB = "zalando-datasets/fashion_mnist"
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
    """

    name: str
    split: str
    classes: tuple[str, ...]
    ids: Sequence[str]
    labels: np.ndarray
    stream: Callable[[int], Iterator[Example]]

    def __len__(self) -> int:
        return len(self.ids)

    def examples(self, start: int = 0) -> Iterator[Example]:
        """The examples in order, from position ``start`` on."""
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
    if source == "sample":
        return sample(split)
    if source == "fashion-mnist":
        return fashion_mnist(split, path, data_dir)
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
    """
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
    """The examples at the given positions, in the set's own order."""
    chosen = sorted({int(position) for position in positions})

    def stream(start: int) -> Iterator[Example]:
        wanted = set(chosen[start:])
        if wanted:
            first = min(wanted)
            for position, example in enumerate(islice(images.examples(first), max(wanted) - first + 1), first):
                if position in wanted:
                    yield example

    return replace(images, ids=[images.ids[i] for i in chosen], labels=images.labels[chosen], stream=stream)


def search_split(labels: Sequence[int] | np.ndarray | Tensor, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut a stratified search split off a training set.

    Args:
        labels: (N,) class of each example.
        n: size of the search split; every class gives its share.
        seed: of the draw.

    Returns:
        Sorted indices (search, rest): disjoint, together all of 0..N-1.

    >>> search, rest = search_split([0, 0, 1, 1], 2, seed=0)
    >>> len(search), sorted([*search, *rest])
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


def sample(split: str = "test") -> ImageSet:
    """512 Fashion-MNIST photos of the search split that ship with the package: 256 "train", 256 "test"."""
    table = pd.read_parquet(paths.ASSETS / "fashion_sample.parquet")
    halves = {"train": table[:256], "test": table[256:]}
    if split not in halves:
        raise DataError(f"the sample has no split {split!r}: use 'train' or 'test'")
    rows = halves[split]

    def stream(start: int) -> Iterator[Example]:
        for identifier, png, label in rows[start:].itertuples(index=False):
            yield Example(identifier, Image.open(io.BytesIO(png)), int(label))

    return ImageSet("Fashion-MNIST sample", split, FASHION_CLASSES, list(rows.id), rows.label.to_numpy(), stream)


def fashion_mnist(split: str, path: str | Path | None = None, data_dir: str | Path = "data") -> ImageSet:
    """Fashion-MNIST: 28x28 grey photos of clothes, 10 classes.

    Looked for at ``path`` (if given, nowhere else), in Debian's package, in ``data_dir``; else fetched
    into ``data_dir`` from Debian's archive without root, or else from the Hugging Face hub.

    Args:
        split: "train" (60,000) or "test" (10,000).
        path: folder with the four idx files, packed (.gz) or not.
        data_dir: folder that holds or gets a fetched copy.

    Raises:
        DataError: a file is truncated or changed, or no place has them; the message names file or places.
    """
    if split not in ("train", "test"):
        raise DataError(f"Fashion-MNIST has no split {split!r}: use 'train' or 'test'")
    folder = _find_fashion_mnist(Path(path) if path else None, Path(data_dir) / "fashion-mnist")
    stem = "train" if split == "train" else "t10k"
    # All four are checked, so that a damaged copy is noticed now and not by a later stage.
    content = {name: _read_idx(folder, name) for name in FASHION_SHA256}
    photos = np.frombuffer(content[f"{stem}-images-idx3-ubyte"], np.uint8, offset=16).reshape(-1, 28, 28)
    labels = np.frombuffer(content[f"{stem}-labels-idx1-ubyte"], np.uint8, offset=8)

    ids = [f"{split}-{index:05d}" for index in range(len(labels))]

    def stream(start: int) -> Iterator[Example]:
        for index in range(start, len(labels)):
            yield Example(ids[index], Image.fromarray(photos[index]), int(labels[index]))

    return ImageSet("Fashion-MNIST", split, FASHION_CLASSES, ids, labels.astype(np.int64), stream)


def _find_fashion_mnist(path: Path | None, fetched: Path) -> Path:
    if path is not None:
        if not _has_idx(path):
            raise DataError(f"{path} does not hold the four Fashion-MNIST idx files ({', '.join(FASHION_SHA256)})")
        return path
    for folder in (DEBIAN_FOLDER, fetched):
        if _has_idx(folder):
            return folder
    failures = []
    for fetch in (fetch_debian, fetch_hub):
        try:
            fetch(fetched)
            return fetched
        except DataError as error:
            failures.append(str(error))
    raise DataError(
        f"Fashion-MNIST is in neither {DEBIAN_FOLDER} nor {fetched}, and could not be fetched:\n- "
        + "\n- ".join(failures)
        + f"\nInstall Debian's package {DEBIAN_PACKAGE}, or give a path to the four idx files."
    )


def _has_idx(folder: Path) -> bool:
    return all((folder / name).is_file() or (folder / f"{name}.gz").is_file() for name in FASHION_SHA256)


def _read_idx(folder: Path, name: str) -> bytes:
    """The checked, unpacked bytes of one idx file."""
    file = folder / name if (folder / name).is_file() else folder / f"{name}.gz"
    try:
        content = file.read_bytes()
        if file.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file} is truncated or damaged ({error}): delete it and run again") from error
    if hashlib.sha256(content).hexdigest() != FASHION_SHA256[name]:
        raise DataError(f"{file} is not Fashion-MNIST's {name} (sha256 differs): delete it and run again")
    return content


def fetch_debian(folder: Path) -> None:
    """Fetch the four files from Debian's archive into ``folder``, without root, all or none.

    Raises:
        DataError: apt-get or dpkg-deb is missing or fails.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as temporary:
        work = Path(temporary).resolve()
        for part in ("state/lists/partial", "cache/archives/partial", "files"):
            (work / part).mkdir(parents=True)
        options = ["-o", f"Dir::State={work}/state", "-o", "Dir::State::status=/var/lib/dpkg/status"]
        options += ["-o", f"Dir::Cache={work}/cache", "-o", "Debug::NoLocking=1"]
        if os.geteuid() == 0:
            # apt would change to its own user, which may not write here.
            options += ["-o", "APT::Sandbox::User=root"]
        _run(["apt-get", *options, "update"], work)
        _run(["apt-get", *options, "download", DEBIAN_PACKAGE], work)
        packages = list(work.glob(f"{DEBIAN_PACKAGE}_*.deb"))
        if not packages:
            raise DataError(f"apt-get downloaded no {DEBIAN_PACKAGE}")
        _run(["dpkg-deb", "-x", str(packages[0]), "files"], work)
        unpacked = work / "files" / DEBIAN_FOLDER.relative_to("/")
        for name in FASHION_SHA256:
            _read_idx(unpacked, name)
        unpacked.chmod(0o755)
        unpacked.rename(folder)


def _run(command: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DataError(f"{command[0]}: {error}") from error
    if done.returncode:
        raise DataError(f"{command[0]} failed: " + " / ".join(done.stderr.strip().splitlines()[-3:]))


def fetch_hub(folder: Path, name: str = FASHION_HUB) -> None:
    """Fetch Fashion-MNIST from the Hugging Face hub and store it as the four idx files, all or none.

    Raises:
        DataError: the hub cannot be reached, or serves something else.
    """
    from datasets import load_dataset

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as temporary:
        files = Path(temporary) / "files"
        files.mkdir(mode=0o755)
        for split, stem in (("train", "train"), ("test", "t10k")):
            try:
                rows = load_dataset(name, split=split)
                photos = b"".join(np.asarray(image, np.uint8).tobytes() for image in rows["image"])
                labels = bytes(rows["label"])
            except Exception as error:
                raise DataError(f"hub data set {name}: {type(error).__name__}: {error}") from error
            count = len(labels).to_bytes(4, "big")
            side = (28).to_bytes(4, "big")
            (files / f"{stem}-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + count + side + side + photos)
            (files / f"{stem}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + count + labels)
        for idx in FASHION_SHA256:
            _read_idx(files, idx)
        files.rename(folder)


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
        raise DataError(f"image folder {root} does not exist")
    try:
        listing = ImageFolder(str(root))
    except FileNotFoundError as error:
        raise DataError(f"image folder {root}: one folder of images per class is needed ({error})") from error

    ids = [Path(file).relative_to(root).as_posix() for file, _ in listing.samples]

    def stream(start: int) -> Iterator[Example]:
        for index, (file, label) in enumerate(listing.samples[start:], start):
            yield Example(ids[index], _open_rgb(file), label)

    return ImageSet(f"ImageFolder {root.name}", split, tuple(listing.classes), ids, np.array(listing.targets), stream)


def imagenet_hub(split: str = "validation", name: str = IMAGENET_HUB) -> ImageSet:
    """ImageNet-1k streamed from the Hugging Face hub, or any data set with columns image and label.

    Args:
        split: the hub's name of the split.
        name: hub name, or a local folder of parquet files with the same columns.

    Raises:
        DataError: no access, no such data, or a wrong schema.
    """
    from datasets import ClassLabel, load_dataset

    try:
        rows = load_dataset(name, split=split, streaming=True)
    except Exception as error:
        raise DataError(
            f"data set {name}, split {split!r}: {type(error).__name__}: {error}\n"
            "ImageNet needs its licence accepted at huggingface.co/datasets/ILSVRC/imagenet-1k and a token "
            "(`hf auth login` or HF_TOKEN); without network give a local folder as path."
        ) from error
    features = rows.features or {}
    if not isinstance(features.get("label"), ClassLabel) or "image" not in features:
        raise DataError(f"data set {name}: columns image and label (a ClassLabel) are needed, it has {list(features)}")
    labels = np.array([row["label"] for row in rows.select_columns(["label"])])
    ids = [f"{split}-{index:08d}" for index in range(len(labels))]

    def stream(start: int) -> Iterator[Example]:
        for index, row in enumerate(rows.skip(start), start):
            yield Example(ids[index], row["image"].convert("RGB"), int(row["label"]))

    title = "ImageNet-1k" if name == IMAGENET_HUB else f"hub data {Path(name).name}"
    return ImageSet(title, split, tuple(features["label"].names), ids, labels, stream)


def _open_rgb(file: str | Path) -> Image.Image:
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise DataError(f"image {file} cannot be read: {error}") from error
