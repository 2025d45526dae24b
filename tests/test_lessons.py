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


def test_pool_is_the_mean_of_its_patches():
    x = torch.randn(2, 1 + 16, 3)
    pool = lessons.Pool(1, 2, 4)
    expected = [x[:, :1]]
    for row in (0, 2):
        patches = [1 + 4 * i + j for i in (row, row + 1) for j in range(4)]
        expected.append(x[:, patches].mean(1, keepdim=True))
    torch.testing.assert_close(pool(x), torch.cat(expected, 1))
    assert pool.places(16).tolist() == [0, 8]


def test_every_block_and_layer_is_drawn_and_none_every_fourth_time():
    torch.manual_seed(0)
    pools = [lessons.draw_pool(4) for _ in range(800)]
    drawn = [pool for pool in pools if pool is not None]
    assert abs(len(drawn) / 800 - 0.75) < 0.05
    assert {(pool.rows, pool.columns) for pool in drawn} == set(lessons.BLOCKS)
    assert {pool.layer for pool in drawn} == {1, 2, 3}


def test_pooled_tokens_count_for_all_their_patches(images):
    tower, pool = tiny.tower(), lessons.Pool(1, 2, 4)
    features, kept, summary = lessons.look(tower, images, pool=pool)
    assert kept.tolist() == [pool.places(64).tolist()] * 5
    # In attention a token of size s is s tokens that are alike.
    x = pool(tower.encoder.layers[0](tower.pre_layrnorm(tower.embeddings(images)), None))
    x = torch.cat([x[:, :1], x[:, 1:].repeat_interleave(pool.size, 1)], 1)
    for layer in tower.encoder.layers[1:]:
        before, x = x, layer(x, None)
    torch.testing.assert_close(features, before[:, 1 :: pool.size])
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


@pytest.mark.parametrize("pool", [None, lessons.Pool(1, 2, 2)])
def test_answers_in_one_row_are_the_answers_one_by_one(pool):
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
    features = lessons.look(model.model.vision_tower, pixels, pool=pool)[0]
    together = lessons.answer_loss(model, features, lessons.pack(taught.questions, tokenizer), pool)
    merged = llava.patch(model.eval(), None, positions="first", weights="size", cut="tower")
    losses = []
    for image, own, group in zip(pixels, features, taught.questions, strict=True):
        seen = merged.see(image[None])
        if pool is not None:
            tokens = replace(packed.pack(own[None]), sizes=torch.full((36,), 4.0))
            seen = replace(seen, tokens=tokens, first=pool.places(144))
        for question in group:
            prompt = [embedded.IMAGE] * 144 + tokenizer(question.text)["input_ids"]
            answer = [*tokenizer(question.answers[0])["input_ids"], embedded.END]
            logits = merged(torch.tensor([prompt + answer]), seen)[0][0, -len(answer) - 1 : -1]
            losses.append(F.cross_entropy(logits, torch.tensor(answer), reduction="none"))
    torch.testing.assert_close(together, torch.cat(losses).mean(), atol=1e-4, rtol=1e-4)
