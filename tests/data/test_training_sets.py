import numpy as np
import pytest
import torch
from tokmerge.data import image_sets, questions, scenes, training_sets
from tokmerge.data.easy_vqa import load_easy_vqa
from torch.nn import functional as F


@pytest.fixture(scope="module")
def drawings():
    """The first 300 easy-VQA questions' images, labelled."""
    asked = load_easy_vqa("train")
    names = {question.image_id for question in asked.questions[:300]}
    return training_sets.label_easy_vqa(
        questions.select_questions(asked, [i for i, q in enumerate(asked.questions) if q.image_id in names]), 4
    )


def test_easy_vqa_labels_agree_with_the_answers(drawings):
    rows = torch.arange(len(drawings.questions))
    shown, patches, images = drawings.batch(rows)
    assert shown.shape == (len(rows), 3, 64, 64)
    assert patches.shape == (len(rows), 256, 2)
    for row, asked in enumerate(drawings.questions):
        for question in asked:
            answer = question.answers[0]
            if answer in training_sets.EASY_VQA_SHAPES:
                assert images[row, 0] == training_sets.EASY_VQA_SHAPES.index(answer)
            if answer in training_sets.EASY_VQA_COLORS:
                assert images[row, 1] == training_sets.EASY_VQA_COLORS.index(answer)
        # A patch is background, of this very shape, or silent.
        assert set(patches[row, :, 0].tolist()) <= {0, training_sets.IGNORE, int(images[row, 0]) + 1}
        assert (patches[row, :, 0] == 0).sum() > 100


def test_background_patches_are_plain(drawings):
    shown, patches, _ = drawings.batch(torch.arange(8))
    cells = F.unfold(shown, 4, stride=4).transpose(1, 2)
    plain = shown.flatten(2).median(2).values.repeat_interleave(16, 1)[:, None]
    far = (cells - plain).abs().amax(2)
    assert (far[patches[..., 0] == 0] <= 0.1).all()
    assert (far[patches[..., 0] > 0] > 0.1).all()


def test_scene_labels_agree_with_the_pixels_and_the_answers():
    photos = scenes.scene_photos("train", "sample")
    data = training_sets.label_scenes(photos, 12, seed=1, patch=7)
    made = scenes.draw_scenes(photos, 12, seed=1, split="train")
    shown, patches, images = data.batch(torch.arange(12))
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
    assert not torch.equal(shown, data.batch(torch.arange(12))[0]), "other photos in every batch"


def test_search_images_are_not_trained_on():
    data, search = training_sets.load_training_set("sample", n=5, n_search=3, seed=0, patch=7)
    assert len(data.questions) == 5
    assert len({question.image_id for question in search.questions}) == 3
    assert search.split == "search"
    with pytest.raises(image_sets.DataError, match="no training set 'cats'"):
        training_sets.load_training_set("cats", n=1, n_search=1, seed=0, patch=7)
