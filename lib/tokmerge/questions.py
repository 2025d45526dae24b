"""Questions about images behind one schema: VQAv2 from its files or the hub, easy-VQA, and generated scenes."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from tokmerge.data import DataError, open_rgb

SOURCES = ("scenes", "easy-vqa", "vqav2", "vqav2-hub")


class Question(NamedTuple):
    """One question.

    Attributes:
        id: unique within its set.
        image_id: what it is about; several questions may be about one image.
        text: the question.
        answers: ten human answers, or the only right one; empty where they are not public.
        answer_type: "yes/no", "number" or "other"; empty where the answers are.
        question_type: the data set's own kinds.
    """

    id: int
    image_id: str
    text: str
    answers: tuple[str, ...]
    answer_type: str
    question_type: str


@dataclass(frozen=True)
class QuestionSet:
    """Questions in a fixed order.

    Attributes:
        name: what results computed on it must be labelled with.
        split: which part of it.
        questions: all of them, without images.
        stream: ``stream(start)`` yields (question, RGB image) from that position on.
        image: ``image(image_id)`` is one RGB image, where images can be had one by one.
    """

    name: str
    split: str
    questions: Sequence[Question]
    stream: Callable[[int], Iterator[tuple[Question, Image.Image]]]
    image: Callable[[str], Image.Image] | None = None

    def __len__(self) -> int:
        return len(self.questions)

    def pairs(self, start: int = 0) -> Iterator[tuple[Question, Image.Image]]:
        """Questions with their images in order, from position ``start`` on.

        Raises:
            ValueError: ``start`` is negative or beyond the end.
        """
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


def load(
    source: str,
    split: str,
    *,
    path: str | Path | None = None,
    data_dir: str | Path = "data",
    n: int = 1000,
    seed: int = 0,
) -> QuestionSet:
    """A question set by name.

    Args:
        source: one of `SOURCES`.
        split: "train" or "test" (easy-vqa), also "search" (scenes); "val2014" and its like (vqav2); the hub's
            split name.
        path: where it lies; required for vqav2 (a folder with the official files and the folder of images),
            optional for the others.
        data_dir: where a fetched copy is kept.
        n: how many scenes to generate.
        seed: of the scenes.

    Raises:
        DataError: unknown name, or the data cannot be had.
    """
    if source == "scenes":
        from tokmerge import scenes

        return scenes.load(split, n, seed=seed, path=path, data_dir=data_dir).questions
    if source == "easy-vqa":
        return easy_vqa(split, path)
    if source == "vqav2":
        from tokmerge import vqav2

        if path is None:
            raise DataError("vqav2 needs a path: a folder with the official questions, annotations and images")
        return vqav2.from_folder(path, split)
    if source == "vqav2-hub":
        from tokmerge import vqav2

        return vqav2.from_hub(split, str(path or vqav2.HUB))
    raise DataError(f"unknown question set {source!r}: use one of {', '.join(SOURCES)}")


def subset(questions: QuestionSet, positions: Sequence[int] | np.ndarray) -> QuestionSet:
    """The questions at the given positions, each once, in the set's own order.

    Raises:
        IndexError: a position outside the set.
    """
    chosen: list[int] = np.unique(np.arange(len(questions))[np.asarray(positions, dtype=int)]).tolist()
    picked = [questions.questions[i] for i in chosen]
    if questions.image is not None:
        return with_images(questions.name, questions.split, picked, questions.image)

    def stream(start: int) -> Iterator[tuple[Question, Image.Image]]:
        wanted = set(chosen[start:])
        if wanted:
            first, last = min(wanted), max(wanted)
            for position, pair in enumerate(islice(questions.pairs(first), last - first + 1), first):
                if position in wanted:
                    yield pair

    return replace(questions, questions=picked, stream=stream)


def search_split(questions: QuestionSet, n_images: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut a search split off a training set: no image is on both sides.

    Args:
        questions: the training questions.
        n_images: images of the search split, with all their questions.
        seed: of the draw.

    Returns:
        Sorted positions (search, rest): disjoint, together all.

    Raises:
        ValueError: the set does not have more than ``n_images`` images.
    """
    owners = np.array([question.image_id for question in questions.questions])
    images = np.unique(owners)
    if not 0 < n_images < len(images):
        raise ValueError(f"a search split of {n_images} images cannot be cut off {len(images)} images")
    inside = np.isin(owners, np.random.default_rng(seed).choice(images, n_images, replace=False))
    return np.flatnonzero(inside), np.flatnonzero(~inside)


def easy_vqa(split: str, path: str | Path | None = None) -> QuestionSet:
    """easy-VQA (Victor Zhou, 2019): 64x64 drawings of one shape; 38,575 + 9,673 questions, 13 answers.

    Args:
        split: "train" (4,000 images) or "test" (1,000).
        path: folder that holds train/ and test/; by default the data inside the installed package easy-vqa.

    Raises:
        DataError: the package is not installed, a file is missing, truncated or of another form.
    """
    if split not in ("train", "test"):
        raise DataError(f"easy-VQA has no split {split!r}: use 'train' or 'test'")
    if path is None:
        spec = find_spec("easy_vqa")
        if spec is None or spec.origin is None:
            raise DataError("easy-VQA is not installed: pip install easy-vqa")
        path = Path(spec.origin).parent / "data"
    folder = Path(path) / split
    rows = read_json(folder / "questions.json")
    try:
        table = [(str(text), str(answer), str(int(image))) for text, answer, image in rows]
    except (TypeError, ValueError) as error:
        raise DataError(f"{folder / 'questions.json'} is not a list of [question, answer, image]: {error}") from error
    kinds = {"yes": "yes/no", "no": "yes/no", "circle": "shape", "rectangle": "shape", "triangle": "shape"}
    questions = []
    for index, (text, answer, image) in enumerate(table):
        kind = kinds.get(answer, "color")
        questions.append(Question(index, image, text, (answer,), "yes/no" if kind == "yes/no" else "other", kind))
    names = {question.image_id: f"{question.image_id}.png" for question in questions}
    return with_images("easy-VQA", split, questions, open_from(folder / "images", names))


def read_json(path: str | Path) -> Any:
    """The content of a JSON file.

    Raises:
        DataError: it is missing, truncated or damaged.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is truncated or damaged ({error}): fetch it again") from error


def open_from(folder: Path, names: dict[str, str]) -> Callable[[str], Image.Image]:
    """A function from image id to RGB image.

    Args:
        folder: where the files are.
        names: file name of each image id.

    Raises:
        DataError: a file is missing (found now, not hours later), or (while reading) cannot be read.
    """
    there = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    missing = sorted(name for name in names.values() if name not in there)
    if missing:
        raise DataError(f"{len(missing)} of {len(names)} images are missing in {folder}, the first is {missing[0]}")
    return lambda identifier: open_rgb(folder / names[identifier], names[identifier])
