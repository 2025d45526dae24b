"""What the shipped LLaVAs are trained on: images, what every patch of them shows, and questions with their answers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tokmerge.data import scenes
from tokmerge.data.easy_vqa import load_easy_vqa
from tokmerge.data.image_sets import DataError, ImageSet, flip_and_shift
from tokmerge.data.questions import Question, QuestionSet, by_image, select_questions, split_questions

IGNORE = -100
EASY_VQA_COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
EASY_VQA_SHAPES = ("circle", "rectangle", "triangle")


@dataclass(frozen=True)
class TrainingSet:
    """Images with dense labels and questions."""

    questions: list[list[Question]]  #: of each image
    patch_classes: tuple[int, ...]  #: how many values each of a patch's K labels has
    image_classes: tuple[int, ...]  #: how many values each of an image's G labels has
    #: rows (B,) -> pixels (B, 3, H, W) in [0, 1], augmented at random; patch labels (B, P, K) and image labels (B, G)
    #: int64, `IGNORE` where unknown
    batch: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


def label_easy_vqa(questions: QuestionSet, patch: int) -> TrainingSet:
    """easy-VQA: patches (of ``patch`` pixels a side) of the shape have its shape and colour, all others background."""
    assert questions.image is not None
    groups = by_image(questions.questions)
    pixels = torch.from_numpy(np.stack([np.asarray(questions.image(name)) for name in groups])).permute(0, 3, 1, 2)
    labels = torch.full((len(groups), 2), IGNORE)
    for row, asked in enumerate(groups.values()):
        for question in asked:
            for column, names in enumerate((EASY_VQA_SHAPES, EASY_VQA_COLORS)):
                if question.answers[0] in names:
                    labels[row, column] = names.index(question.answers[0])
                named = [name for name in names if f" {name} " in f" {question.text.rstrip('?')} "]
                if named and question.answer_type == "other":
                    labels[row, column] = names.index(named[0])

    def batch(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        images = flip_and_shift(pixels[rows].float() / 255, 4)
        background = images.flatten(2).median(2).values[..., None, None]
        drawn = ((images - background).abs().amax(1, keepdim=True) > 0.1).float()
        share = F.avg_pool2d(drawn, patch).flatten(1)[..., None]
        # Background is class 0; a patch that the shape hardly touches need not be of any.
        shape = torch.where(labels[rows] == IGNORE, IGNORE, labels[rows] + 1)[:, None]
        return images, torch.where(share > 0.25, shape, torch.where(share > 0, IGNORE, 0)), labels[rows]

    classes = len(EASY_VQA_SHAPES), len(EASY_VQA_COLORS)
    return TrainingSet(list(groups.values()), (classes[0] + 1, classes[1] + 1), classes, batch)


def label_scenes(photos: ImageSet, n: int, seed: int, patch: int) -> TrainingSet:
    """n scenes: patches have their cell's kind and how many there are of it; every batch draws photos anew."""
    made = scenes.draw_scenes(photos, n, seed=seed, split="train")
    pixels = torch.from_numpy(np.stack([np.asarray(example.image, np.uint8) for example in photos.examples()]))
    of_class = [torch.from_numpy(np.flatnonzero(photos.labels == kind)) for kind in range(len(scenes.ITEMS))]
    kinds, blank, cells = torch.from_numpy(made.kinds), len(scenes.ITEMS), scenes.SIDE
    counts = torch.stack([(kinds == kind).sum(1) for kind in range(blank)], 1)
    own = torch.where(kinds < 0, 0, counts.gather(1, kinds.clamp(min=0)))
    labels = torch.stack([torch.where(kinds < 0, blank, kinds), own], 2)
    at = (torch.arange(cells * scenes.PHOTO // patch) * patch + patch // 2) // scenes.PHOTO
    cell_of = (at[:, None] * cells + at).flatten()

    def batch(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        flat = kinds[rows].flatten()
        drawn = torch.zeros(len(flat), scenes.PHOTO, scenes.PHOTO)
        for kind in range(blank):
            here = (flat == kind).nonzero().flatten()
            drawn[here] = pixels[of_class[kind][torch.randint(len(of_class[kind]), (len(here),))]].float() / 255
        tiles = flip_and_shift(drawn[:, None], 2).view(-1, cells, cells, scenes.PHOTO, scenes.PHOTO)
        side = cells * scenes.PHOTO
        canvas = tiles.transpose(2, 3).reshape(-1, 1, side, side).expand(-1, 3, -1, -1)
        return canvas, labels[rows][:, cell_of], counts[rows]

    count_values = cells * cells + 1
    groups = list(by_image(made.questions.questions).values())
    return TrainingSet(groups, (blank + 1, count_values), (count_values,) * blank, batch)


def load_training_set(
    source: str, *, n: int, n_search: int, seed: int, patch: int, **where: Any
) -> tuple[TrainingSet, QuestionSet]:
    """The training set of one embedded data set, and its search questions, whose images are not in it.

    Args:
        source: "easy-vqa", "scenes", or "sample" (scenes from the photos that ship with the package).
        n, n_search: how many scenes to make, and images of the search split.
        seed: of the split and the scenes.
        patch: side of a patch in pixels.
        **where: path and data_dir of the photos.

    Raises:
        DataError: unknown name, or the data cannot be had.
    """
    if source == "easy-vqa":
        everything = load_easy_vqa("train")
        search, rest = split_questions(everything, n_search, seed)
        return label_easy_vqa(select_questions(everything, rest), patch), select_questions(everything, search)
    if source not in ("scenes", "sample"):
        raise DataError(f"no training set {source!r}: use easy-vqa, scenes or sample")
    origin = "fashion-mnist" if source == "scenes" else "sample"
    held_back = scenes.load_scenes("search", n_search, seed=seed, source=origin, **where).questions
    return label_scenes(scenes.scene_photos("train", origin, **where), n, seed, patch), held_back
