import json

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from PIL import Image
from tokmerge import codecs, llava, questions, tasks, vqa
from tokmerge.data import DataError
from tokmerge.policies import TopR
from tokmerge.questions import Question

TEXTS = ["is it red", "how many", "what is it", "where is he"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A LLaVA of the real class with random weights, and VQAv2's official files about six photos."""
    folder = tmp_path_factory.mktemp("paper")
    tiny.llava().save_pretrained(folder / "tiny-llava")
    texts = [vqa.TEMPLATE.format(question=text) for text in TEXTS]
    tiny.processor([*texts, "red yes no two"]).save_pretrained(folder / "tiny-llava")
    asked = [{"question_id": 10 * i + k, "image_id": i, "question": TEXTS[k]} for i in range(6) for k in range(4)]
    given = [{"answer": "red", "answer_id": n} for n in range(10)]
    known = [{**row, "answers": given, "answer_type": "other", "question_type": "what"} for row in asked]
    data = folder / "vqav2"
    (data / "val2014").mkdir(parents=True)
    head = {"data_subtype": "val2014"}
    (data / "v2_OpenEnded_mscoco_val2014_questions.json").write_text(json.dumps({**head, "questions": asked}))
    (data / "v2_mscoco_val2014_annotations.json").write_text(json.dumps({**head, "annotations": known}))
    rng = np.random.default_rng(0)
    for i in range(6):
        photo = Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8))
        photo.save(data / "val2014" / f"COCO_val2014_{i:012d}.jpg")
    return folder


def load(folder, **options):
    return tasks.load(str(folder / "tiny-llava"), 2, None, source="vqav2", path=str(folder / "vqav2"), **options)


def test_a_model_and_vqav2_from_local_folders(folder):
    task = load(folder)
    assert task.name == "tiny-llava"
    assert task.test.name == "VQAv2"
    assert len(task.search) == 8
    assert len(task.test) == 16
    owners = [{question.image_id for question in part.questions} for part in (task.search, task.test)]
    assert not owners[0] & owners[1]
    assert not task.model.training
    fewer = tasks.load(str(folder / "tiny-llava"), 2, 3, source="vqav2", path=str(folder / "vqav2"))
    assert fewer.test.questions == task.test.questions[:12]


def test_shards_resume_and_say_what_one_run_says(folder, tmp_path, monkeypatch):
    task = load(folder)
    merged = llava.patch(task.model, TopR(5), positions="first", weights="size")
    options = {"batch_size": 3, "max_new_tokens": 3}
    whole = vqa.run(merged, task.processor, task.test, template=task.template, **options)
    for size in (5, 16):
        table = tasks.ask(merged, task, tmp_path, {"route": "a"}, shard_questions=size, **options)
        pd.testing.assert_frame_equal(table, whole)
    asked = []
    run = vqa.run
    monkeypatch.setattr(vqa, "run", lambda *args, **kwargs: (asked.append(len(args[2])), run(*args, **kwargs))[1])
    assert len(tasks.ask(merged, task, tmp_path, {"route": "a"}, shard_questions=5, **options)) == 16
    assert asked == []
    # Another process's shards: each asks its own, the last one to come has all.
    with pytest.raises(RuntimeError, match="2 of 4 shards are still missing, the first is 0000005"):
        tasks.ask(merged, task, tmp_path, {"route": "b"}, shard_questions=5, part=0, parts=2, **options)
    table = tasks.ask(merged, task, tmp_path, {"route": "b"}, shard_questions=5, part=1, parts=2, **options)
    pd.testing.assert_frame_equal(table, whole)
    assert asked == [5, 5, 5, 1]


def test_a_model_without_questions_is_named(folder):
    with pytest.raises(DataError, match="tiny-llava brings no questions"):
        tasks.load(str(folder / "tiny-llava"), 2, 2)
    with pytest.raises(ValueError, match="no LLaVA model 'nowhere'"):
        tasks.load("nowhere", 2, 2, source="vqav2", path=str(folder / "vqav2"))


def test_shipped_models_bring_their_questions():
    task = tasks.load("scenes-llava", 3, 2, photos="sample")
    assert (task.search.split, task.test.split) == ("search", "test")
    assert len(task.test) == 12
    assert task.template == "<image> {question}"
    assert task.model.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    # A photo is 28 x 28 pixels; blank cells are black.
    for question, image in task.test.pairs():
        cells = np.asarray(image)[..., 0].reshape(3, 28, 3, 28).max((1, 3))
        assert task.photos[question.image_id] == (cells > 0).sum()


def test_compressed_images_are_the_codecs():
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
    asked = [Question(k, str(k // 2), "what", ("red",), "other", "what") for k in range(4)]
    found, sizes = tasks.compressed(questions.with_images("toy", "test", asked, lambda name: photo), "jpeg", 10)
    pairs = list(found.pairs())
    expected = codecs.compress(photo, "jpeg", 10)
    assert sizes == {"0": len(expected), "1": len(expected)}
    assert [question for question, _ in pairs] == asked
    for _, image in pairs:
        assert np.array_equal(np.asarray(image), np.asarray(codecs.decompress(expected)))
    assert [question.id for question, _ in found.pairs(3)] == [3]
