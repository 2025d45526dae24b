from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from tokmerge import data, embedded, lessons, llava, packed, questions, scenes
from torch.nn import functional as F


@pytest.fixture(scope="module")
def drawings():
    """Lessons of the first 30 easy-VQA images."""
    asked = questions.easy_vqa("train")
    names = {question.image_id for question in asked.questions[:300]}
    return lessons.easy_vqa(
        questions.subset(asked, [i for i, q in enumerate(asked.questions) if q.image_id in names]), 4
    )


def test_easy_vqa_labels_agree_with_the_answers(drawings):
    rows = torch.arange(len(drawings.questions))
    shown, patches, images = drawings.show(rows)
    assert shown.shape == (len(rows), 3, 64, 64)
    assert patches.shape == (len(rows), 256, 2)
    for row, asked in enumerate(drawings.questions):
        for question in asked:
            answer = question.answers[0]
            if answer in lessons.SHAPES:
                assert images[row, 0] == lessons.SHAPES.index(answer)
            if answer in lessons.COLORS:
                assert images[row, 1] == lessons.COLORS.index(answer)
        # A patch is background, of this very shape, or silent.
        assert set(patches[row, :, 0].tolist()) <= {0, lessons.IGNORE, int(images[row, 0]) + 1}
        assert (patches[row, :, 0] == 0).sum() > 100


def test_background_patches_are_plain(drawings):
    shown, patches, _ = drawings.show(torch.arange(8))
    cells = F.unfold(shown, 4, stride=4).transpose(1, 2)
    plain = shown.flatten(2).median(2).values.repeat_interleave(16, 1)[:, None]
    far = (cells - plain).abs().amax(2)
    assert (far[patches[..., 0] == 0] <= 0.1).all()
    assert (far[patches[..., 0] > 0] > 0.1).all()


def test_scene_labels_agree_with_the_pixels_and_the_answers():
    photos = scenes.photos("train", "sample")
    taught = lessons.scenes_of(photos, 12, seed=1, patch=7)
    made = scenes.generate(photos, 12, seed=1, split="train")
    shown, patches, images = taught.show(torch.arange(12))
    grid = patches[..., 0].view(12, 12, 12)
    for scene in range(12):
        for cell in range(9):
            row, column = divmod(cell, 3)
            kind = made.kinds[scene, cell]
            assert (grid[scene, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] == (10 if kind < 0 else kind)).all()
            lit = shown[scene, 0, 28 * row : 28 * row + 28, 28 * column : 28 * column + 28].max() > 0
            assert lit == (kind >= 0)
        counts = np.bincount(made.kinds[scene][made.kinds[scene] >= 0], minlength=10)
        assert images[scene].tolist() == counts.tolist()
        own = [0 if kind == 10 else counts[kind] for kind in patches[scene, :, 0].tolist()]
        assert patches[scene, :, 1].tolist() == own
    assert not torch.equal(shown, taught.show(torch.arange(12))[0]), "other photos at every look"


def test_load_keeps_search_images_out():
    taught, search = lessons.load("sample", n=5, n_search=3, seed=0, patch=7)
    assert len(taught.questions) == 5
    assert len({question.image_id for question in search.questions}) == 3
    assert search.split == "search"
    with pytest.raises(data.DataError, match="no lessons on 'cats'"):
        lessons.load("cats", n=1, n_search=1, seed=0, patch=7)


def test_jitter_shifts_and_mirrors_only():
    torch.manual_seed(0)
    image = torch.zeros(1, 1, 9, 9)
    image[0, 0, 4, 4] = 1
    places = set()
    for _ in range(60):
        moved = lessons.jitter(image, 1)
        assert moved.shape == image.shape
        assert moved.sum() == 1
        places.add(divmod(int(moved.argmax()), 9))
    assert places == {(row, column) for row in (3, 4, 5) for column in (3, 4, 5)}


def test_look_is_the_towers_own_forward(images):
    tower = tiny.tower()
    features, kept, summary = lessons.look(tower, images)
    whole = tower(images, output_hidden_states=True)
    torch.testing.assert_close(features, whole.hidden_states[-2][:, 1:])
    torch.testing.assert_close(summary, whole.pooler_output)
    assert kept.tolist() == [list(range(64))] * 5
    part, kept, _ = lessons.look(tower, images, keep=0.25)
    assert part.shape[1] == kept.shape[1] == 16
    assert (kept.diff(dim=1) > 0).all()


def test_pool_is_the_mean_of_its_tokens():
    x = torch.randn(2, 1 + 16, 3)
    expected = [x[:, :1]]
    for row in (0, 2):
        patches = [1 + 4 * i + j for i in (row, row + 1) for j in range(4)]
        expected.append(x[:, patches].mean(1, keepdim=True))
    pooled, grid = lessons.Pool(1, 2, 4)(x, (4, 4))
    torch.testing.assert_close(pooled, torch.cat(expected, 1))
    assert grid == (2, 1)


def test_up_to_four_halvings_are_drawn_at_every_layer():
    torch.manual_seed(0)
    drawn = [lessons.draw_pools(4) for _ in range(1000)]
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
    tower, pools = tiny.tower(), [lessons.Pool(0, 1, 2), lessons.Pool(1, 2, 2)]
    features, kept, summary = lessons.look(tower, images, pools=pools)
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


def test_draw_takes_some_tokens_in_order():
    tokens = torch.arange(24.0).view(2, 12, 1)
    some, kept = lessons.draw(tokens, 5)
    assert some.shape == (2, 5, 1)
    assert (kept.diff(dim=1) > 0).all()
    assert some[..., 0].tolist() == [[12 * row + i for i in kept[row].tolist()] for row in range(2)]


def test_label_loss_ignores_the_unknown():
    scores = torch.randn(2, 3, 5)
    labels = torch.tensor([[[0, 1], [1, lessons.IGNORE], [0, 2]], [[1, 0], [0, 1], [1, 2]]])
    first = F.cross_entropy(scores[..., :2].flatten(0, 1), labels[..., 0].flatten())
    known = labels[..., 1].flatten() >= 0
    second = F.cross_entropy(scores[..., 2:].flatten(0, 1)[known], labels[..., 1].flatten()[known])
    torch.testing.assert_close(lessons.label_loss(scores, labels, (2, 3)), (first + second) / 2)


@pytest.mark.parametrize("pools", [[], [lessons.Pool(0, 2, 1), lessons.Pool(1, 1, 2)]])
def test_answers_in_one_row_are_the_answers_one_by_one(pools):
    taught, _ = lessons.load("sample", n=3, n_search=2, seed=0, patch=7)
    geometry = {
        "image_size": 84, "patch_size": 7, "width": 24, "depth": 2, "heads": 2, "text_width": 16, "text_depth": 2,
        "text_heads": 2,
    }  # fmt: skip
    vocabulary = embedded.words([q.text for group in taught.questions for q in group] + [str(i) for i in range(10)])
    vocabulary = sorted({*vocabulary, *scenes.KINDS, "yes", "no", "nothing"})
    model = tiny.spread(embedded.build(geometry, vocabulary))
    tokenizer = embedded.processor(geometry, vocabulary).tokenizer
    pixels = taught.show(torch.arange(3))[0] * 2 - 1
    features, kept, _ = lessons.look(model.model.vision_tower, pixels, pools=pools)
    together = lessons.answer_loss(model, features, lessons.pack(taught.questions, tokenizer), kept)
    merged = llava.patch(model.eval(), None, positions="first", weights="size", cut="tower")
    losses = []
    for image, own, group in zip(pixels, features, taught.questions, strict=True):
        seen = merged.see(image[None])
        if pools:
            tokens = replace(packed.pack(own[None]), sizes=torch.full((36,), 4.0))
            seen = replace(seen, tokens=tokens, first=kept[0])
        for question in group:
            prompt = [embedded.IMAGE] * 144 + tokenizer(question.text)["input_ids"]
            answer = [*tokenizer(question.answers[0])["input_ids"], embedded.END]
            logits = merged(torch.tensor([prompt + answer]), seen)[0][0, -len(answer) - 1 : -1]
            losses.append(F.cross_entropy(logits, torch.tensor(answer), reduction="none"))
    torch.testing.assert_close(together, torch.cat(losses).mean(), atol=1e-4, rtol=1e-4)
