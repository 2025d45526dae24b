"""VQAv2 (Goyal et al., 1612.00837): questions with ten human answers about COCO photos, from files or the hub."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from tokmerge.data import DataError, open_rgb
from tokmerge.questions import Question, QuestionSet, open_from, read_json, with_images

HUB = "lmms-lab/VQAv2"
# Human answers to a question.
ANNOTATORS = 10


def from_folder(folder: str | Path, split: str = "val2014") -> QuestionSet:
    """VQAv2 from a folder that holds the official files and a folder of images under their official names.

    Args:
        folder: with v2_OpenEnded_mscoco_val2014_questions.json, v2_mscoco_val2014_annotations.json and val2014/.
        split: "train2014", "val2014", "test-dev2015" or "test2015".

    Raises:
        DataError: as `from_files`.
    """
    folder = Path(folder)
    # The test questions' answers are not public; test-dev is a part of test, with the same images.
    annotations = None if split.startswith("test") else folder / f"v2_mscoco_{split}_annotations.json"
    images = folder / split.replace("-dev", "")
    return from_files(folder / f"v2_OpenEnded_mscoco_{split}_questions.json", annotations, images)


def from_files(questions: str | Path, annotations: str | Path | None, images: str | Path) -> QuestionSet:
    """VQAv2 from its official files (visualqa.org/download.html).

    Args:
        questions: v2_OpenEnded_mscoco_val2014_questions.json, or another split's.
        annotations: v2_mscoco_val2014_annotations.json; None for test questions, whose answers are not public.
        images: folder of COCO images, named COCO_val2014_000000000042.jpg or 000000000042.jpg.

    Raises:
        DataError: a file is missing, truncated or of another form, a question has no annotation or not ten
            answers, an image is missing, or (while reading) cannot be read.
    """
    content = read_json(questions)
    rows, split = _table(content, "questions", questions), content.get("data_subtype", "")
    answers: dict[int, Any] = {}
    if annotations is not None:
        answers = {row["question_id"]: row for row in _table(read_json(annotations), "annotations", annotations)}
        for row in rows:
            if row["question_id"] not in answers:
                raise DataError(f"question {row['question_id']} of {questions} has no annotation in {annotations}")
    parsed = [_question(row, answers.get(row["question_id"]), str(annotations or questions)) for row in rows]
    folder = Path(images)
    there = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    names = {}
    for identifier in {question.image_id for question in parsed}:
        plain = f"{int(identifier):012d}.jpg"
        named = f"COCO_{split.replace('-dev', '')}_{plain}"
        names[identifier] = named if named in there else plain
    return with_images("VQAv2", split, parsed, open_from(folder, names))


def from_hub(split: str = "validation", name: str = HUB) -> QuestionSet:
    """VQAv2 streamed from the Hugging Face hub: texts first, images as they are asked for.

    Args:
        split: the hub's name of the split.
        name: hub name, or a local folder of parquet files with the same columns.

    Raises:
        DataError: no access, no such data, a wrong schema, or (while reading) an unreadable image.
    """
    import datasets

    texts = ["question_id", "image_id", "question", "answers", "answer_type", "question_type"]
    try:
        rows = datasets.load_dataset(name, split=split, streaming=True)
        missing = {*texts, "image"} - set(rows.features or {})
        if missing:
            raise DataError(f"data set {name} has no columns {', '.join(sorted(missing))}")
        # Named to the parquet reader, so that the images stay where they are.
        only_texts = list(datasets.load_dataset(name, split=split, streaming=True, columns=texts))
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"data set {name}, split {split!r}: {type(error).__name__}: {error}\n"
            "Without network give a local folder as path, or use the official files (source 'vqav2')."
        ) from error
    questions = [_question(row, row if row["answers"] else None, name) for row in only_texts]
    encoded = rows.cast_column("image", datasets.Image(decode=False))

    def stream(start: int) -> Iterator[tuple[Question, Image.Image]]:
        for question, row in zip(questions[start:], encoded.skip(start), strict=True):
            image = open_rgb(io.BytesIO(row["image"]["bytes"]), f"{question.image_id} of question {question.id}")
            yield question, image

    return QuestionSet("VQAv2" if name == HUB else f"hub data {Path(name).name}", split, questions, stream)


def _question(row: dict[str, Any], annotation: dict[str, Any] | None, where: str) -> Question:
    kinds = annotation or {"answers": [], "answer_type": "", "question_type": ""}
    try:
        question = Question(
            id=int(row["question_id"]),
            image_id=str(int(row["image_id"])),
            text=row["question"],
            answers=tuple(answer["answer"] for answer in kinds["answers"]),
            answer_type=kinds["answer_type"],
            question_type=kinds["question_type"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{where}: an entry is not of VQAv2's form ({error!r} in {str(row)[:80]})") from error
    if annotation is not None and len(question.answers) != ANNOTATORS:
        raise DataError(f"question {question.id} has {len(question.answers)} answers in {where}, not {ANNOTATORS}")
    return question


def _table(content: Any, key: str, path: str | Path) -> list[dict[str, Any]]:
    """The list of entries, each with a question id, under ``key`` of a file's content."""
    table = content.get(key) if isinstance(content, dict) else None
    if not isinstance(table, list) or not all(isinstance(row, dict) and "question_id" in row for row in table):
        raise DataError(f"{path} is not a VQAv2 file: it has no list {key!r} of entries with a question_id")
    return table
