"""Losses of the shipped LLaVAs: what every patch and every image shows, and answers to questions.

Dense labels come first, because they are fast: every patch says which thing it is part of (and of how many of
its kind), the class token what the whole image holds. Then answers are trained, all questions of an image in
one sequence: each sees the image and itself, and is numbered as if it were alone, so the answers are those the
model gives one by one.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tokmerge.data.questions import Question
from tokmerge.data.training_sets import IGNORE
from tokmerge.models import tiny_llava


def vision_features(tower: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """A CLIP tower's last hidden state but one, and its summary of the image.

    Args:
        tower, images: transformers' CLIPVisionModel, and (B, 3, H, W) normalised pixels.

    Returns:
        features (B, P, D) without the class token; summary (B, D).
    """
    seen = tower(images, output_hidden_states=True)
    return seen.hidden_states[-2][:, 1:], seen.pooler_output


def label_loss(scores: Tensor, labels: Tensor, classes: Sequence[int]) -> Tensor:
    """Mean cross-entropy of several labels: scores (..., sum of classes), labels (..., len(classes))."""
    parts = zip(scores.float().split(list(classes), -1), labels.unbind(-1), strict=True)
    losses = [F.cross_entropy(s.flatten(0, -2), label.flatten(), ignore_index=IGNORE) for s, label in parts]
    return torch.stack(losses).mean()


def pack_questions(asked: Sequence[Sequence[Question]], tokenizer: Any) -> dict[str, Tensor]:
    """All questions of each image in one row, with their answers.

    Returns:
        (B, S) int64 tensors: ids; offset, place within its own question; group, number of the question, -1 where
        padded; target, what comes next, `IGNORE` unless it belongs to the answer.
    """
    rows: list[dict[str, list[int]]] = []
    for group in asked:
        row: dict[str, list[int]] = {"ids": [], "offset": [], "group": [], "target": []}
        for number, question in enumerate(group):
            prompt = tokenizer(question.text, add_special_tokens=False)["input_ids"]
            answer = tokenizer(question.answers[0], add_special_tokens=False)["input_ids"]
            n = len(prompt) + len(answer)
            row["ids"] += prompt + answer
            row["offset"] += range(n)
            row["group"] += [number] * n
            row["target"] += [IGNORE] * (len(prompt) - 1) + [*answer, tiny_llava.END]
        rows.append(row)
    fill = {"ids": tiny_llava.PAD, "offset": 0, "group": -1, "target": IGNORE}
    longest = max(len(row["ids"]) for row in rows)
    return {
        name: torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in rows])
        for name, value in fill.items()
    }


def answer_loss(model: Any, features: Tensor, packed: dict[str, Tensor]) -> Tensor:
    """Mean cross-entropy of a transformers' LLaVA's answers to `pack_questions`'s questions.

    Args:
        model, features: the LlavaForConditionalGeneration, and (B, P, D) of its tower.
        packed: the questions about each image.
    """
    visual = model.model.multi_modal_projector(features)
    x = torch.cat([visual, model.get_input_embeddings()(packed["ids"]).to(visual.dtype)], 1)
    batch, n = visual.shape[:2]
    group = F.pad(packed["group"], (n, 0), value=-2)
    positions = torch.cat([torch.arange(n).expand(batch, n), n + packed["offset"]], 1)
    causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    allowed = causal & ((group[:, None, :] == -2) | (group[:, None, :] == group[:, :, None]))
    hidden = model.model.language_model(inputs_embeds=x, attention_mask=allowed[:, None], position_ids=positions)
    answers = packed["target"] != IGNORE
    scores = model.lm_head(hidden.last_hidden_state[:, n:][answers])
    return F.cross_entropy(scores.float(), packed["target"][answers])
