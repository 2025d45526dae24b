import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from tokmerge.data import easy_vqa, questions
from tokmerge.data.easy_vqa import load_easy_vqa
from tokmerge.data.image_sets import DataError
from tokmerge.data.questions import Question
from tokmerge.data.registry import load_questions


@pytest.fixture
def folder(tmp_path):
    """easy-VQA's layout with three images and five questions."""
    (tmp_path / "test" / "images").mkdir(parents=True)
    for i, color in enumerate(("red", "blue", "teal")):
        Image.new("RGBA", (64, 64), color).save(tmp_path / "test" / "images" / f"{i}.png")
    rows = [
        ["what color is the shape?", "red", 0],
        ["is there a circle?", "no", 0],
        ["what shape is present?", "circle", 1],
        ["what color is the circle?", "blue", 1],
        ["is there not a teal shape?", "no", 2],
    ]
    (tmp_path / "test" / "questions.json").write_text(json.dumps(rows))
    return tmp_path


def test_easy_vqa_from_a_folder(folder):
    found = load_questions("easy-vqa", "test", path=folder)
    assert found.name == "easy-VQA"
    assert found.questions[1] == Question(1, "0", "is there a circle?", ("no",), "yes/no", "yes/no")
    assert found.questions[2] == Question(2, "1", "what shape is present?", ("circle",), "other", "shape")
    assert found.questions[3].question_type == "color"
    pairs = list(found.pairs())
    assert [question for question, _ in pairs] == list(found.questions)
    assert {image.mode for _, image in pairs} == {"RGB"}
    assert pairs[0][1] is pairs[1][1], "an image is read once for neighbouring questions"
    assert pairs[2][1].getpixel((0, 0)) == (0, 0, 255)
    assert [question.id for question, _ in found.pairs(3)] == [3, 4]
    assert found.image("2").getpixel((0, 0)) == (0, 128, 128)
    for start in (-1, 6):
        with pytest.raises(ValueError, match="cannot start"):
            found.pairs(start)


def test_the_real_easy_vqa():
    for split, n, n_images in (("train", 38575, 4000), ("test", 9673, 1000)):
        found = load_easy_vqa(split)
        assert (len(found), len({question.image_id for question in found.questions})) == (n, n_images)
        answers = Counter(question.answers[0] for question in found.questions)
        assert len(answers) == 13
        assert sum(question.answer_type == "yes/no" for question in found.questions) == answers["yes"] + answers["no"]
    question, image = next(found.pairs())
    assert (question.text, question.answers) == ("what is the red shape?", ("triangle",))
    assert image.size == (64, 64)


def test_search_split_shares_no_image(folder):
    found = load_easy_vqa("test", folder)
    search, rest = questions.split_questions(found, 2, seed=0)
    assert sorted([*search, *rest]) == list(range(5))
    images = [{found.questions[i].image_id for i in part} for part in (search, rest)]
    assert len(images[0]) == 2
    assert not images[0] & images[1]
    assert np.array_equal(questions.split_questions(found, 2, seed=0)[0], search)
    for n in (0, 3):
        with pytest.raises(ValueError, match=f"a search split of {n} images cannot be cut off 3"):
            questions.split_questions(found, n, seed=0)


def test_subset_keeps_the_order_and_opens_only_its_own_images(folder):
    found = load_easy_vqa("test", folder)
    part = questions.select_questions(found, [4, 0, 0])
    (folder / "test" / "images" / "1.png").unlink()
    assert [question.id for question, _ in part.pairs()] == [0, 4]
    assert [question.id for question, _ in part.pairs(1)] == [4]
    assert part.image is not None
    with pytest.raises(IndexError):
        questions.select_questions(found, [5])


def test_errors_are_named(folder, monkeypatch):
    def refused(message, split, path=None, source="easy-vqa"):
        with pytest.raises(DataError, match=message):
            list(load_questions(source, split, path=path).pairs())

    refused("unknown question set 'gqa'", "test", source="gqa")
    refused("vqav2 needs a path", "val2014", source="vqav2")
    refused("easy-VQA has no split 'val'", "val", folder)
    refused(r"questions\.json does not exist", "train", folder)
    image, file = folder / "test" / "images" / "1.png", folder / "test" / "questions.json"
    image.unlink()
    refused(r"1 of 3 images are missing in .*images, the first is 1\.png", "test", folder)
    image.write_bytes(b"not a picture")
    refused(r"1\.png cannot be read", "test", folder)
    content = file.read_bytes()
    for wrong in (content[: len(content) // 2], b"\xff\xfe\x00"):
        file.write_bytes(wrong)
        refused(r"questions\.json is truncated or damaged", "test", folder)
    for table in ([["only", "two"]], [["a", "b", "c"]], {"questions": 1}, 3):
        file.write_text(json.dumps(table))
        refused("is not a list of", "test", folder)
    monkeypatch.setattr(easy_vqa, "find_spec", lambda name: None)
    refused("pip install easy-vqa", "test")
    with pytest.raises(DataError, match="ids are not unique"):
        questions.with_images("twice", "test", [Question(0, "0", "is it?", ("no",), "yes/no", "yes/no")] * 2, None)
