"""Data sets by name: images and questions."""

from pathlib import Path

from tokmerge.data import easy_vqa, fashion_mnist, imagenet, photos, scenes, vqav2
from tokmerge.data.image_sets import DataError, ImageSet
from tokmerge.data.questions import QuestionSet

IMAGE_SOURCES = ("sample", "fashion-mnist", "photos", "imagefolder", "folder", "imagenette", "imagenet-1k")
QUESTION_SOURCES = ("scenes", "easy-vqa", "vqav2", "vqav2-hub")


def load_images(
    source: str, split: str = "test", *, path: str | Path | None = None, data_dir: str | Path = "data"
) -> ImageSet:
    """A data set by name.

    Args:
        source: one of `IMAGE_SOURCES`.
        split: "train" or "test" (sample, fashion-mnist), one of `tokmerge.data.image_sets.SPLITS` (photos); a label
            for imagefolder and folder; the hub's split name.
        path: where it lies; required for imagefolder and folder, optional for the others.
        data_dir: where a fetched copy is kept.

    Raises:
        DataError: unknown name, or the data cannot be had.
    """
    if source == "sample":
        return fashion_mnist.sample(split)
    if source == "fashion-mnist":
        return fashion_mnist.load_fashion_mnist(split, path, data_dir)
    if source == "photos":
        return photos.load_photos(split, path, data_dir)
    if source == "folder":
        return imagenet.picture_folder(_given(path, source, "a folder with pictures"), split)
    if source == "imagefolder":
        return imagenet.image_folder(_given(path, source, "a folder with one folder of images per class"), split)
    if source == "imagenette":
        return imagenet.imagenette_hub(split, str(path or imagenet.IMAGENETTE_HUB))
    if source == "imagenet-1k":
        return imagenet.imagenet_hub(split, str(path or imagenet.IMAGENET_HUB))
    raise DataError(f"unknown data set {source!r}: use one of {', '.join(IMAGE_SOURCES)}")


def load_questions(
    source: str, split: str, *, path: str | Path | None = None, data_dir: str | Path = "data", n: int = 1000,
    seed: int = 0,
) -> QuestionSet:  # fmt: skip
    """A question set by name.

    Args:
        source: one of `QUESTION_SOURCES`.
        split: "train" or "test" (easy-vqa), also "search" (scenes); "val2014" and its like (vqav2); the hub's
            split name.
        path: where it lies; required for vqav2 (a folder with the official files and the folder of images),
            optional for the others.
        data_dir: where a fetched copy is kept.
        n, seed: how many scenes to generate, and from which seed.

    Raises:
        DataError: unknown name, or the data cannot be had.
    """
    if source == "scenes":
        return scenes.load_scenes(split, n, seed=seed, path=path, data_dir=data_dir).questions
    if source == "easy-vqa":
        return easy_vqa.load_easy_vqa(split, path)
    if source == "vqav2":
        where = _given(path, source, "a folder with the official questions, annotations and images")
        return vqav2.vqav2_folder(where, split)
    if source == "vqav2-hub":
        return vqav2.vqav2_hub(split, str(path or vqav2.VQAV2_HUB))
    raise DataError(f"unknown question set {source!r}: use one of {', '.join(QUESTION_SOURCES)}")


def _given(path: str | Path | None, source: str, what: str) -> str | Path:
    """The path of a source that needs one."""
    if path is None:
        raise DataError(f"{source} needs a path: {what}")
    return path
