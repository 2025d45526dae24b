"""ImageNet, or any images of one's own: a folder per class, or a data set of the hub."""

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data import ImageNetInfo

from tokmerge.data.hub import open_hub
from tokmerge.data.image_sets import DataError, Example, ImageSet, open_rgb

IMAGENET_HUB, IMAGENETTE_HUB = "ILSVRC/imagenet-1k", "frgfm/imagenette"
# Its classes, and what they are among ImageNet's.
IMAGENETTE = {
    "tench": 0, "English springer": 217, "cassette player": 482, "chain saw": 491, "church": 497, "French horn": 566,
    "garbage truck": 569, "gas pump": 571, "golf ball": 574, "parachute": 701,
}  # fmt: skip


def image_folder(path: str | Path, split: str = "val") -> ImageSet:
    """A folder with one folder of images per class (ImageNet's val layout: `n01440764/*.JPEG`).

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

    title = f"ImageFolder {root.absolute().name}"
    return ImageSet(title, split, tuple(listing.classes), ids, np.array(listing.targets), at=at)


def picture_folder(path: str | Path, split: str = "val") -> ImageSet:
    """All pictures in a folder and the folders in it, without labels (-1), in the order of their paths.

    Raises:
        DataError: no such folder, no picture in it, or one that cannot be used (every file is looked at here).
    """
    root = Path(path)
    if not root.is_dir():
        raise DataError(f"picture folder {root} is not a folder")
    known = set(Image.registered_extensions())
    files = sorted(file for file in root.rglob("*") if file.is_file() and file.suffix.lower() in known)
    if not files:
        raise DataError(f"picture folder {root} holds no picture ({', '.join(sorted(known)[:6])}, ...)")
    for file in files:
        open_rgb(file, str(file))
    ids = [file.relative_to(root).as_posix() for file in files]

    def at(position: int) -> Example:
        return Example(ids[position], open_rgb(files[position], str(files[position])), -1)

    return ImageSet(f"pictures in {root.absolute().name}", split, (), ids, np.full(len(ids), -1), at=at)


def imagenet_hub(split: str = "validation", name: str = IMAGENET_HUB) -> ImageSet:
    """ImageNet-1k streamed from the hub, or any data set with columns image and label (or a local folder of parquet).

    Raises:
        DataError: no access, no such data, a wrong schema, or (while reading) an unreadable image.
    """
    remedy = (
        "ImageNet needs its licence accepted at huggingface.co/datasets/ILSVRC/imagenet-1k and a token "
        "(`hf auth login` or HF_TOKEN); without network give a local folder as path."
    )
    return _stream(split, name, "ImageNet-1k" if name == IMAGENET_HUB else f"hub data {Path(name).name}", remedy)


def imagenette_hub(split: str = "validation", name: str = IMAGENETTE_HUB) -> ImageSet:
    """Imagenette (ten of ImageNet's classes, fast.ai), fetched once from the hub, or from a local folder of parquet.

    Labels are those of ImageNet's 1,000 classes, so that a model of these is right or wrong as on ImageNet.

    Raises:
        DataError: as of `imagenet_hub`; also other classes than Imagenette's.
    """
    info = ImageNetInfo("imagenet-1k")
    classes = tuple(info.index_to_description(index).split(",")[0] for index in range(info.num_classes()))
    remedy = "Imagenette is open to all: is there a network? Without one give a local folder as path."
    config = "320px" if name == IMAGENETTE_HUB else None
    title = "Imagenette" if name == IMAGENETTE_HUB else f"Imagenette from {Path(name).name}"
    images = _stream(split, name, title, remedy, config, keep=True)
    if set(images.classes) != set(IMAGENETTE):
        raise DataError(f"data set {name} has classes {', '.join(images.classes[:3])}, ...: not Imagenette's")
    index = np.array([IMAGENETTE[name] for name in images.classes])

    def stream(start: int) -> Iterator[Example]:
        return (example._replace(label=int(index[example.label])) for example in images.examples(start))

    return replace(images, classes=classes, labels=index[images.labels], stream=stream)


def _stream(split: str, name: str, title: str, remedy: str, config: str | None = None, keep: bool = False) -> ImageSet:
    """A data set of the hub with columns image and label; arguments as of `tokmerge.data.hub.open_hub`."""

    def check(features: dict[str, Any]) -> None:
        if "image" not in features or not hasattr(features.get("label"), "names"):
            raise DataError(
                f"data set {name}: columns image and label (a ClassLabel) are needed, it has {list(features)}"
            )

    features, light, rows = open_hub(name, split, ["label"], check, remedy, config, keep)
    labels = np.array([row["label"] for row in light])
    ids = [f"{split}-{index:08d}" for index in range(len(labels))]

    def stream(start: int) -> Iterator[Example]:
        for identifier, row in zip(ids[start:], rows(start), strict=True):
            yield Example(identifier, open_rgb(io.BytesIO(row["image"]["bytes"]), identifier), int(row["label"]))

    return ImageSet(title, split, tuple(features["label"].names), ids, labels, stream)
