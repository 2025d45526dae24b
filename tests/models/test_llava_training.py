from dataclasses import replace

import pytest
import tiny
import torch
from tokmerge.data import scenes
from tokmerge.data.training_sets import IGNORE, load_training_set
from tokmerge.merging import packed
from tokmerge.models import llava, llava_training, tiny_llava
from torch.nn import functional as F


def test_features_are_the_towers_own_forward(images):
    tower = tiny.tower()
    features, kept, summary = llava_training.vision_features(tower, images)
    whole = tower(images, output_hidden_states=True)
    torch.testing.assert_close(features, whole.hidden_states[-2][:, 1:])
    torch.testing.assert_close(summary, whole.pooler_output)
    assert kept.tolist() == [list(range(64))] * 5
    part, kept, _ = llava_training.vision_features(tower, images, keep=0.25)
    assert part.shape[1] == kept.shape[1] == 16
    assert (kept.diff(dim=1) > 0).all()


def test_pool_is_the_mean_of_its_tokens():
    x = torch.randn(2, 1 + 16, 3)
    expected = [x[:, :1]]
    for row in (0, 2):
        patches = [1 + 4 * i + j for i in (row, row + 1) for j in range(4)]
        expected.append(x[:, patches].mean(1, keepdim=True))
    pooled, grid = llava_training.Pool(1, 2, 4)(x, (4, 4))
    torch.testing.assert_close(pooled, torch.cat(expected, 1))
    assert grid == (2, 1)


def test_up_to_four_halvings_are_drawn_at_every_layer():
    torch.manual_seed(0)
    drawn = [llava_training.sample_pools(4) for _ in range(1000)]
    for n in range(5):
        assert abs(sum(len(pools) == n for pools in drawn) / 1000 - 0.2) < 0.05
    layers = [pool.layer for pools in drawn for pool in pools]
    # The earlier of two layers drawn from three.
    for layer, share in ((1, 5 / 9), (2, 3 / 9), (3, 1 / 9)):
        assert abs(layers.count(layer) / len(layers) - share) < 0.05
    for pools in drawn:
        assert [pool.layer for pool in pools] == sorted(pool.layer for pool in pools)
        assert {(pool.rows, pool.columns) for pool in pools} <= {(1, 2), (2, 1)}
        assert max(sum(pool.rows == 2 for pool in pools), sum(pool.columns == 2 for pool in pools)) <= 2


def test_pooled_tokens_count_for_all_their_patches(images):
    tower, pools = tiny.tower(), [llava_training.Pool(0, 1, 2), llava_training.Pool(1, 2, 2)]
    features, kept, summary = llava_training.vision_features(tower, images, pools=pools)
    assert kept.tolist() == [[16 * row + 4 * column for row in range(4) for column in range(2)]] * 5
    # In attention a token of size s is s tokens that are alike.
    x, grid = tower.pre_layrnorm(tower.embeddings(images)), (8, 8)
    for layer, pool in zip(tower.encoder.layers, [*pools, *[None] * len(tower.encoder.layers)], strict=False):
        x, grid = (x, grid) if pool is None else pool(x, grid)
        size = 64 // (grid[0] * grid[1])
        before = x
        x = layer(torch.cat([x[:, :1], x[:, 1:].repeat_interleave(size, 1)], 1), None)
        x = torch.cat([x[:, :1], x[:, 1::size]], 1)
    torch.testing.assert_close(features, before[:, 1:])
    torch.testing.assert_close(summary, tower.post_layernorm(x[:, 0]))


def test_some_tokens_are_sampled_in_order():
    tokens = torch.arange(24.0).view(2, 12, 1)
    some, kept = llava_training.sample_tokens(tokens, 5)
    assert some.shape == (2, 5, 1)
    assert (kept.diff(dim=1) > 0).all()
    assert some[..., 0].tolist() == [[12 * row + i for i in kept[row].tolist()] for row in range(2)]


def test_label_loss_ignores_the_unknown():
    scores = torch.randn(2, 3, 5)
    labels = torch.tensor([[[0, 1], [1, IGNORE], [0, 2]], [[1, 0], [0, 1], [1, 2]]])
    first = F.cross_entropy(scores[..., :2].flatten(0, 1), labels[..., 0].flatten())
    known = labels[..., 1].flatten() >= 0
    second = F.cross_entropy(scores[..., 2:].flatten(0, 1)[known], labels[..., 1].flatten()[known])
    torch.testing.assert_close(llava_training.label_loss(scores, labels, (2, 3)), (first + second) / 2)


@pytest.mark.parametrize("pools", [[], [llava_training.Pool(0, 2, 1), llava_training.Pool(1, 1, 2)]])
def test_answers_in_one_row_are_the_answers_one_by_one(pools):
    data, _ = load_training_set("sample", n=3, n_search=2, seed=0, patch=7)
    geometry = {**tiny.GEOMETRY, "image_size": 84, "patch_size": 7, "depth": 2}
    answers = [*scenes.ITEMS, *"0123456789", "yes", "no", "nothing"]
    vocabulary = tiny_llava.words([*(q.text for group in data.questions for q in group), *answers])
    model = tiny.spread(tiny_llava.build_tiny_llava(geometry, vocabulary))
    tokenizer = tiny_llava.processor(geometry, vocabulary).tokenizer
    pixels = data.batch(torch.arange(3))[0] * 2 - 1
    features, kept, _ = llava_training.vision_features(model.model.vision_tower, pixels, pools=pools)
    together = llava_training.answer_loss(
        model, features, llava_training.pack_questions(data.questions, tokenizer), kept
    )
    merged = llava.patch(model.eval(), None, positions="first", weights="size", cut="tower")
    losses = []
    for image, own, group in zip(pixels, features, data.questions, strict=True):
        seen = merged.encode_images(image[None])
        if pools:
            tokens = replace(packed.pack(own[None]), sizes=torch.full((36,), 4.0))
            seen = replace(seen, tokens=tokens, first=kept[0])
        for question in group:
            prompt = [tiny_llava.IMAGE] * 144 + tokenizer(question.text)["input_ids"]
            answer = [*tokenizer(question.answers[0])["input_ids"], tiny_llava.END]
            logits = merged(torch.tensor([prompt + answer]), seen)[0][0, -len(answer) - 1 : -1]
            losses.append(F.cross_entropy(logits, torch.tensor(answer), reduction="none"))
    torch.testing.assert_close(together, torch.cat(losses).mean(), atol=1e-4, rtol=1e-4)
