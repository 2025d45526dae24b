"""What a search over a LLaVA's thresholds evaluates: the official accuracy on questions, compute and bytes.

Everything is relative to the unmerged model on the same questions, question by question, as in
`tokmerge.objective`, whose names the measurements have.
"""

from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from tokmerge import clip, embedded, llava, questions, routes, scenes, vqa
from tokmerge.llava import MergedLlava
from tokmerge.objective import root_of
from tokmerge.policies import Calibration, Observe
from tokmerge.questions import Question, QuestionSet
from tokmerge.spaces import Configuration


@dataclass
class Answering:
    """A model and questions to put to it: call it with a configuration to get its loss and its price.

    Attributes:
        model: transformers' LlavaForConditionalGeneration.
        processor: its LlavaProcessor.
        questions: the questions, those about one image side by side.
        template: prompt with one ``<image>`` and one ``{question}``.
        batch_size: questions per batch.
        max_new_tokens: longest answer.
    """

    model: Any
    processor: Any
    questions: QuestionSet
    template: str = vqa.TEMPLATE
    batch_size: int = 256
    max_new_tokens: int = 4
    _measured: dict[Configuration, dict[str, float]] = field(default_factory=dict)

    def __call__(self, configuration: Configuration) -> dict[str, float]:
        """Means over the questions and their standard errors (``<name>_sem``).

        Returns:
            accuracy; top1_drop, what it lost against the unmerged model; kl, the divergence KL(unmerged || merged) of
            the first answer token, and its root; macs_ratio, tokens_ratio and bytes_ratio, merged / unmerged;
            n_questions.
        """
        if configuration not in self._measured:
            self._measured[configuration] = compare(self.run(routes.take(self.model, configuration)), self.unmerged)
        return dict(self._measured[configuration])

    @cached_property
    def batches(self) -> list[tuple[list[Question], Tensor, Tensor, Any]]:
        """Questions, their different images (B', C, H, W), each question's row among those (B,), and prompts."""
        made, pairs = [], self.questions.pairs()
        while batch := list(islice(pairs, self.batch_size)):
            asked = [question for question, _ in batch]
            texts = [self.template.format(question=question.text) for question in asked]
            prompts = self.processor.tokenizer(texts, padding=True, return_tensors="pt")
            made.append((asked, *vqa.look_at(self.processor, batch), prompts))
        return made

    @cached_property
    def unmerged(self) -> tuple[pd.DataFrame, Tensor]:
        """What the unmerged model does, as `run` gives it."""
        return self.run(llava.patch(self.model, None))

    @property
    def about(self) -> dict[str, float]:
        """What measurements depend on: the number of questions, and what the unmerged model does with them."""
        said = vqa.summarise(self.unmerged[0])
        return {name: said[name] for name in ("n_questions", "accuracy", "macs")}

    def run(self, merged: MergedLlava) -> tuple[pd.DataFrame, Tensor]:
        """One row per question, as `tokmerge.vqa.run` gives them, and log-probabilities of the first answer token."""
        rows, first, device = [], [], next(merged.parameters()).device
        with torch.inference_mode():
            for asked, pixels, picks, prompts in self.batches:
                seen = merged.see(pixels.to(device)).pick(picks.to(device))
                ids, mask = prompts["input_ids"].to(device), prompts["attention_mask"].to(device)
                new, record = merged.generate(ids, seen, mask, self.max_new_tokens)
                assert record.scores is not None
                first.append(record.scores.double().log_softmax(1).cpu())
                rows.append(vqa.tabulate(self.processor, asked, new, record))
        return pd.concat(rows, ignore_index=True), torch.cat(first)

    def calibrate(self, n_questions: int) -> Calibration:
        """The similarities that each layer of the tower sees in the images of the first questions."""
        observer = Observe()
        merged = llava.patch(self.model, observer)
        with torch.inference_mode():
            for _, pixels, _, _ in islice(self.batches, max(1, n_questions // self.batch_size)):
                merged.tower(pixels.to(next(merged.parameters()).device))
        return observer.calibration()

    @property
    def depth(self) -> int:
        """Layers of the tower that are run."""
        return clip.patch(
            self.model.model.vision_tower, None, layer=self.model.config.vision_feature_layer
        ).depth  # fmt: skip


def compare(merged: tuple[pd.DataFrame, Tensor], unmerged: tuple[pd.DataFrame, Tensor]) -> dict[str, float]:
    """Means and standard errors of what a merged model did against the unmerged one, question by question."""
    (table, log_q), (base, log_p) = merged, unmerged
    columns = {
        "accuracy": table.accuracy,
        "top1_drop": base.accuracy - table.accuracy,
        "kl": pd.Series((log_p.exp() * (log_p - log_q)).sum(1).numpy()),
        "macs_ratio": table.macs / base.macs,
        "tokens_ratio": table.tokens / base.tokens,
        "bytes_ratio": table.payload_bytes / base.payload_bytes,
    }
    measured = {"n_questions": float(len(table))}
    for name, values in columns.items():
        measured |= {name: float(values.mean()), f"{name}_sem": float(values.sem())}
    return measured | root_of(measured["kl"], measured["kl_sem"])


def of_images(asked: QuestionSet, n_images: int, skip: int = 0) -> QuestionSet:
    """The questions about so many images, the first ones that are not skipped."""
    names = list(dict.fromkeys(question.image_id for question in asked.questions))[skip : skip + n_images]
    wanted = set(names)
    return questions.subset(asked, [i for i, q in enumerate(asked.questions) if q.image_id in wanted])


def splits(name: str, n_search: int, n_test: int, **where: Any) -> tuple[QuestionSet, QuestionSet]:
    """The search and the test questions that belong to a shipped model; its training saw images of neither.

    Args:
        name: of the model, one of `tokmerge.embedded.NAMES`.
        n_search: images of the search split to use, at most those its training held back.
        n_test: test images.
        **where: path and data_dir of the photos.

    Raises:
        ValueError: more search images than were held back.
    """
    made = embedded.card(name)["params"]
    if n_search > made["n_search"]:
        raise ValueError(f"n_search is {n_search}, but the training of {name} held {made['n_search']} images back")
    if name == "easy-vqa-llava":
        everything = questions.easy_vqa("train")
        held_back, _ = questions.search_split(everything, made["n_search"], made["seed"])
        search, test = questions.subset(everything, held_back), questions.easy_vqa("test")
        return of_images(search, n_search), of_images(test, n_test)
    made_search, made_test = (
        scenes.load(split, n, seed=made["seed"], **where).questions
        for split, n in (("search", n_search), ("test", n_test))
    )
    return made_search, made_test
