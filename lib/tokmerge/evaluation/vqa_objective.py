"""LLaVAs and questions: the shipped pairs, or any model with VQAv2; answered in shards, or measured for a search.

A search measures the official accuracy, compute and bytes, relative to the unmerged model on the same questions,
question by question, as `tokmerge.evaluation.objective` does, whose names the measurements have.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from tokmerge.data import questions, scenes
from tokmerge.data.easy_vqa import load_easy_vqa
from tokmerge.data.image_sets import DataError
from tokmerge.data.questions import Question, QuestionSet
from tokmerge.data.registry import load_questions
from tokmerge.evaluation import image_codecs, vqa, workers
from tokmerge.evaluation.objective import root_of
from tokmerge.evaluation.vqa import QuestionBatch
from tokmerge.evaluation.workers import Done, Run, Shard
from tokmerge.merging.calibration import Calibration
from tokmerge.merging.matching import Policy
from tokmerge.models import llava, tiny_llava
from tokmerge.models.configuration import Configuration, LlavaConfiguration
from tokmerge.models.llava import patch_llava


@dataclass
class QuestionObjective:
    """A LLaVA and questions to put to it: call it with a configuration to get its loss and its price.

    Attributes:
        model, processor: transformers' LlavaForConditionalGeneration and LlavaProcessor.
        questions: the questions, those about one image side by side.
        template, batch_size, max_new_tokens: as of `tokmerge.evaluation.vqa.answer_questions`.
        evaluate: does `part` for every batch, in this process by default; see `spread`.
    """

    model: Any
    processor: Any
    questions: QuestionSet
    template: str = vqa.LLAVA_TEMPLATE
    batch_size: int = 256
    max_new_tokens: int = 4
    evaluate: Run | None = None
    _measured: dict[Configuration, dict[str, float]] = field(default_factory=dict)
    _unmerged: dict[int, tuple[pd.DataFrame, Tensor]] = field(default_factory=dict)

    def __call__(self, configuration: Configuration) -> dict[str, float]:
        """Means over the questions and their standard errors (``<name>_sem``).

        Returns:
            accuracy; score_drop, what it lost against the unmerged model; kl, the divergence KL(unmerged || merged) of
            the first answer token, and its root; macs_ratio, tokens_ratio and bytes_ratio, merged / unmerged;
            n_questions.
        """
        if configuration not in self._measured:
            self._measured[configuration] = summarise_comparison(self.compare(configuration))
        return dict(self._measured[configuration])

    @cached_property
    def batches(self) -> list[QuestionBatch]:
        """The questions as the model takes them."""
        return list(vqa.question_batches(self.processor, self.questions, self.template, self.batch_size))

    @cached_property
    def unmerged(self) -> pd.DataFrame:
        """What the unmerged model does, as `compare` gives it."""
        return self.compare(LlavaConfiguration(None))

    @property
    def about(self) -> dict[str, float]:
        """What measurements depend on: the number of questions, and what the unmerged model does with them."""
        summary = vqa.summarise_answers(self.unmerged)
        return {name: summary[name] for name in ("n_questions", "accuracy", "macs")}

    def compare(self, configuration: Configuration) -> pd.DataFrame:
        """A row per question, as `vqa.answer_questions` gives them, with the columns of `compare_answers`."""
        jobs = {index: (configuration, index) for index in range(len(self.batches))}
        parts = workers.results(self.evaluate or workers.here(self.part), jobs)
        return pd.concat(list(parts.values()), ignore_index=True)

    def part(self, job: tuple[Configuration, int]) -> pd.DataFrame:
        """`compare`'s rows of one batch, named by its place."""
        configuration, index = job
        nothing = LlavaConfiguration(None)
        if index not in self._unmerged:
            self._unmerged[index] = self._answer(nothing, index)
        base = self._unmerged[index]
        return compare_answers(base if configuration == nothing else self._answer(configuration, index), base)

    def _answer(self, configuration: Configuration, index: int) -> tuple[pd.DataFrame, Tensor]:
        """The answers to a batch, and log-probabilities of their first tokens."""
        merged = patch_llava(self.model, configuration)
        table, record = vqa.answer_batch(merged, self.processor, self.batches[index], self.max_new_tokens)
        assert record.scores is not None
        return table, record.scores.double().log_softmax(1).cpu()

    @torch.inference_mode()
    def encode(self, policy: Policy, n_questions: int | None = None) -> None:
        """Put images of the first questions (all by default; whole batches) through a tower, whose policy watches."""
        n_batches = None if n_questions is None else max(1, n_questions // self.batch_size)
        merged = llava.patch(self.model, policy)
        for batch in islice(self.batches, n_batches):
            merged.encode_images(batch.pixels.to(next(merged.parameters()).device))

    def calibrate(self, n_questions: int | None = None) -> Calibration:
        """The similarities that each layer of the tower sees in the images of the first questions."""
        return Calibration.of(partial(self.encode, n_questions=n_questions))

    @property
    def depth(self) -> int:
        """Layers of the tower that are run."""
        return llava.patch(self.model, None).tower.depth


def compare_answers(merged: tuple[pd.DataFrame, Tensor], unmerged: tuple[pd.DataFrame, Tensor]) -> pd.DataFrame:
    """The merged model's answers with what they lost and saved against the unmerged model's, question by question.

    Args:
        merged, unmerged: answers, and (n, vocabulary) log-probabilities of their first tokens.
    """
    (table, log_q), (base, log_p) = merged, unmerged
    return table.assign(
        score_drop=base.accuracy - table.accuracy,
        kl=(log_p.exp() * (log_p - log_q)).sum(1).numpy(),
        macs_ratio=table.macs / base.macs,
        tokens_ratio=table.tokens / base.tokens,
        bytes_ratio=table.payload_bytes / base.payload_bytes,
    )


def summarise_comparison(rows: pd.DataFrame) -> dict[str, float]:
    """Means and standard errors of what `compare_answers` says of every question."""
    measured = {"n_questions": float(len(rows))}
    for name in ("accuracy", "score_drop", "kl", "macs_ratio", "tokens_ratio", "bytes_ratio"):
        measured |= {name: float(rows[name].mean()), f"{name}_sem": float(rows[name].sem())}
    return measured | root_of("kl", measured["kl"], measured["kl_sem"])


def select_images(asked: QuestionSet, n_images: int, skip: int = 0) -> QuestionSet:
    """The questions about so many images, the first ones that are not skipped."""
    wanted = set(list(questions.by_image(asked.questions))[skip : skip + n_images])
    return questions.select_questions(asked, [i for i, q in enumerate(asked.questions) if q.image_id in wanted])


def task_splits(name: str, n_search: int, n_select: int, n_test: int, **where: Any) -> tuple[QuestionSet, ...]:
    """The search, the select and the test questions that belong to a shipped model; its training saw images of none.

    Args:
        name: of the model, one of `tokmerge.models.tiny_llava.TINY_LLAVAS`.
        n_search, n_select, n_test: images of each split.
        **where: source and data_dir of the photos.

    Raises:
        ValueError: more search and select images than the training held back.
    """
    made = tiny_llava.llava_card(name)["params"]
    if name.startswith("scenes"):
        images = {"search": n_search, "select": n_select, "test": n_test}
        return tuple(scenes.load_scenes(split, n, seed=made["seed"], **where).questions for split, n in images.items())
    if n_search + n_select > made["n_search"]:
        raise ValueError(
            f"{n_search} search and {n_select} select images: the training of {name} held {made['n_search']} back"
        )
    everything = load_easy_vqa("train")
    positions, _ = questions.split_questions(everything, made["n_search"], made["seed"])
    held_back = questions.select_questions(everything, positions)
    test = select_images(load_easy_vqa("test"), n_test)
    return select_images(held_back, n_search), select_images(held_back, n_select, skip=n_search), test


@dataclass(frozen=True)
class Task:
    """What is asked of what; called with a shard of the test questions it gives a row per question.

    Attributes:
        name: of the model.
        model, processor: transformers' LlavaForConditionalGeneration, ready to evaluate, and LlavaProcessor.
        search, select, test: questions to measure trials on, to choose points on and to report on; no image is in two.
        options: of `vqa.answer_questions`, the model's prompt among them.
        photos: how many photos each test image is made of, where that is known.
    """

    name: str
    model: Any
    processor: Any
    search: QuestionSet
    select: QuestionSet
    test: QuestionSet
    options: Mapping[str, Any]
    photos: Mapping[str, int] = field(default_factory=dict)

    def answer(self, configuration: Configuration, asked: QuestionSet) -> pd.DataFrame:
        """The model's answers under a configuration."""
        return vqa.answer_questions(patch_llava(self.model, configuration), self.processor, asked, **self.options)

    def __call__(self, shard: Shard) -> pd.DataFrame:
        asked = questions.select_questions(self.test, range(shard.start, shard.stop))
        return self.answer(shard.configuration, asked)


def load_task(
    name: str, n_search: int, n_select: int, n_test: int | None, *, source: str | None = None, path: str | None = None,
    split: str = "val2014", dtype: str = "auto", seed: int = 0, photos: str = "fashion-mnist",
    data_dir: str | Path = "data", **options: Any,
) -> Task:  # fmt: skip
    """A task by the name of its model; for workers, of plain values.

    Args:
        name: a shipped model, one of `tiny_llava.TINY_LLAVAS`, which brings its own questions; else a local folder or
            a hub name.
        n_search, n_select: images of these splits.
        n_test: test images; None for all (a shipped model's test split has 1,000).
        source, path: questions of a model that does not ship, "vqav2" or "vqav2-hub", and where they lie.
        split, seed: of those; search and select images are drawn from it and are no test images.
        dtype: of such a model's weights.
        photos, data_dir: what scenes are made of, "fashion-mnist" or "sample", and where a fetched copy is kept.
        **options: of `vqa.answer_questions`.

    Raises:
        DataError: no questions are named, or they cannot be had.
        ValueError: there is no such model.
    """
    device: Any = "cuda" if torch.cuda.is_available() else "cpu"
    if name in tiny_llava.TINY_LLAVAS:
        where: dict[str, Any] = {"source": photos, "data_dir": data_dir} if name.startswith("scenes") else {}
        search, select, test = task_splits(name, n_search, n_select, n_test or 1000, **where)
        counts: dict[str, int] = {}
        if where:
            made = tiny_llava.llava_card(name)["params"]
            n_photos = scenes.load_scenes("test", n_test or 1000, seed=made["seed"], **where).counts.tolist()
            counts = dict(zip(questions.by_image(test.questions), n_photos, strict=True))
        model, processor = tiny_llava.load_tiny_llava(name)
        options["template"] = tiny_llava.TINY_TEMPLATE
        return Task(name, model.to(device), processor, search, select, test, options, counts)
    if source is None:
        raise DataError(f"{name} brings no questions: name a source, such as vqav2 with a path")
    everything = load_questions(source, split, path=path, data_dir=data_dir)
    held, rest = questions.split_questions(everything, n_search + n_select, seed)
    held_back, test = (questions.select_questions(everything, part) for part in (held, rest))
    search, select = select_images(held_back, n_search), select_images(held_back, n_select, skip=n_search)
    model, processor = llava.load_llava(name, device, dtype)
    if n_test is not None:
        test = select_images(test, n_test)
    options = {"template": vqa.prompt_template(processor), **options}
    return Task(Path(name).name, model, processor, search, select, test, options)


Objectives = Mapping[str, Mapping[str, QuestionObjective]]


def load_objectives(sizes: Mapping[str, tuple[int, int, int | None]], **given: Any) -> Objectives:
    """The objectives of models by name, each on its search, its select and its test questions.

    Args:
        sizes: search, select and test images of every model.
        **given: as of `load_task`.

    Raises:
        ValueError: an image is in two splits.
    """
    found: dict[str, dict[str, QuestionObjective]] = {}
    for name, images in sizes.items():
        task = load_task(name, *images, **given)
        parts = {"search": task.search, "select": task.select, "test": task.test}
        owners = [{(part.split, question.image_id) for question in part.questions} for part in parts.values()]
        if sum(map(len, owners)) != len(set.union(*owners)):
            raise ValueError(f"two splits of {task.test.name} share an image")
        found[name] = {split: QuestionObjective(task.model, task.processor, part, **task.options)
                       for split, part in parts.items()}  # fmt: skip
    return found


def part_of(objectives: Objectives, job: tuple[str, str, Configuration, int]) -> pd.DataFrame:
    """`QuestionObjective.part` of a model and a split."""
    name, split, configuration, index = job
    return objectives[name][split].part((configuration, index))


def load_part_of(sizes: Mapping[str, tuple[int, int, int | None]], **given: Any) -> Callable[[Any], pd.DataFrame]:
    """`part_of` with what `load_objectives` loads; for workers, of plain values."""
    return partial(part_of, load_objectives(sizes, **given))


def spread(objectives: Objectives, run: Run) -> None:
    """Have every batch answered by workers whose work is `load_part_of`'s."""
    for name, splits in objectives.items():
        for split, objective in splits.items():
            objective.evaluate = partial(_run_with, run, (name, split))


def _run_with(run: Run, which: tuple[str, str], jobs: Mapping[Any, Any]) -> Iterator[Done]:
    return run({key: (*which, *job) for key, job in jobs.items()})


def compressed(asked: QuestionSet, format: str, quality: int) -> tuple[QuestionSet, dict[str, int]]:
    """The questions about images that have been through a codec, and each image's bytes once it has been looked at."""
    sizes: dict[str, int] = {}

    def stream(start: int) -> Iterator[tuple[Question, Image.Image]]:
        for name, group in groupby(asked.pairs(start), key=lambda pair: pair[0].image_id):
            about, images = zip(*group, strict=True)
            payload = image_codecs.compress(images[0], format, quality)
            sizes[name], received = len(payload), image_codecs.decompress(payload)
            yield from ((question, received) for question in about)

    return replace(asked, stream=stream, image=None), sizes
