from collections import Counter

import numpy as np
import pytest
from tokmerge.data import fashion_mnist, image_sets, scenes
from tokmerge.data.image_sets import DataError
from tokmerge.data.registry import load_images, load_questions
from tokmerge.data.scenes import ITEMS, PLACES
from tokmerge.evaluation import vqa


@pytest.fixture(scope="module")
def made():
    return scenes.load_scenes("test", 400, source="sample", seed=3)


def photos_of(split):
    """The photos that a split of the sample may show."""
    photos = load_images("sample", "test" if split == "test" else "train")
    if split != "test":
        search, rest = image_sets.search_split(photos.labels, round(len(photos) / 12), 0)
        photos = image_sets.subset(photos, search if split == "search" else rest)
    return photos


def test_the_canvas_shows_the_photos_and_blanks(made):
    photos = [np.asarray(example.image) for example in photos_of("test").examples()] + [np.zeros((28, 28))]
    for scene in range(20):
        canvas = np.asarray(made.questions.image(f"test-{scene:05d}"))
        rows = [np.hstack([photos[cell] for cell in row]) for row in made.photos[scene].reshape(3, 3)]
        assert np.array_equal(canvas, np.repeat(np.vstack(rows)[..., None], 3, axis=2))


def test_kinds_are_the_photos_labels(made):
    labels = photos_of("test").labels
    filled = made.photos >= 0
    assert np.array_equal(filled, made.kinds >= 0)
    assert np.array_equal(labels[made.photos[filled]], made.kinds[filled])
    assert set(made.counts.tolist()) == set(range(1, 10))


def expected(text, kinds):
    """The answer, from the text of the question and the scene alone."""
    words = text.rstrip("?").split()
    named = [ITEMS[k] for k in kinds if k >= 0]
    if text.startswith("does any photo show a"):
        return "yes" if words[-1] in named else "no"
    if text.startswith("how many photos show a"):
        return str(named.count(words[-1]))
    if text.startswith("what is in the"):
        kind = kinds[PLACES.index(" ".join(words[4:]))]
        return ITEMS[kind] if kind >= 0 else "nothing"
    assert words[:5] == ["do", "more", "photos", "show", "a"]
    return "yes" if named.count(words[5]) > named.count(words[8]) else "no"


def test_every_answer_is_right_and_survives_the_metric(made):
    assert len(made.questions) == 400 * scenes.QUESTIONS_PER_SCENE
    for question in made.questions.questions:
        (answer,) = question.answers
        assert answer == expected(question.text, made.kinds[int(question.image_id.split("-")[1])]), question
        assert vqa.normalise(answer) == answer
        assert vqa.accuracy(answer, question.answers) == 1.0


def test_questions_are_balanced(made):
    kinds = {}
    for question in made.questions.questions:
        kinds.setdefault(question.question_type, Counter())[question.answers[0]] += 1
    assert set(kinds) == {"existence", "counting", "position", "comparison"}
    assert kinds["existence"] == {"yes": 400, "no": 400}
    assert 0.35 < kinds["comparison"]["yes"] / 400 < 0.55
    assert max(kinds["counting"].values()) < 0.4 * 400
    assert 0.15 < kinds["position"]["nothing"] / 800 < 0.35
    assert len(kinds["position"]) == 11
    types = Counter(question.answer_type for question in made.questions.questions)
    assert types == {"yes/no": 1200, "number": 400, "other": 800}


def test_the_seed_decides(made):
    again = scenes.load_scenes("test", 400, source="sample", seed=3)
    assert again.questions.questions == made.questions.questions
    assert np.array_equal(again.photos, made.photos)
    other = scenes.load_scenes("test", 400, source="sample", seed=4)
    assert not np.array_equal(other.photos, made.photos)
    # A longer set begins with the shorter one.
    shorter = scenes.load_scenes("test", 30, source="sample", seed=3)
    assert np.array_equal(shorter.photos, made.photos[:30])


def test_splits_share_no_photo():
    seen = []
    for split in ("train", "search", "test"):
        made, ids = scenes.load_scenes(split, 300, source="sample", seed=1), photos_of(split).ids
        seen += {ids[i] for i in made.photos[made.photos >= 0]}
        assert {question.image_id for question in made.questions.questions[:6]} == {f"{split}-00000"}
    assert len(seen) == len(set(seen))


def test_one_entry_point(monkeypatch):
    monkeypatch.setattr(fashion_mnist, "load_fashion_mnist", lambda split, **_: fashion_mnist.sample(split))
    found = load_questions("scenes", "search", n=5, seed=2)
    assert found.name == "Scenes (Fashion-MNIST sample)"
    assert len(found) == 30
    pairs = list(found.pairs(24))
    assert [question.image_id for question, _ in pairs] == ["search-00004"] * 6
    assert pairs[0][1] is pairs[5][1], "one image for all its questions"


def test_bad_input_is_named():
    with pytest.raises(DataError, match="no scenes of split 'val'"):
        scenes.load_scenes("val", 1, source="sample")
    with pytest.raises(DataError, match="from 'imagenet-1k'"):
        scenes.load_scenes("test", 1, source="imagenet-1k")
    photos = load_images("sample")
    with pytest.raises(ValueError, match="photos of all 10 classes"):
        scenes.draw_scenes(image_sets.subset(photos, photos.labels != 3), 1, seed=0, split="test")
