"""VQAv2 (Goyal et al., 1612.00837): questions with ten human answers about COCO photos, from files or the hub."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from tokmerge.data.hub import open_hub
from tokmerge.data.image_sets import DataError, open_rgb
from tokmerge.data.questions import Question, QuestionSet, open_from, read_json, with_images

VQAV2_HUB = "lmms-lab/VQAv2"
# Human answers to a question.
ANNOTATORS = 10


def vqav2_folder(folder: str | Path, split: str = "val2014") -> QuestionSet:
    """VQAv2 from a folder that holds its official files (visualqa.org/download.html) and a folder of images.

    Args:
        folder: with v2_OpenEnded_mscoco_val2014_questions.json, v2_mscoco_val2014_annotations.json, and val2014/ with
            images named COCO_val2014_000000000042.jpg or 000000000042.jpg.
        split: "train2014", "val2014", "test-dev2015" or "test2015".

    Raises:
        DataError: a file is missing, truncated or of another form, a question has no annotation or not ten
            answers, an image is missing, or (while reading) cannot be read.
    """
    folder = Path(folder)
    asked, annotated = (folder / f"v2_{part}" for part in (
        f"OpenEnded_mscoco_{split}_questions.json", f"mscoco_{split}_annotations.json"))  # fmt: skip
    rows, answers = _table(asked, "questions"), {}
    # The test questions' answers are not public; test-dev is a part of test, with the same images.
    if not split.startswith("test"):
        answers = {row["question_id"]: row for row in _table(annotated, "annotations")}
        for row in rows:
            if row["question_id"] not in answers:
                raise DataError(f"question {row['question_id']} of {asked} has no annotation in {annotated}")
    questions = [_question(row, answers.get(row["question_id"]), str(annotated if answers else asked)) for row in rows]
    part = split.replace("-dev", "")
    images = folder / part
    there = {file.name for file in images.iterdir()} if images.is_dir() else set()
    names = {}
    for identifier in {question.image_id for question in questions}:
        plain = f"{int(identifier):012d}.jpg"
        named = f"COCO_{part}_{plain}"
        names[identifier] = named if named in there else plain
    return with_images("VQAv2", split, questions, open_from(images, names))


def vqav2_hub(split: str = "validation", name: str = VQAV2_HUB) -> QuestionSet:
    """VQAv2 streamed from the hub (or a local folder of parquet): texts first, images as they are asked for.

    Raises:
        DataError: no access, no such data, a wrong schema, or (while reading) an unreadable image.
    """
    texts = ["question_id", "image_id", "question", "answers", "answer_type", "question_type"]

    def check(features: dict[str, Any]) -> None:
        if missing := {*texts, "image"} - set(features):
            raise DataError(f"data set {name} has no columns {', '.join(sorted(missing))}")

    remedy = "Without network give a local folder as path, or use the official files (source 'vqav2')."
    _, light, rows = open_hub(name, split, texts, check, remedy)
    questions = [_question(row, row if row["answers"] else None, name) for row in light]

    def stream(start: int) -> Iterator[tuple[Question, Image.Image]]:
        for question, row in zip(questions[start:], rows(start), strict=True):
            image = open_rgb(io.BytesIO(row["image"]["bytes"]), f"{question.image_id} of question {question.id}")
            yield question, image

    return QuestionSet("VQAv2" if name == VQAV2_HUB else f"hub data {Path(name).name}", split, questions, stream)


def _question(row: dict[str, Any], annotation: dict[str, Any] | None, where: str) -> Question:
    """A question of VQAv2's form; DataError if it is not, or has not ten answers where they are public."""
    known = annotation or {"answers": [], "answer_type": "", "question_type": ""}
    try:
        answers = tuple(answer["answer"] for answer in known["answers"])
        number, image, text = int(row["question_id"]), str(int(row["image_id"])), row["question"]
        question = Question(number, image, text, answers, known["answer_type"], known["question_type"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{where}: an entry is not of VQAv2's form ({error!r} in {str(row)[:80]})") from error
    if annotation is not None and len(answers) != ANNOTATORS:
        raise DataError(f"question {number} has {len(answers)} answers in {where}, not {ANNOTATORS}")
    return question


def _table(file: Path, key: str) -> list[dict[str, Any]]:
    """The list of entries, each with a question id, under ``key`` of a file's content; DataError if there is none."""
    content = read_json(file)
    table = content.get(key) if isinstance(content, dict) else None
    if not isinstance(table, list) or not all(isinstance(row, dict) and "question_id" in row for row in table):
        raise DataError(f"{file} is not a VQAv2 file: it has no list {key!r} of entries with a question_id")
    return table
