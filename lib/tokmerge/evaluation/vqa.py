"""Visual question answering: the official VQA accuracy, a model's answers to a question set, and its result file.

Accuracy as visualqa.org/evaluation.html describes it and as its reference evaluator (github.com/GT-Vision-Lab/VQA)
computes it, oddities included, so that numbers compare with published ones.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from tokmerge.data.questions import Question, QuestionSet
from tokmerge.io import store
from tokmerge.models.llava import GREEDY, MergedLlava
from tokmerge.models.visual_tokens import LlavaRecord

# What follows a question so that the answer is short (Liu et al., 2310.03744, table 7), and LLaVA-1.5's prompt with it.
SHORT = "Answer the question using a single word or phrase."
LLAVA_TEMPLATE = f"USER: <image>\n{{question}}\n{SHORT} ASSISTANT:"
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
ARTICLES = {"a", "an", "the"}
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBER_WORDS = {"none": "0"} | {word: str(value) for value, word in enumerate(_NUMBERS)}
# The evaluator's list; it also has Id've, I'dve, Im and Ive, which no lower-cased word can match.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
# A contraction is found with any one of its apostrophes missing.
CONTRACTIONS = {
    form[:at] + form[at + 1 :]: form
    for form in _CONTRACTIONS.split()
    for at, letter in enumerate(form)
    if letter == "'"
}
# Turned round in the evaluator's list.
CONTRACTIONS["somebody'd"] = "somebodyd"
# Of `LlavaRecord`, for each question.
TOOK = ("prompt", "generated", "vision_macs", "projector_macs", "prefill_macs", "decode_macs", "macs", "payload_bytes")


def normalise(answer: str) -> str:
    """An answer as the evaluator compares it: no punctuation, lower case, digits, no articles, apostrophes in place.

    >>> normalise("The two dogs, dont they?")
    "2 dogs don't they"
    """
    # With a comma between two digits anywhere, all punctuation goes without leaving a space.
    grouped = re.search(r"\d,\d", answer, re.ASCII) is not None
    text = answer
    for mark in PUNCTUATION:
        # Asked of the answer as it was, so that one mark's fate does not depend on another's.
        apart = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if apart or grouped else " ")
    # Only a period before a digit stays: the evaluator's look-behind for a digit is misspelt and never matches.
    # Its flag re.UNICODE stands where the count belongs, so at most 32 periods go.
    text = re.sub(r"\.(?!\d)", "", text, count=int(re.UNICODE), flags=re.ASCII)
    words = [NUMBER_WORDS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def accuracy(answer: str, truth: Sequence[str]) -> float:
    """Official accuracy of one answer, given the human ones; a single one stands for annotators who all agree.

    For each human annotator left out: min(annotators among the others who gave this answer / 3, 1); their mean.

    Raises:
        ValueError: there are no human answers.

    >>> accuracy("Cat.", ["cat", "cat", "kitten", *["dog"] * 7])
    0.6
    """
    if not truth:
        raise ValueError("a question without answers cannot be scored: submit its result file instead")
    answer, *given = (text.replace("\n", " ").replace("\t", " ").strip() for text in (answer, *truth))
    # Where all agree, nothing is normalised: such answers may be text read off the image
    # (github.com/GT-Vision-Lab/VQA/issues/14).
    if len(set(given)) > 1:
        answer, *given = (normalise(text) for text in (answer, *given))
    if len(given) == 1:
        return float(answer == given[0])
    matches = [text == answer for text in given]
    return sum(min((sum(matches) - match) / 3, 1.0) for match in matches) / len(matches)


class QuestionBatch(NamedTuple):
    """Questions that are asked together.

    Attributes:
        questions: B of them.
        pixels: (images, C, H, W) their different images, as the vision tower takes them.
        rows: (B,) each question's image among those.
        prompts: the tokeniser's input_ids and attention_mask, (B, longest prompt).
    """

    questions: list[Question]
    pixels: Tensor
    rows: Tensor
    prompts: Any


def prompt_template(processor: Any) -> str:
    """The prompt that asks a model for short answers, of its own chat template; LLaVA-1.5's if it brings none."""
    if not getattr(processor, "chat_template", None):
        return LLAVA_TEMPLATE
    said = [{"type": "image"}, {"type": "text", "text": f"QUESTION\n{SHORT}"}]
    text = processor.apply_chat_template([{"role": "user", "content": said}], add_generation_prompt=True)
    return text.replace("{", "{{").replace("}", "}}").replace("QUESTION", "{question}")


def question_batches(processor: Any, questions: QuestionSet, template: str, batch_size: int) -> Iterator[QuestionBatch]:
    """Questions as a model takes them. Neighbouring ones about one image share its pixels."""
    pairs = questions.pairs()
    while batch := list(islice(pairs, batch_size)):
        images = {question.image_id: image for question, image in batch}
        pixels = processor.image_processor(images=list(images.values()), return_tensors="pt")["pixel_values"]
        places = {name: row for row, name in enumerate(images)}
        texts = [template.format(question=question.text) for question, _ in batch]
        prompts = processor.tokenizer(texts, padding=True, return_tensors="pt")
        rows = torch.tensor([places[question.image_id] for question, _ in batch])
        yield QuestionBatch([question for question, _ in batch], pixels, rows, prompts)


@torch.inference_mode()
def answer_batch(
    merged: MergedLlava, processor: Any, batch: QuestionBatch, max_new_tokens: int, normalised: bool = False
) -> tuple[pd.DataFrame, LlavaRecord]:
    """A batch's answers, as `answer_questions` gives them, and the record of how they came about."""
    device = next(merged.parameters()).device
    seen = merged.encode_images(batch.pixels.to(device)).pick(batch.rows.to(device))
    ids, mask = batch.prompts["input_ids"].to(device), batch.prompts["attention_mask"].to(device)
    new, record = merged.generate(ids, seen, mask, max_new_tokens, alike=batch.rows, **GREEDY)
    return tabulate(processor, batch.questions, new, record, normalised), record


def answer_questions(
    merged: MergedLlava, processor: Any, questions: QuestionSet, *, template: str = LLAVA_TEMPLATE,
    batch_size: int = 32, max_new_tokens: int = 16, normalised: bool = False, description: str | None = None,
) -> pd.DataFrame:  # fmt: skip
    """Let a model answer a question set.

    Neighbouring questions about one image share one look at it; each is charged for a look of its own.

    Args:
        merged, processor: what `tokmerge.models.llava.patch` gives, and the model's LlavaProcessor.
        questions: the questions, in order.
        template: prompt with one ``<image>`` and one ``{question}``.
        batch_size: questions per batch.
        max_new_tokens: longest answer.
        normalised: score (and keep) normalised answers, as LLaVA does before it submits; the evaluator itself
            leaves answers alone where all annotators agree, and is then strict about capitals.
        description: shown beside the progress bar; None for no bar.

    Returns:
        One row per question: what `score` says, tokens (visual tokens read), and what is in `TOOK`.
    """
    tables = [score([], [])]
    with tqdm(total=len(questions), desc=description, unit="q", mininterval=2, disable=description is None) as bar:
        for batch in question_batches(processor, questions, template, batch_size):
            tables.append(answer_batch(merged, processor, batch, max_new_tokens, normalised)[0])
            bar.update(len(batch.questions))
    return pd.concat(tables[1:] or tables, ignore_index=True)


def tabulate(
    processor: Any, questions: Sequence[Question], new: Tensor, record: LlavaRecord, normalised: bool = False
) -> pd.DataFrame:
    """What a model answered to B questions and what that took, from what `MergedLlava.generate` gives for them."""
    texts = [processor.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in new]
    answers = [normalise(text) if normalised else text for text in texts]
    took = {"tokens": record.visual} | {name: getattr(record, name) for name in TOOK}
    return score(questions, answers).assign(**{name: value.cpu().numpy() for name, value in took.items()})


def score(questions: Iterable[Question], answers: Iterable[str]) -> pd.DataFrame:
    """One row per question: question_id, image_id, question_type, answer_type, answer, accuracy (NaN: not public)."""
    columns = ["question_id", "image_id", "question_type", "answer_type", "answer", "accuracy"]
    rows = [
        (q.id, q.image_id, q.question_type, q.answer_type, answer, accuracy(answer, q.answers) if q.answers else np.nan)
        for q, answer in zip(questions, answers, strict=True)
    ]
    return pd.DataFrame(rows, columns=columns)


def summarise_answers(table: pd.DataFrame) -> dict[str, float]:
    """What a table of answers says: n_questions, accuracy, ``accuracy.<answer type>``, means of the rest.

    Raises:
        ValueError: an answer could not be scored.
    """
    if len(table) == 0 or table.accuracy.isna().any():
        raise ValueError(f"{int(table.accuracy.isna().sum())} of {len(table)} answers have no score: nothing to sum up")
    by_type = table.groupby("answer_type").accuracy.mean()
    found = {"n_questions": len(table), "accuracy": float(table.accuracy.mean())}
    found |= {f"accuracy.{kind}": float(value) for kind, value in by_type.items()}
    return found | {name: float(table[name].mean()) for name in ("tokens", "macs", "payload_bytes") if name in table}


def save_results(table: pd.DataFrame, path: str | Path) -> None:
    """Write answers as the VQA challenge's server takes them: ``[{"question_id": 42, "answer": "cat"}, ...]``.

    Raises:
        ValueError: a question occurs twice.
    """
    if len(twice := table.question_id[table.question_id.duplicated()]):
        raise ValueError(f"question {twice.iloc[0]} is answered twice")
    pairs = zip(table.question_id.tolist(), table.answer.tolist(), strict=True)
    with store.writing(path) as temporary:
        temporary.write_text(json.dumps([{"question_id": int(q), "answer": answer} for q, answer in pairs]))
