"""A LLaVA and the questions put to it: the shipped pairs, or any model with VQAv2; asked in shards."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from PIL import Image

from tokmerge import answering, codecs, embedded, llava, questions, scenes, store, vqa
from tokmerge.data import DataError
from tokmerge.llava import MergedLlava
from tokmerge.questions import Question, QuestionSet


@dataclass(frozen=True)
class Task:
    """What is asked of what.

    Attributes:
        name: of the model.
        model: transformers' LlavaForConditionalGeneration, ready to evaluate.
        processor: its LlavaProcessor.
        search: questions to choose thresholds on.
        test: questions to report on; no image is on both sides.
        template: the model's prompt.
        photos: how many photos each test image is made of, where that is known.
    """

    name: str
    model: Any
    processor: Any
    search: QuestionSet
    test: QuestionSet
    template: str
    photos: Mapping[str, int] = field(default_factory=dict)


def load(
    name: str, n_search: int, n_test: int | None, *, source: str | None = None, path: str | None = None,
    split: str = "val2014", dtype: str = "auto", seed: int = 0, photos: str = "fashion-mnist",
    data_dir: str | Path = "data",
) -> Task:  # fmt: skip
    """A task by the name of its model.

    Args:
        name: a shipped model, one of `tokmerge.embedded.NAMES`, which brings its own questions; else a local folder or
            a hub name.
        n_search: images of the search split.
        n_test: test images; None for all (a shipped model's test split has 1,000).
        source: questions of a model that does not ship, "vqav2" or "vqav2-hub".
        path: where they lie.
        split: of those; the search images are drawn from it and are no test images.
        dtype: of such a model's weights.
        seed: of that draw.
        photos: what scenes are made of, "fashion-mnist" or "sample".
        data_dir: where a fetched copy is kept.

    Raises:
        DataError: no questions are named, or they cannot be had.
        ValueError: there is no such model.
    """
    device: Any = "cuda" if torch.cuda.is_available() else "cpu"
    if name in embedded.NAMES:
        where: dict[str, Any] = {} if name == "easy-vqa-llava" else {"source": photos, "data_dir": data_dir}
        search, test = answering.splits(name, n_search, n_test or 1000, **where)
        counts: dict[str, int] = {}
        if where:
            made = scenes.load("test", n_test or 1000, seed=embedded.card(name)["params"]["seed"], **where)
            names = dict.fromkeys(question.image_id for question in test.questions)
            counts = dict(zip(names, made.counts.tolist(), strict=True))
        model, processor = embedded.load(name)
        return Task(name, model.to(device), processor, search, test, embedded.TEMPLATE, counts)
    if source is None:
        raise DataError(f"{name} brings no questions: name a source, such as vqav2 with a path")
    everything = questions.load(source, split, path=path, data_dir=data_dir)
    inside, rest = questions.search_split(everything, n_search, seed)
    model, processor = llava.load(name, device, dtype)
    test = questions.subset(everything, rest)
    if n_test is not None:
        test = answering.of_images(test, n_test)
    return Task(Path(name).name, model, processor, questions.subset(everything, inside), test, vqa.TEMPLATE)


def ask(
    merged: MergedLlava, task: Task, folder: Path, about: Mapping[str, Any], *, shard_questions: int,
    part: int = 0, parts: int = 1, **options: Any,
) -> pd.DataFrame:  # fmt: skip
    """Put the test questions to a model, shard by shard; a shard on disk is not asked again.

    Several processes may share the work: each asks every ``parts``-th shard, and the last one to call gets the table.

    Args:
        merged: what answers.
        task: its test questions.
        folder: where shards are kept, one parquet file each.
        about: what else the answers depend on, such as the route.
        shard_questions: questions in a shard.
        part: which of the processes this is, from 0.
        parts: how many there are.
        **options: of `tokmerge.vqa.run`.

    Returns:
        One row per question, as `tokmerge.vqa.run` gives them.

    Raises:
        RuntimeError: shards of other processes are still missing.
    """
    ids = [question.id for question in task.test.questions]
    everything = {**about, "model": task.name, "questions": hashlib.sha256(repr(ids).encode()).hexdigest()}
    everything |= {"shard_questions": shard_questions}
    digest = hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()[:12]
    starts = range(0, len(ids), shard_questions)
    files = [folder / digest / f"{start:07d}.parquet" for start in starts]
    for number, (start, file) in enumerate(zip(starts, files, strict=True)):
        if number % parts == part and not file.exists():
            some = questions.subset(task.test, range(start, min(start + shard_questions, len(ids))))
            store.save_table(vqa.run(merged, task.processor, some, template=task.template, **options), file)
    if missing := [file.name for file in files if not file.exists()]:
        raise RuntimeError(
            f"{len(missing)} of {len(files)} shards are still missing, the first is {missing[0]}: "
            f"wait for the other {parts - 1} parts and run this one again"
        )
    return pd.concat([store.load_table(file) for file in files], ignore_index=True)


def compressed(asked: QuestionSet, format: str, quality: int) -> tuple[QuestionSet, dict[str, int]]:
    """The questions about images that have been through an image codec.

    Returns:
        The questions, and a dictionary that gets each image's bytes as it is looked at.
    """
    sizes: dict[str, int] = {}

    def stream(start: int) -> Iterator[tuple[Question, Image.Image]]:
        seen: tuple[str, Image.Image] | None = None
        for question, image in asked.pairs(start):
            if seen is None or seen[0] != question.image_id:
                payload = codecs.compress(image, format, quality)
                sizes[question.image_id] = len(payload)
                seen = question.image_id, codecs.decompress(payload)
            yield question, seen[1]

    return replace(asked, stream=stream, image=None), sizes
