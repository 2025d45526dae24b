import json
import shutil

import datasets
import pytest
from conftest import annotation, save_vqav2
from PIL import Image
from tokmerge.data import questions, vqav2
from tokmerge.data.image_sets import DataError
from tokmerge.data.registry import load_questions
from tokmerge.evaluation import vqa

COLORS = {42: (200, 0, 0), 73: (0, 200, 0), 262148: (0, 0, 200)}
ROWS = [
    (42000, 42, "What color is it?", ["red"] * 9 + ["dark red"], "other", "what color is"),
    (42001, 42, "Is it red?", ["yes"] * 10, "yes/no", "is it"),
    (73000, 73, "How many?", ["2", "two", "2.", *["3"] * 7], "number", "how many"),
    (262148000, 262148, "Where is he?", ["down"] * 5 + ["at table"] * 5, "other", "where is"),
]
QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"


@pytest.fixture
def folder(tmp_path):
    """VQAv2's official files with four questions about three images."""
    photos = {image: Image.new("RGB", (8, 6), color) for image, color in COLORS.items()}
    return save_vqav2(tmp_path, ROWS, photos, [("val2014", "val2014"), ("test-dev2015", "test2015")])


@pytest.fixture
def hub(tmp_path):
    """A local data set with the hub's columns: a validation and a test split, one parquet file each."""
    text, number = datasets.Value("string"), datasets.Value("int64")
    given = [{"answer": text, "answer_confidence": text, "answer_id": number}]
    features = datasets.Features(
        question_type=text, multiple_choice_answer=text, answers=given, image_id=number, answer_type=text,
        question_id=number, question=text, image=datasets.Image(),
    )  # fmt: skip
    for split in ("validation", "testdev"):
        rows = [
            annotation(row, split == "validation")
            | {"question": row[2], "image": Image.new("RGB", (8, 6), COLORS[row[1]])}
            for row in ROWS
        ]
        file = tmp_path / "data" / f"{split}-00000-of-00001.parquet"
        file.parent.mkdir(exist_ok=True)
        datasets.Dataset.from_list(rows, features=features).to_parquet(file)
    return tmp_path


def check(found):
    assert [question.id for question in found.questions] == [row[0] for row in ROWS]
    assert found.questions[0].image_id == "42"
    assert found.questions[2].answers == tuple(ROWS[2][3])
    assert [question.answer_type for question in found.questions] == ["other", "yes/no", "number", "other"]
    assert found.questions[3].question_type == "where is"
    for question, image in found.pairs():
        assert image.mode == "RGB"
        assert image.getpixel((4, 3))[list(COLORS).index(int(question.image_id))] > 150
    assert [question.id for question, _ in found.pairs(2)] == [73000, 262148000]
    table = vqa.score(found.questions, ["red", "yes", "2", "at the table"])
    assert table.accuracy.tolist() == pytest.approx([1.0, 1.0, 0.9, 1.0])
    part = questions.select_questions(found, [3, 1])
    assert [question.id for question, _ in part.pairs()] == [42001, 262148000]
    assert [question.id for question, _ in part.pairs(1)] == [262148000]
    assert list(questions.select_questions(found, []).pairs()) == []


def test_official_files(folder):
    found = load_questions("vqav2", "val2014", path=folder)
    check(found)
    assert (found.name, found.split) == ("VQAv2", "val2014")
    for file in (folder / "val2014").iterdir():
        file.rename(file.with_name(file.name.removeprefix("COCO_val2014_")))
    check(load_questions("vqav2", "val2014", path=folder))  # COCO's newer names


def test_test_questions_have_no_answers(folder, tmp_path):
    found = load_questions("vqav2", "test-dev2015", path=folder)
    assert {question.answers for question in found.questions} == {()}
    assert len(list(found.pairs())) == 4
    table = vqa.score(found.questions, ["a", "b", "c", "d"])
    vqa.save_results(table, tmp_path / "results.json")
    assert json.loads((tmp_path / "results.json").read_text())[3] == {"question_id": 262148000, "answer": "d"}


def edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_what_is_missing_or_does_not_fit_is_named_before_anything_runs(folder):
    def refused(message):
        with pytest.raises(DataError, match=message):
            vqav2.vqav2_folder(folder)

    annotations, asked = folder / "v2_mscoco_val2014_annotations.json", folder / QUESTIONS
    (folder / "val2014" / "COCO_val2014_000000000073.jpg").unlink()
    refused(r"1 of 3 images are missing in .*val2014, the first is 000000000073\.jpg")
    shutil.rmtree(folder / "val2014")
    refused("3 of 3 images are missing")
    edit(annotations, lambda content: content["annotations"][0]["answers"].pop())
    refused("question 262148000 has 9 answers in")
    edit(annotations, lambda content: content["annotations"].pop(0))
    refused(r"question 262148000 of .*questions\.json has no annotation in .*annotations")
    edit(asked, lambda content: content["questions"].pop(3))
    edit(asked, lambda content: content["questions"][1].pop("question"))
    refused(r"not of VQAv2's form \(KeyError\('question'\)")
    for wrong in ("[]", '{"questions": 3}', '{"questions": [{"id": 1}]}'):
        asked.write_text(wrong)
        refused("is not a VQAv2 file")


def test_hub_streaming(hub):
    found = load_questions("vqav2-hub", "validation", path=hub)
    check(found)
    assert found.image is None
    assert found.name == f"hub data {hub.name}"
    first = load_questions("vqav2-hub", "validation[:2]", path=hub)
    ids = [question.id for question in first.questions]
    assert ids == [question.id for question, _ in first.pairs()] == [42000, 42001]
    with pytest.raises(DataError, match=r"use a name such as validation, or validation\[:1000\]"):
        vqav2.vqav2_hub("validation[2:]", str(hub))
    found = vqav2.vqav2_hub("testdev", str(hub))
    assert {(question.answers, question.answer_type) for question in found.questions} == {((), "")}


def test_hub_errors_are_named(hub):
    with pytest.raises(DataError, match="Without network give a local folder"):
        vqav2.vqav2_hub("train", str(hub))
    file = hub / "data" / "validation-00000-of-00001.parquet"
    table = datasets.Dataset.from_parquet(str(file)).remove_columns(["answers", "question_type"])
    other = hub / "other" / "data"
    other.mkdir(parents=True)
    table.to_parquet(other / file.name)
    with pytest.raises(DataError, match="has no columns answers, question_type"):
        vqav2.vqav2_hub("validation", str(hub / "other"))
