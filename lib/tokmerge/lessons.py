"""What the shipped LLaVAs are taught: images, what every patch of them shows, and questions with their answers.

Dense lessons come first, because they are fast: every patch says which thing it is part of (and of how many of
its kind), the class token what the whole image holds. Then the answers are taught, all questions of an image in
one sequence: each sees the image and itself, and is numbered as if it were alone, so the answers are those the
model gives one by one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tokmerge import data, embedded, scenes
from tokmerge.data import ImageSet
from tokmerge.questions import Question, QuestionSet

IGNORE = -100
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")


@dataclass(frozen=True)
class Lessons:
    """Images and what is to be learnt from them.

    Attributes:
        questions: of each image.
        patch_classes: how many values each of a patch's K labels has.
        image_classes: how many values each of an image's G labels has.
        show: rows (B,) -> pixels (B, 3, H, W) in [0, 1], augmented at random; patch labels (B, P, K) and image
            labels (B, G) int64, `IGNORE` where unknown.
    """

    questions: list[list[Question]]
    patch_classes: tuple[int, ...]
    image_classes: tuple[int, ...]
    show: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


def by_image(questions: Sequence[Question]) -> dict[str, list[Question]]:
    """Questions about each image, images in order of appearance."""
    groups: dict[str, list[Question]] = {}
    for question in questions:
        groups.setdefault(question.image_id, []).append(question)
    return groups


def easy_vqa(questions: QuestionSet, patch: int) -> Lessons:
    """Lessons of easy-VQA: patches of the shape know its shape and colour, all others that they are background.

    Args:
        questions: training questions, images to be had one by one.
        patch: side of a patch in pixels.
    """
    assert questions.image is not None
    groups = by_image(questions.questions)
    stack = np.stack([np.asarray(questions.image(name)) for name in groups])
    pixels = torch.from_numpy(stack).permute(0, 3, 1, 2)
    labels = torch.full((len(groups), 2), IGNORE)
    for row, asked in enumerate(groups.values()):
        for question in asked:
            for column, names in enumerate((SHAPES, COLORS)):
                if question.answers[0] in names:
                    labels[row, column] = names.index(question.answers[0])
                named = [name for name in names if f" {name} " in f" {question.text.rstrip('?')} "]
                if named and question.answer_type == "other":
                    labels[row, column] = names.index(named[0])

    def show(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shown = jitter(pixels[rows].float() / 255, 4)
        plain = shown.flatten(2).median(2).values[..., None, None]
        drawn = ((shown - plain).abs().amax(1, keepdim=True) > 0.1).float()
        share = F.avg_pool2d(drawn, patch).flatten(1)[..., None]
        # Background is class 0; a patch that the shape hardly touches need not say anything.
        said = torch.where(labels[rows] == IGNORE, IGNORE, labels[rows] + 1)[:, None]
        patches = torch.where(share > 0.25, said, torch.where(share > 0, IGNORE, 0))
        return shown, patches, labels[rows]

    return Lessons(list(groups.values()), (len(SHAPES) + 1, len(COLORS) + 1), (len(SHAPES), len(COLORS)), show)


def scenes_of(photos: ImageSet, n: int, seed: int, patch: int) -> Lessons:
    """Lessons of scenes: patches know their cell's kind and how many there are of it; other photos at every look.

    Args:
        photos: the photos of the training split.
        n: scenes.
        seed: of the scenes and questions.
        patch: side of a patch in pixels.
    """
    made = scenes.generate(photos, n, seed=seed, split="train")
    pixels = torch.from_numpy(np.stack([np.asarray(example.image, np.uint8) for example in photos.examples()]))
    of_kind = [torch.from_numpy(np.flatnonzero(photos.labels == kind)) for kind in range(len(scenes.KINDS))]
    kinds, blank, cells = torch.from_numpy(made.kinds), len(scenes.KINDS), scenes.SIDE
    counts = torch.stack([(kinds == kind).sum(1) for kind in range(blank)], 1)
    own = torch.where(kinds < 0, 0, counts.gather(1, kinds.clamp(min=0)))
    labels = torch.stack([torch.where(kinds < 0, blank, kinds), own], 2)
    at = (torch.arange(cells * scenes.PHOTO // patch) * patch + patch // 2) // scenes.PHOTO
    cell_of = (at[:, None] * cells + at).flatten()

    def show(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        flat = kinds[rows].flatten()
        drawn = torch.zeros(len(flat), scenes.PHOTO, scenes.PHOTO)
        for kind in range(blank):
            here = (flat == kind).nonzero().flatten()
            drawn[here] = pixels[of_kind[kind][torch.randint(len(of_kind[kind]), (len(here),))]].float() / 255
        tiles = jitter(drawn[:, None], 2).view(-1, cells, cells, scenes.PHOTO, scenes.PHOTO)
        side = cells * scenes.PHOTO
        canvas = tiles.transpose(2, 3).reshape(-1, 1, side, side).expand(-1, 3, -1, -1)
        return canvas, labels[rows][:, cell_of], counts[rows]

    count_values = cells * cells + 1
    groups = list(by_image(made.questions.questions).values())
    return Lessons(groups, (blank + 1, count_values), (count_values,) * blank, show)


def load(source: str, *, n: int, n_search: int, seed: int, patch: int, **where: Any) -> tuple[Lessons, QuestionSet]:
    """Lessons of one embedded set, and its search questions, whose images are not among them.

    Args:
        source: "easy-vqa", "scenes", or "sample" (scenes from the photos that ship with the package).
        n: how many scenes to make.
        n_search: images of the search split.
        seed: of the split and the scenes.
        patch: side of a patch in pixels.
        **where: path and data_dir of the photos.

    Raises:
        DataError: unknown name, or the data cannot be had.
    """
    from tokmerge import questions

    if source == "easy-vqa":
        everything = questions.easy_vqa("train")
        search, rest = questions.search_split(everything, n_search, seed)
        return easy_vqa(questions.subset(everything, rest), patch), questions.subset(everything, search)
    if source not in ("scenes", "sample"):
        raise data.DataError(f"no lessons on {source!r}: use easy-vqa, scenes or sample")
    origin = "fashion-mnist" if source == "scenes" else "sample"
    held_back = scenes.load("search", n_search, seed=seed, source=origin, **where).questions
    return scenes_of(scenes.photos("train", origin, **where), n, seed, patch), held_back


def jitter(images: Tensor, by: int) -> Tensor:
    """Mirror (B, C, H, W) images at random, and shift them by up to ``by`` pixels; edges are repeated."""
    batch, _, height, width = images.shape
    flipped = torch.where(torch.rand(batch)[:, None, None, None] < 0.5, images.flip(3), images)
    padded = F.pad(flipped, (by, by, by, by), mode="replicate").permute(0, 2, 3, 1)
    rows = torch.randint(0, 2 * by + 1, (batch, 1)) + torch.arange(height)
    columns = torch.randint(0, 2 * by + 1, (batch, 1)) + torch.arange(width)
    return padded[torch.arange(batch)[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Pool:
    """Average pooling of the grid of visual tokens inside the tower.

    Attributes:
        layer: blocks that run before.
        rows, columns: of the tokens that become one.
    """

    layer: int
    rows: int
    columns: int

    def __call__(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """Class token and a grid of tokens (B, 1 + H W, D) to those that are left, and their grid."""
        height, width = grid[0] // self.rows, grid[1] // self.columns
        tokens = x[:, 1:].unflatten(1, (height, self.rows, width, self.columns))
        return torch.cat([x[:, :1], tokens.mean((2, 4)).flatten(1, 2)], 1), (height, width)


def draw_pools(depth: int) -> list[Pool]:
    """Up to four random halvings of the grid, early more often than late, in the order of the layers."""
    n = int(torch.randint(5, ()))
    layers = torch.randint(1, depth, (2, n)).amin(0).sort().values.tolist()
    rows = (1 + torch.tensor([0, 0, 1, 1])[torch.randperm(4)[:n]]).tolist()
    return [Pool(layer, row, 3 - row) for layer, row in zip(layers, rows, strict=True)]


def look(
    tower: Any, images: Tensor, keep: float = 1.0, pools: Sequence[Pool] = ()
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """A CLIP tower's last hidden state but one, and its summary of the image.

    Args:
        tower: transformers' CLIPVisionModel.
        images: (B, 3, H, W) normalised pixels.
        keep: share of patches that are looked at, drawn at random for every image.
        pools: patches of the whole image become fewer tokens on the way; their sizes count in attention.

    Returns:
        features (B, P', D) without the class token; which patches they are, or begin with, (B, P'); summary (B, D).
    """
    x = tower.embeddings(images)
    n = x.shape[1] - 1
    kept = torch.arange(n).expand(len(x), n)
    if keep < 1:
        patches, kept = draw(x[:, 1:], round(keep * n))
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


def draw(tokens: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """n of each image's tokens (B, N, D) at random, in their order: (B, n, D), and which they are, (B, n)."""
    kept = torch.rand(tokens.shape[:2]).argsort(1)[:, :n].sort(1).values
    return tokens.gather(1, kept[..., None].expand(-1, -1, tokens.shape[2])), kept


def label_loss(scores: Tensor, labels: Tensor, classes: Sequence[int]) -> Tensor:
    """Mean cross-entropy of several labels: scores (..., sum of classes), labels (..., len(classes))."""
    parts = zip(scores.float().split(list(classes), -1), labels.unbind(-1), strict=True)
    losses = [F.cross_entropy(s.flatten(0, -2), label.flatten(), ignore_index=IGNORE) for s, label in parts]
    return torch.stack(losses).mean()


def pack(asked: Sequence[Sequence[Question]], tokenizer: Any) -> dict[str, Tensor]:
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
            row["target"] += [IGNORE] * (len(prompt) - 1) + [*answer, embedded.END]
        rows.append(row)
    fill = {"ids": embedded.PAD, "offset": 0, "group": -1, "target": IGNORE}
    longest = max(len(row["ids"]) for row in rows)
    return {
        name: torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in rows])
        for name, value in fill.items()
    }


def answer_loss(model: Any, features: Tensor, packed: dict[str, Tensor], places: Tensor | None = None) -> Tensor:
    """Mean cross-entropy of the answers to `pack`'s questions.

    Args:
        model: transformers' LlavaForConditionalGeneration.
        features: (B, P, D) of its tower.
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
    taught = packed["target"] != IGNORE
    scores = model.lm_head(hidden.last_hidden_state[:, n:][taught])
    return F.cross_entropy(scores.float(), packed["target"][taught])
