"""Questions about images behind one schema: a fixed order of (question, image) that can start anywhere."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from tokmerge.data.image_sets import DataError, ascending, open_rgb, pass_over


class Question(NamedTuple):
    """One question; several may be about one image."""

    id: int  #: unique within its set
    image_id: str  #: what it is about
    text: str
    answers: tuple[str, ...]  #: ten human answers, or the only right one; empty where they are not public
    answer_type: str  #: "yes/no", "number" or "other"; empty where the answers are
    question_type: str  #: the data set's own kinds


@dataclass(frozen=True)
class QuestionSet:
    """Questions in a fixed order."""

    name: str  #: what results computed on it must be labelled with
    split: str  #: which part of it
    questions: Sequence[Question]  #: all of them, without images
    stream: Callable[[int], Iterator[tuple[Question, Image.Image]]]  #: questions with RGB images, from a position on
    image: Callable[[str], Image.Image] | None = None  #: one RGB image by its id, where that can be had

    def __len__(self) -> int:
        return len(self.questions)

    def pairs(self, start: int = 0) -> Iterator[tuple[Question, Image.Image]]:
        """Questions with their images, from position ``start`` on; ValueError if that is negative or beyond the end."""
        if not 0 <= start <= len(self):
            raise ValueError(f"cannot start at {start} of {len(self)} questions")
        return self.stream(start)


def with_images(
    name: str, split: str, questions: Sequence[Question], image: Callable[[str], Image.Image]
) -> QuestionSet:
    """A set whose images can be had one by one. Neighbouring questions about one image share it.

    Raises:
        DataError: two questions have the same id.
    """
    if len({question.id for question in questions}) < len(questions):
        raise DataError(f"{name}: question ids are not unique")

    def stream(start: int) -> Iterator[tuple[Question, Image.Image]]:
        last: tuple[str, Image.Image] | None = None
        for question in islice(questions, start, None):
            if last is None or last[0] != question.image_id:
                last = question.image_id, image(question.image_id)
            yield question, last[1]

    return QuestionSet(name, split, questions, stream, image)


def select_questions(questions: QuestionSet, positions: Sequence[int] | np.ndarray) -> QuestionSet:
    """The questions at the given positions (or under a boolean mask), each once, in the set's own order.

    Raises:
        IndexError: a position outside the set.
    """
    chosen = ascending(positions, len(questions))
    picked = [questions.questions[i] for i in chosen]
    if questions.image is not None:
        return with_images(questions.name, questions.split, picked, questions.image)
    return replace(questions, questions=picked, stream=lambda start: pass_over(questions.pairs, chosen[start:]))


def split_questions(questions: QuestionSet, n_images: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut all questions about ``n_images`` images off a training set, as a search split: no image is on both sides.

    Gives sorted positions (search, rest): disjoint, together all. ValueError if the set has no more images.
    """
    owners = np.array([question.image_id for question in questions.questions])
    images = np.unique(owners)
    if not 0 < n_images < len(images):
        raise ValueError(f"a search split of {n_images} images cannot be cut off {len(images)} images")
    inside = np.isin(owners, np.random.default_rng(seed).choice(images, n_images, replace=False))
    return np.flatnonzero(inside), np.flatnonzero(~inside)


def by_image(questions: Sequence[Question]) -> dict[str, list[Question]]:
    """Questions about each image, images in order of appearance."""
    groups: dict[str, list[Question]] = {}
    for question in questions:
        groups.setdefault(question.image_id, []).append(question)
    return groups


def read_json(path: str | Path) -> Any:
    """The content of a JSON file; DataError if it is missing, truncated or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is truncated or damaged ({error}): fetch it again") from error


def open_from(folder: Path, names: dict[str, str]) -> Callable[[str], Image.Image]:
    """A function from image id to RGB image, by each image's file name in a folder.

    Raises:
        DataError: a file is missing (found now, not hours later), or (while reading) cannot be read.
    """
    there = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    missing = sorted(name for name in names.values() if name not in there)
    if missing:
        raise DataError(f"{len(missing)} of {len(names)} images are missing in {folder}, the first is {missing[0]}")
    return lambda identifier: open_rgb(folder / names[identifier], names[identifier])
