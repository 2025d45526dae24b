import json
import shutil

import datasets
import pytest
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
ANNOTATIONS = "v2_mscoco_val2014_annotations.json"
QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"


def annotation(row, public=True):
    number, _, _, texts, answer_type, question_type = row
    given = [{"answer": text, "answer_confidence": "yes", "answer_id": i + 1} for i, text in enumerate(texts)]
    known = {"question_type": question_type, "multiple_choice_answer": texts[0], "answers": given,
             "answer_type": answer_type}  # fmt: skip
    return {"question_id": number, "image_id": row[1]} | (known if public else dict.fromkeys(known))


@pytest.fixture
def folder(tmp_path):
    """VQAv2's official files with four questions about three images."""
    asked = [{"image_id": image, "question": text, "question_id": i} for i, image, text, *_ in ROWS]
    for split in ("val2014", "test-dev2015"):
        content = {"info": {"version": "2.0"}, "task_type": "Open-Ended", "data_subtype": split, "questions": asked}
        (tmp_path / f"v2_OpenEnded_mscoco_{split}_questions.json").write_text(json.dumps(content))
    # The official annotations come in an order of their own.
    (tmp_path / ANNOTATIONS).write_text(json.dumps({"annotations": [annotation(row) for row in ROWS[::-1]]}))
    for part in ("val2014", "test2015"):
        (tmp_path / part).mkdir()
        for image, color in COLORS.items():
            Image.new("RGB", (8, 6), color).save(tmp_path / part / f"COCO_{part}_{image:012d}.jpg")
    return tmp_path


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


def test_a_missing_image_is_named_before_anything_runs(folder):
    (folder / "val2014" / "COCO_val2014_000000000073.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of 3 images are missing in .*val2014, the first is 000000000073\.jpg"):
        vqav2.vqav2_folder(folder)
    shutil.rmtree(folder / "val2014")
    with pytest.raises(DataError, match="3 of 3 images are missing"):
        vqav2.vqav2_folder(folder)


def edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_questions_and_annotations_must_fit(folder):
    edit(folder / ANNOTATIONS, lambda content: content["annotations"][0]["answers"].pop())
    with pytest.raises(DataError, match="question 262148000 has 9 answers in"):
        vqav2.vqav2_folder(folder)
    edit(folder / ANNOTATIONS, lambda content: content["annotations"].pop(0))
    with pytest.raises(DataError, match=r"question 262148000 of .*questions\.json has no annotation in .*annotations"):
        vqav2.vqav2_folder(folder)


def test_damaged_files_are_named(folder):
    asked = folder / QUESTIONS
    whole = asked.read_text()
    edit(asked, lambda content: content["questions"][1].pop("question"))
    with pytest.raises(DataError, match=r"not of VQAv2's form \(KeyError\('question'\)"):
        vqav2.vqav2_folder(folder)
    for wrong in ("[]", '{"questions": 3}', '{"questions": [{"id": 1}]}'):
        asked.write_text(wrong)
        with pytest.raises(DataError, match="is not a VQAv2 file"):
            vqav2.vqav2_folder(folder)
    asked.write_text(whole[:-40])
    with pytest.raises(DataError, match=rf"{QUESTIONS} is truncated or damaged"):
        vqav2.vqav2_folder(folder)
    asked.unlink()
    with pytest.raises(DataError, match=rf"{QUESTIONS} does not exist"):
        vqav2.vqav2_folder(folder)


def test_hub_streaming(hub):
    found = load_questions("vqav2-hub", "validation", path=hub)
    check(found)
    assert found.image is None
    assert found.name == f"hub data {hub.name}"
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
