from functools import partial

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from conftest import save_vqav2
from PIL import Image
from tokmerge.data import questions
from tokmerge.data.image_sets import DataError
from tokmerge.data.questions import Question
from tokmerge.evaluation import image_codecs, vqa, vqa_objective, workers
from tokmerge.evaluation.calibrate import thresholds_for_rates
from tokmerge.io.cache import Cache
from tokmerge.merging.policies import Threshold, TopR
from tokmerge.models import llava, tiny_llava
from tokmerge.models.configuration import Configuration, LlavaConfiguration


@pytest.fixture(scope="module")
def objective():
    """The shipped easy-VQA model on the questions about six search images."""
    model, processor = tiny_llava.load_tiny_llava("easy-vqa-llava")
    search, *_ = vqa_objective.task_splits("easy-vqa-llava", 6, 1, 2)
    return vqa_objective.QuestionObjective(model, processor, search, template=tiny_llava.TINY_TEMPLATE, batch_size=32)


def test_no_merging_costs_nothing_and_saves_nothing(objective):
    measured = objective(Configuration(Threshold(1.0)))
    assert [measured[name] for name in ("score_drop", "kl", "macs_ratio", "bytes_ratio")] == [0, 0, 1, 1]
    assert measured["n_questions"] == len(objective.questions)


def test_agrees_with_the_plain_run(objective):
    policy = Threshold(objective.calibrate(32).thresholds([0.5] * objective.depth))
    measured, options = objective(Configuration(policy)), {"template": tiny_llava.TINY_TEMPLATE, "batch_size": 7}
    merged, base = (
        vqa.answer_questions(
            llava.patch(objective.model, choice), objective.processor, objective.questions, max_new_tokens=4, **options
        )
        for choice in (policy, None)
    )
    assert measured["accuracy"] == pytest.approx(merged.accuracy.mean())
    assert measured["macs_ratio"] == pytest.approx((merged.macs / base.macs).mean())
    assert measured["bytes_ratio"] == pytest.approx((merged.payload_bytes / base.payload_bytes).mean())
    assert 0 < measured["macs_ratio"] < 1


def test_thresholds_lose_the_mean_rates_in_the_tower(objective):
    rates = [3.0] + [0.0] * (objective.depth - 1)
    thresholds = thresholds_for_rates(objective.encode, rates)
    table, whole = objective.compare(LlavaConfiguration(thresholds)), objective.unmerged.tokens
    images = [question.image_id for question in objective.questions.questions]
    lost = (whole - table.tokens).groupby(images).first()
    assert lost.mean() == pytest.approx(3, abs=0.5)


def test_compare_by_hand():
    base = pd.DataFrame({"accuracy": [1.0, 1.0], "macs": [10, 20], "tokens": [4, 4], "payload_bytes": [8, 8]})
    less = pd.DataFrame({"accuracy": [1.0, 0.0], "macs": [5, 5], "tokens": [2, 1], "payload_bytes": [4, 2]})
    p, q = torch.tensor([[0.5, 0.5]] * 2).log(), torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log()
    kl = (0.5 * np.log(2) + 0.5 * np.log(2 / 3)) / 2
    hand = {"score_drop": 0.5, "macs_ratio": 0.375, "bytes_ratio": 0.375, "kl": kl, "root_kl": kl**0.5}
    found = vqa_objective.summarise_comparison(vqa_objective.compare_answers((less, q), (base, p)))
    assert {name: found[name] for name in hand} == pytest.approx(hand)


def owners(*parts):
    """The images of each part; none is in two of them."""
    found = [{(part.split, question.image_id) for question in part.questions} for part in parts]
    assert len(set.union(*found)) == sum(map(len, found))
    return found


def test_splits_share_no_image_with_training():
    parts = vqa_objective.task_splits("easy-vqa-llava", 5, 4, 3)
    assert [part.split for part in parts] == ["train", "train", "test"]
    assert [len(images) for images in owners(*parts)] == [5, 4, 3]
    with pytest.raises(ValueError, match="the training of easy-vqa-llava held 400 back"):
        vqa_objective.task_splits("easy-vqa-llava", 300, 101, 1)
    parts = vqa_objective.task_splits("scenes-llava", 5, 4, 3, source="sample")
    assert [part.split for part in parts] == ["search", "select", "test"]
    assert [len(images) for images in owners(*parts)] == [5, 4, 3]


TEXTS = ["is it red", "how many", "what is it", "where is he"]


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A LLaVA of the real class with random weights, and where VQAv2's official files about six photos are."""
    folder = tmp_path_factory.mktemp("paper")
    tiny.llava().save_pretrained(folder / "tiny-llava")
    texts = [vqa.LLAVA_TEMPLATE.format(question=text) for text in TEXTS]
    tiny.processor([*texts, "red yes no two"]).save_pretrained(folder / "tiny-llava")
    asked = [(10 * i + k, i, text, ["red"] * 10, "other", "what") for i in range(6) for k, text in enumerate(TEXTS)]
    rng = np.random.default_rng(0)
    photos = {i: Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)) for i in range(6)}
    return str(folder / "tiny-llava"), {"source": "vqav2", "path": str(save_vqav2(folder / "vqav2", asked, photos))}


def test_a_model_and_vqav2_from_local_folders(given):
    name, where = given
    load = partial(vqa_objective.load_task, name, 1, 1, **where)
    task = load(None)
    assert (task.name, task.test.name) == ("tiny-llava", "VQAv2")
    assert [len(part) for part in (task.search, task.select, task.test)] == [4, 4, 16]
    assert [len(images) for images in owners(task.search, task.select, task.test)] == [1, 1, 4]
    assert not task.model.training
    assert load(3).test.questions == task.test.questions[:12]


@pytest.mark.parametrize(("size", "n_workers"), [(5, 1), (16, 1), (8, 2)])
def test_shards_say_what_one_run_says(given, tmp_path, size, n_workers):
    (name, where), options = given, {"batch_size": 3, "max_new_tokens": 3}
    make = partial(vqa_objective.load_task, name, 1, 1, None, **where, **options)
    task, point = make(), LlavaConfiguration(TopR(5), positions="first", weights="size")
    merged = llava.patch(task.model, TopR(5), positions="first", weights="size")
    whole = vqa.answer_questions(merged, task.processor, task.test, template=vqa.LLAVA_TEMPLATE, **options)
    (table,) = workers.evaluate_in_shards(Cache(tmp_path, {}), [point], 16, size, task, make, n_workers)
    pd.testing.assert_frame_equal(table, whole)


def test_batches_that_others_answer_say_what_this_process_says(given):
    name, where = given[0], {**given[1], "batch_size": 3, "max_new_tokens": 3}
    sizes, point = {name: (1, 1, None)}, LlavaConfiguration(TopR(5), positions="first", weights="size")
    asked = vqa_objective.load_objectives(sizes, **where)
    mine = {split: (objective.compare(point), objective(point)) for split, objective in asked[name].items()}
    others = vqa_objective.load_objectives(sizes, **where)
    load = partial(vqa_objective.load_part_of, sizes, **where)
    with workers.start(partial(vqa_objective.part_of, others), load, n_workers=2) as run:
        vqa_objective.spread(others, run)
        for split, (table, measured) in mine.items():
            pd.testing.assert_frame_equal(others[name][split].compare(point), table)
            assert others[name][split](point) == measured
            assert others[name][split].about == asked[name][split].about


def test_a_model_without_questions_is_named(given):
    name, where = given
    with pytest.raises(DataError, match="tiny-llava brings no questions"):
        vqa_objective.load_task(name, 1, 1, 2)
    with pytest.raises(ValueError, match="no LLaVA model 'nowhere'"):
        vqa_objective.load_task("nowhere", 1, 1, 2, **where)


def test_shipped_models_bring_their_questions():
    task = vqa_objective.load_task("scenes-llava", 3, 2, 2, photos="sample")
    assert (task.search.split, task.select.split, task.test.split) == ("search", "select", "test")
    assert len(task.test) == 12
    assert task.options["template"] == "<image> {question}"
    assert task.model.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    # A photo is 28 x 28 pixels; blank cells are black.
    for question, image in task.test.pairs():
        cells = np.asarray(image)[..., 0].reshape(3, 28, 3, 28).max((1, 3))
        assert task.photos[question.image_id] == (cells > 0).sum()


def test_compressed_images_are_the_codecs():
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
    asked = [Question(k, str(k // 2), "what", ("red",), "other", "what") for k in range(4)]
    found, sizes = vqa_objective.compressed(questions.with_images("toy", "test", asked, lambda name: photo), "jpeg", 10)
    pairs = list(found.pairs())
    expected = image_codecs.compress(photo, "jpeg", 10)
    assert sizes == {"0": len(expected), "1": len(expected)}
    assert [question for question, _ in pairs] == asked
    for _, image in pairs:
        assert np.array_equal(np.asarray(image), np.asarray(image_codecs.decompress(expected)))
    assert [question.id for question, _ in found.pairs(3)] == [3]
