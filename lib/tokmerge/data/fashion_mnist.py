"""Fashion-MNIST (Xiao et al., 1708.07747): the real 60,000 + 10,000 photos, found, fetched or refused with a reason."""

import gzip
import hashlib
import io
import os
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from tokmerge.data import debian
from tokmerge.data.image_sets import DataError, Example, ImageSet
from tokmerge.io import paths

CLASSES = (
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
# sha256 of the unpacked idx bytes, so that packed, unpacked and hub copies all pass the same check.
SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
STEMS = {"train": "train", "test": "t10k"}
DEBIAN_PACKAGE = {
    "d/dataset-fashion-mnist/dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb":
        "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
}  # fmt: skip
UNPACKED = "usr/share/datasets/fashion-mnist"
DEBIAN_FOLDER = Path("/", UNPACKED)
FASHION_HUB = "zalando-datasets/fashion_mnist"


def sample(split: str = "test") -> ImageSet:
    """512 Fashion-MNIST photos of the search split that ship with the package: 256 "train", 256 "test"."""
    table = pd.read_parquet(paths.ASSETS / "sample" / "fashion_sample.parquet")
    rows = {"train": table[:256], "test": table[256:]}[_known(split, "the sample")]
    ids, photos, labels = (rows[column].tolist() for column in rows.columns)

    def at(position: int) -> Example:
        return Example(ids[position], Image.open(io.BytesIO(photos[position])), labels[position])

    return ImageSet("Fashion-MNIST sample", split, CLASSES, ids, rows.label.to_numpy(), at=at)


def load_fashion_mnist(split: str, path: str | Path | None = None, data_dir: str | Path = "data") -> ImageSet:
    """Fashion-MNIST: 28x28 grey photos of clothes, 10 classes.

    Looked for at ``path`` (if given, nowhere else), in Debian's package, in ``data_dir``; else fetched
    into ``data_dir`` from Debian's archive, or else from the Hugging Face hub.

    Args:
        split: "train" (60,000) or "test" (10,000).
        path: folder with the four idx files, packed (.gz) or not.
        data_dir: folder that holds or gets a fetched copy.

    Raises:
        DataError: a file is truncated or changed, or no place has them; the message names file or places.
    """
    stem = STEMS[_known(split, "Fashion-MNIST")]
    folder = _find(Path(path) if path else None, Path(data_dir) / "fashion-mnist")
    # All four are checked, so that a damaged copy is noticed now and not by a later stage.
    content = {name: _read_idx(folder, name) for name in SHA256}
    photos = np.frombuffer(content[f"{stem}-images-idx3-ubyte"], np.uint8, offset=16).reshape(-1, 28, 28)
    labels = np.frombuffer(content[f"{stem}-labels-idx1-ubyte"], np.uint8, offset=8)
    ids = [f"{split}-{index:05d}" for index in range(len(labels))]

    def at(position: int) -> Example:
        return Example(ids[position], Image.fromarray(photos[position]), int(labels[position]))

    return ImageSet("Fashion-MNIST", split, CLASSES, ids, labels.astype(np.int64), at=at)


def _known(split: str, where: str) -> str:
    if split not in STEMS:
        raise DataError(f"{where} has no split {split!r}: use 'train' or 'test'")
    return split


def _find(path: Path | None, fetched: Path) -> Path:
    """The folder that has the four files; they are fetched if none has."""
    if path is not None:
        if not _has_idx(path):
            raise DataError(f"{path} does not hold the four Fashion-MNIST idx files ({', '.join(SHA256)})")
        return path
    for folder in (DEBIAN_FOLDER, fetched):
        if _has_idx(folder):
            return folder
    failures = []
    for fetch in (fetch_debian, fetch_hub):
        try:
            fetch(fetched)
            return fetched
        except (DataError, OSError) as error:
            failures.append(f"\n- {error}")
    raise DataError(
        f"Fashion-MNIST is in neither {DEBIAN_FOLDER} nor {fetched}, and could not be fetched:{''.join(failures)}\n"
        "Give a path to the four idx files."
    )


def _has_idx(folder: Path) -> bool:
    return all((folder / name).is_file() or (folder / f"{name}.gz").is_file() for name in SHA256)


def _read_idx(folder: Path, name: str) -> bytes:
    """The checked, unpacked bytes of one idx file."""
    file = folder / name if (folder / name).is_file() else folder / f"{name}.gz"
    try:
        content = file.read_bytes()
        if file.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file} is truncated or damaged ({error}): delete it and run again") from error
    if hashlib.sha256(content).hexdigest() != SHA256[name]:
        raise DataError(f"{file} is not Fashion-MNIST's {name} (sha256 differs): delete it and run again")
    return content


@contextmanager
def _fetching(folder: Path) -> Iterator[Path]:
    """A temporary folder; the four files unpacked into its "files" are checked and moved to ``folder``, all or none."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as temporary:
        work = Path(temporary).resolve()
        yield work
        unpacked = work / "files" / UNPACKED
        for name in SHA256:
            _read_idx(unpacked, name)
        # The folder may already hold some of them.
        folder.mkdir(exist_ok=True)
        for file in unpacked.iterdir():
            os.replace(file, folder / file.name)


def fetch_debian(folder: Path) -> None:
    """Fetch the four files from Debian's archive, all or none; DataError if it has them not."""
    with _fetching(folder) as work:
        debian.unpack(DEBIAN_PACKAGE, work)


def fetch_hub(folder: Path, name: str = FASHION_HUB) -> None:
    """Fetch the four files from the Hugging Face hub, all or none; DataError if it has no answer, or another one."""
    from datasets import load_dataset

    with _fetching(folder) as work:
        files = work / "files" / UNPACKED
        files.mkdir(parents=True)
        for split, stem in STEMS.items():
            try:
                rows = load_dataset(name, split=split)
                photos = b"".join(np.asarray(image, np.uint8).tobytes() for image in rows["image"])
                labels = bytes(rows["label"])
            except Exception as error:
                raise DataError(f"hub data set {name}: {type(error).__name__}: {error}") from error
            count, side = len(labels).to_bytes(4, "big"), (28).to_bytes(4, "big")
            (files / f"{stem}-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + count + side + side + photos)
            (files / f"{stem}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + count + labels)
