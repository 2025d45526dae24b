import tiny
import torch
from tokmerge.data import scenes
from tokmerge.data.training_sets import IGNORE, load_training_set
from tokmerge.models import llava, llava_training, tiny_llava
from torch.nn import functional as F


def test_features_are_the_towers_own_forward(images):
    tower = tiny.tower()
    features, summary = llava_training.vision_features(tower, images)
    x = tower.pre_layrnorm(tower.embeddings(images))
    for layer in tower.encoder.layers:
        before, x = x, layer(x, None)
    torch.testing.assert_close(features, before[:, 1:])
    torch.testing.assert_close(summary, tower.post_layernorm(x[:, 0]))


def test_label_loss_ignores_the_unknown():
    scores = torch.randn(2, 3, 5)
    labels = torch.tensor([[[0, 1], [1, IGNORE], [0, 2]], [[1, 0], [0, 1], [1, 2]]])
    first = F.cross_entropy(scores[..., :2].flatten(0, 1), labels[..., 0].flatten())
    known = labels[..., 1].flatten() >= 0
    second = F.cross_entropy(scores[..., 2:].flatten(0, 1)[known], labels[..., 1].flatten()[known])
    torch.testing.assert_close(llava_training.label_loss(scores, labels, (2, 3)), (first + second) / 2)


def test_answers_in_one_row_are_the_answers_one_by_one():
    data, _ = load_training_set("sample", n=3, n_search=2, seed=0, patch=7)
    geometry = {**tiny.GEOMETRY, "image_size": 84, "patch_size": 7, "depth": 2}
    answers = [*scenes.ITEMS, *"0123456789", "yes", "no", "nothing"]
    vocabulary = tiny_llava.words([*(q.text for group in data.questions for q in group), *answers])
    model = tiny.spread(tiny_llava.build_tiny_llava(geometry, vocabulary))
    tokenizer = tiny_llava.processor(geometry, vocabulary).tokenizer
    pixels = data.batch(torch.arange(3))[0] * 2 - 1
    features, _ = llava_training.vision_features(model.model.vision_tower, pixels)
    together = llava_training.answer_loss(model, features, llava_training.pack_questions(data.questions, tokenizer))
    merged = llava.patch(model.eval(), None, positions="first", weights="size", cut="tower")
    losses = []
    for image, group in zip(pixels, data.questions, strict=True):
        seen = merged.encode_images(image[None])
        for question in group:
            prompt = [tiny_llava.IMAGE] * 144 + tokenizer(question.text)["input_ids"]
            answer = [*tokenizer(question.answers[0])["input_ids"], tiny_llava.END]
            logits = merged(torch.tensor([prompt + answer]), seen)[0][0, -len(answer) - 1 : -1]
            losses.append(F.cross_entropy(logits, torch.tensor(answer), reduction="none"))
    torch.testing.assert_close(together, torch.cat(losses).mean(), atol=1e-4, rtol=1e-4)
