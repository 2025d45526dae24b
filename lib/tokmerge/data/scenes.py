"""Scenes: 1 to 9 Fashion-MNIST photos on a 3x3 canvas, and questions that need some or all of them.

A set is generated from a seed and from photos of its own: scenes of two splits share no photo. Empty
cells are left blank, so scenes differ in how many tokens they deserve.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tokmerge.data import fashion_mnist, image_sets
from tokmerge.data.image_sets import SPLITS, DataError, ImageSet
from tokmerge.data.questions import Question, QuestionSet, with_images

SIDE, PHOTO = 3, 28
# One word each, so that the answers survive the VQA normalisation as they are.
ITEMS = ("tshirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
PLACES = tuple(
    f"{row} {column}" if row + column != "middlemiddle" else "center"
    for row in ("top", "middle", "bottom")
    for column in ("left", "middle", "right")
)
# Kinds in one scene: few, so that counts above one are common.
MOST_KINDS = 4
# Shares of the training photos that only search and only select scenes show (of the few that ship 20 each), and the
# seed: which photos those are never changes.
SEARCH_SHARE, SELECT_SHARE, FEWEST, SPLIT_SEED = 1 / 60, 4 / 60, 20, 0
QUESTIONS_PER_SCENE = 6


@dataclass(frozen=True)
class Scenes:
    """Generated scenes; cells row by row, -1 where they are blank."""

    photos: np.ndarray  #: (n, 9) int64 position in the photo set of what each cell shows
    kinds: np.ndarray  #: (n, 9) int64 index into `ITEMS`
    questions: QuestionSet  #: scene i is the image "<split>-<i>"

    @property
    def counts(self) -> np.ndarray:
        """(n,) photos in each scene."""
        return (self.photos >= 0).sum(1)


def load_scenes(
    split: str, n: int, *, seed: int = 0, source: str = "fashion-mnist", path: str | Path | None = None,
    data_dir: str | Path = "data",
) -> Scenes:  # fmt: skip
    """n scenes of one split: "train", "search" or "select" (photos held out of the training photos), or "test".

    The seed draws scenes and questions; photos are of "fashion-mnist" (path and data_dir as in
    `tokmerge.data.fashion_mnist.load_fashion_mnist`) or "sample" (the 512 that ship with the package).

    Raises:
        DataError: unknown split or source, or the photos cannot be had.
    """
    return draw_scenes(scene_photos(split, source, path=path, data_dir=data_dir), n, seed=seed, split=split)


def scene_photos(split: str, source: str = "fashion-mnist", **where: Any) -> ImageSet:
    """The photos of one split; no photo is in two of them. Arguments and errors as in `load_scenes`."""
    if split not in SPLITS or source not in ("fashion-mnist", "sample"):
        raise DataError(
            f"no scenes of split {split!r} from {source!r}: use {', '.join(SPLITS)} from fashion-mnist or sample"
        )
    half = "test" if split == "test" else "train"
    photos = fashion_mnist.sample(half) if source == "sample" else fashion_mnist.load_fashion_mnist(half, **where)
    if split == "test":
        return photos
    n_search, n_select = (max(FEWEST, round(len(photos) * share)) for share in (SEARCH_SHARE, SELECT_SHARE))
    return image_sets.subset(photos, image_sets.divide(photos.labels, n_search, n_select, SPLIT_SEED)[split])


def draw_scenes(photos: ImageSet, n: int, *, seed: int, split: str) -> Scenes:
    """n scenes from 28x28 grey photos: `QUESTIONS_PER_SCENE` questions each, one right answer to each.

    Raises:
        ValueError: the photos are not labelled in `tokmerge.data.fashion_mnist.CLASSES`, or a class has none.
    """
    if tuple(photos.classes) != tuple(fashion_mnist.CLASSES) or len(np.unique(photos.labels)) < len(ITEMS):
        raise ValueError(f"scenes need Fashion-MNIST photos of all {len(ITEMS)} classes, not {photos.name}")
    pixels = np.stack([np.asarray(example.image, np.uint8) for example in photos.examples()])
    of_class = [np.flatnonzero(photos.labels == kind) for kind in range(len(ITEMS))]
    rng = np.random.default_rng(seed)
    shown, kinds = np.full((n, SIDE * SIDE), -1), np.full((n, SIDE * SIDE), -1)
    questions: list[Question] = []
    for scene in range(n):
        count = int(rng.integers(1, SIDE * SIDE + 1))
        cells = rng.permutation(SIDE * SIDE)[:count]
        palette = rng.choice(len(ITEMS), int(rng.integers(1, MOST_KINDS + 1)), replace=False)
        kinds[scene, cells] = rng.choice(palette, count)
        for cell in cells:
            shown[scene, cell] = rng.choice(of_class[kinds[scene, cell]])
        image_id = f"{split}-{scene:05d}"
        for text, answer, answer_type, question_type in scene_questions(kinds[scene], rng):
            questions.append(Question(len(questions), image_id, text, (answer,), answer_type, question_type))

    def paint(image_id: str) -> Image.Image:
        """The scene's 84x84 RGB canvas."""
        cells = shown[int(image_id.rsplit("-", 1)[1])]
        tiles = np.where((cells >= 0)[:, None, None], pixels[cells], 0)
        canvas = tiles.reshape(SIDE, SIDE, PHOTO, PHOTO).swapaxes(1, 2).reshape(SIDE * PHOTO, SIDE * PHOTO)
        return Image.fromarray(canvas.astype(np.uint8)).convert("RGB")

    return Scenes(shown, kinds, with_images(f"Scenes ({photos.name})", split, questions, paint))


def scene_questions(kinds: np.ndarray, rng: np.random.Generator) -> list[tuple[str, str, str, str]]:
    """Questions about one scene as (text, answer, answer type, question type).

    Kinds are those in each cell, (9,), -1 for blank; not all are blank.
    """
    counts = np.bincount(kinds[kinds >= 0], minlength=len(ITEMS))
    present, absent = np.flatnonzero(counts), np.flatnonzero(counts == 0)
    asked = [
        (f"does any photo show a {ITEMS[rng.choice(kinds)]}?", answer, "yes/no", "existence")
        for kinds, answer in ((present, "yes"), (absent, "no"))
    ]

    counted = rng.choice(present if rng.random() < 0.75 else absent)
    asked.append((f"how many photos show a {ITEMS[counted]}?", str(counts[counted]), "number", "counting"))

    # One cell with a photo, and any other.
    filled = rng.choice(np.flatnonzero(kinds >= 0))
    other = rng.choice(np.flatnonzero(np.arange(len(kinds)) != filled))
    for cell in (filled, other):
        answer = ITEMS[kinds[cell]] if kinds[cell] >= 0 else "nothing"
        asked.append((f"what is in the {PLACES[cell]}?", answer, "other", "position"))

    more = rng.choice(present)
    others = np.setdiff1d(present, [more])
    less = rng.choice(others if len(others) and rng.random() < 0.75 else absent)
    if rng.random() < 0.5:
        more, less = less, more
    answer = "yes" if counts[more] > counts[less] else "no"
    text = f"do more photos show a {ITEMS[more]} than a {ITEMS[less]}?"
    return [*asked, (text, answer, "yes/no", "comparison")]
