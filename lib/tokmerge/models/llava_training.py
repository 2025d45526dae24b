"""Losses of the shipped LLaVAs: what every patch and every image shows, and answers to questions.

Dense labels come first, because they are fast: every patch says which thing it is part of (and of how many of
its kind), the class token what the whole image holds. Then answers are trained, all questions of an image in
one sequence: each sees the image and itself, and is numbered as if it were alone, so the answers are those the
model gives one by one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tokmerge.data.questions import Question
from tokmerge.data.training_sets import IGNORE
from tokmerge.models import tiny_llava


@dataclass(frozen=True)
class Pool:
    """Average pooling of the grid of visual tokens after ``layer`` blocks: rows x columns tokens become one."""

    layer: int
    rows: int
    columns: int

    def __call__(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """Class token and a grid of tokens (B, 1 + H W, D) to those that are left, and their grid."""
        height, width = grid[0] // self.rows, grid[1] // self.columns
        tokens = x[:, 1:].unflatten(1, (height, self.rows, width, self.columns))
        return torch.cat([x[:, :1], tokens.mean((2, 4)).flatten(1, 2)], 1), (height, width)


def sample_pools(depth: int) -> list[Pool]:
    """Up to four random halvings of the grid, early more often than late, in the order of the layers."""
    n = int(torch.randint(5, ()))
    layers = torch.randint(1, depth, (2, n)).amin(0).sort().values.tolist()
    rows = (1 + torch.tensor([0, 0, 1, 1])[torch.randperm(4)[:n]]).tolist()
    return [Pool(layer, row, 3 - row) for layer, row in zip(layers, rows, strict=True)]


def vision_features(
    tower: Any, images: Tensor, keep: float = 1.0, pools: Sequence[Pool] = ()
) -> tuple[Tensor, Tensor, Tensor]:
    """A CLIP tower's last hidden state but one, and its summary of the image.

    Args:
        tower, images: transformers' CLIPVisionModel, and (B, 3, H, W) normalised pixels.
        keep: share of patches that are encoded, drawn at random for every image.
        pools: patches of the whole image become fewer tokens on the way; their sizes count in attention.

    Returns:
        features (B, P', D) without the class token; which patches they are, or begin with, (B, P'); summary (B, D).
    """
    x = tower.embeddings(images)
    n = x.shape[1] - 1
    kept = torch.arange(n).expand(len(x), n)
    if keep < 1:
        patches, kept = sample_tokens(x[:, 1:], round(keep * n))
        x = torch.cat([x[:, :1], patches], 1)
    x, sizes, side = tower.pre_layrnorm(x), None, round(n**0.5)
    grid = (side, side)
    for index, layer in enumerate(tower.encoder.layers):
        for pool in (pool for pool in pools if pool.layer == index):
            x, grid = pool(x, grid)
            height, width = grid
            kept = torch.arange(n).view(side, side)[:: side // height, :: side // width].flatten().expand(len(x), -1)
            sizes = F.pad(x.new_full((height * width,), n / (height * width)).log(), (1, 0))
            sizes = sizes.expand(1, 1, x.shape[1], -1)
        features, x = x, layer(x, sizes)
    return features[:, 1:], kept, tower.post_layernorm(x[:, 0])


def sample_tokens(tokens: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """n of each image's tokens (B, N, D) at random, in their order: (B, n, D), and which they are, (B, n)."""
    kept = torch.rand(tokens.shape[:2]).argsort(1)[:, :n].sort(1).values
    return tokens.gather(1, kept[..., None].expand(-1, -1, tokens.shape[2])), kept


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


def answer_loss(model: Any, features: Tensor, packed: dict[str, Tensor], places: Tensor | None = None) -> Tensor:
    """Mean cross-entropy of a transformers' LLaVA's answers to `pack_questions`'s questions.

    Args:
        model, features: the LlavaForConditionalGeneration, and (B, P, D) of its tower.
        packed: the questions about each image.
        places: (B, P) the first patch of each feature of a pooled image: it is numbered so, and counts for all its
            patches. None: features are numbered as they come.
    """
    visual = model.model.multi_modal_projector(features)
    x = torch.cat([visual, model.get_input_embeddings()(packed["ids"]).to(visual.dtype)], 1)
    batch, n = visual.shape[:2]
    group = F.pad(packed["group"], (n, 0), value=-2)
    vision = model.config.vision_config
    patches = n if places is None else (vision.image_size // vision.patch_size) ** 2
    places = torch.arange(n).expand(batch, n) if places is None else places
    positions = torch.cat([places, patches + packed["offset"]], 1)
    causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    allowed = causal & ((group[:, None, :] == -2) | (group[:, None, :] == group[:, :, None]))
    if n < patches:
        sizes = F.pad(x.new_full((n,), patches / n).log(), (0, x.shape[1] - n))
        allowed = sizes.expand(allowed.shape).masked_fill(~allowed, -torch.inf)
    hidden = model.model.language_model(inputs_embeds=x, attention_mask=allowed[:, None], position_ids=positions)
    answers = packed["target"] != IGNORE
    scores = model.lm_head(hidden.last_hidden_state[:, n:][answers])
    return F.cross_entropy(scores.float(), packed["target"][answers])
