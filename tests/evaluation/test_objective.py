"""Objectives by hand; shards on the paper profile's path: a checkpoint of a real timm model, images in folders."""

from functools import partial

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import timm
import tokmerge
import torch
from conftest import build, save_inputs
from PIL import Image
from tokmerge import wire
from tokmerge.data import image_sets
from tokmerge.data.imagenet import image_folder
from tokmerge.evaluation import objective, outcomes, workers
from tokmerge.evaluation.objective import Objective
from tokmerge.evaluation.outcomes import Outcome
from tokmerge.io.cache import Cache
from tokmerge.merging.policies import Threshold, TopR
from tokmerge.models import zoo
from tokmerge.models.configuration import Configuration

NAME = "deit_small_patch16_224"
CONFIGURATIONS = [Configuration(None), Configuration(tokmerge.TopR(12))]


@pytest.fixture
def measured(batch):
    return Objective(build(), batch, batch_size=2)


def outcome(logits, macs, tokens, size):
    labels, counts = torch.tensor([0, 1]), torch.tensor([[9, t] for t in tokens])
    return Outcome(["0", "1"], labels, torch.tensor(logits), counts, torch.tensor(macs), torch.tensor(size))


def test_compare_by_hand():
    unmerged = outcome([[np.log(3.0), 0.0], [0.0, 0.0]], [100, 100], [8, 8], [50, 50])
    merged = outcome([[0.0, 0.0], [np.log(3.0), 0.0]], [50, 70], [4, 2], [25, 10])
    found = objective.compare_outcomes(merged, unmerged)
    kl = np.array([0.75 * np.log(1.5) + 0.25 * np.log(0.5), 0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25)])
    loss = np.array([np.log(2), np.log(4)])
    rise = loss - [np.log(4 / 3), np.log(2)]
    assert found["n_images"] == 2
    for name, values in {
        "kl": kl,
        "loss": loss,
        "loss_rise": rise,
        # Of two equal logits the first counts as the prediction.
        "score": np.array([1, 0]),
        "score_drop": np.array([0, 0]),
        "disagreement": np.array([0, 0]),
        # The unmerged model prefers its first class by a half, and by nothing.
        "margin_kl": kl * np.array([0.5, 1.0]) / 0.75,
        "macs_ratio": np.array([0.5, 0.7]),
        "tokens_ratio": np.array([0.5, 0.25]),
        "bytes_ratio": np.array([0.5, 0.2]),
    }.items():
        assert found[name] == pytest.approx(values.mean()), name
        assert found[f"{name}_sem"] == pytest.approx(values.std(ddof=1) / 2**0.5), name
    assert found["root_kl"] == pytest.approx(kl.mean() ** 0.5)
    assert found["root_margin_kl"] == pytest.approx(found["margin_kl"] ** 0.5)
    assert found["root_kl_sem"] == pytest.approx(found["kl_sem"] / (2 * kl.mean() ** 0.5))


def test_no_merging_costs_nothing(measured):
    for configuration in (Configuration(None), Configuration(Threshold(1.0))):
        found = measured(configuration)
        for axis in objective.AXES:
            assert (found[axis], found[f"{axis}_sem"]) == pytest.approx((0, 0), abs=1e-7)
        assert [found[name] for name in objective.COSTS] == [1, 1]


def test_ratios_are_those_of_the_patched_model(measured):
    found = measured(Configuration(TopR(6)))
    ratio = measured._run(Configuration(TopR(6))).macs / measured.unmerged.macs
    assert found["macs_ratio"] == pytest.approx(ratio.mean().item())
    assert found["tokens_ratio"] == pytest.approx((65 - 4 * 6) / 65)
    assert found["kl"] > 0
    half = measured(Configuration(None, precision="int8"))
    assert half["bytes_ratio"] < 0.7, "relative to the payload at float16"


def test_a_configuration_is_evaluated_once(measured, monkeypatch):
    runs, real = [], outcomes.evaluate
    monkeypatch.setattr(outcomes, "evaluate", lambda *args: runs.append(1) or real(*args))
    first = measured(Configuration(Threshold([0.5] * 4)))
    first["kl"] = -1
    assert measured(Configuration(Threshold([0.5] * 4)))["kl"] >= 0, "a copy"
    assert len(runs) == 2, "the unmerged model and this one"


def test_images_are_taken_from_the_first_on_and_two_are_needed(measured):
    assert [batch.ids for batch in measured.batches(3)] == [["a", "b"], ["c"]]
    assert [batch.ids for batch in measured.batches()] == [["a", "b"], ["c", "d"], ["e"]]
    with pytest.raises(ValueError, match="cannot measure on 1 images"):
        Objective(measured.model, next(iter(image_sets.split_batch(measured.images, 1))))


@pytest.mark.parametrize("precision", ["float16", "int8", "int4"])
def test_the_server_works_on_the_precision_that_was_sent(model, images, batch, precision):
    configuration = Configuration(Threshold(0.3), precision, split_layer=2)
    found = objective.evaluate_configuration(model, configuration, [batch])
    merged = tokmerge.patch(model, configuration.policy, precision=precision, split_layer=2)
    for i, image in enumerate(images):
        sent = merged.edge(image[None])
        payload = wire.encode(sent.x, sent.sizes, precision)
        assert found.payload_bytes[i] == len(payload)
        # float16 is near enough to the device's own values, which are used in its place.
        received = sent.with_x(wire.decode(payload).tokens)
        tolerance = 0.05 if precision == "float16" else 1e-4
        torch.testing.assert_close(found.logits[i], merged.serve(received)[0], atol=tolerance, rtol=tolerance)


@pytest.fixture(scope="module")
def inputs_dir(tmp_path_factory):
    """What 10_inputs leaves behind for ImageNet's validation images in folders and a local checkpoint."""
    folder = tmp_path_factory.mktemp("imagenet")
    rng = np.random.default_rng(0)
    for kind in ("n01440764", "n01443537"):
        (folder / "val" / kind).mkdir(parents=True)
        for i in range(4):
            coarse = rng.integers(0, 256, (6, 8, 3), np.uint8)
            photo = Image.fromarray(coarse).resize((300, 240), Image.Resampling.BILINEAR)
            photo.save(folder / "val" / kind / f"ILSVRC2012_val_{i:08d}.JPEG")
    torch.manual_seed(0)
    model = timm.create_model(NAME, pretrained=False)
    safetensors.torch.save_file(model.state_dict(), folder / "deit.safetensors")
    ids = image_folder(folder / "val").ids
    return save_inputs(
        folder / "inputs", {"search": ids[:3], "test": ids[3:]}, dataset="imagefolder", data_path=str(folder / "val"),
        search_source="val", test_source="val", model_name=NAME, checkpoint=str(folder / "deit.safetensors"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def expected(inputs_dir):
    """The rows without shards: the model on all images, one after the other."""
    evaluation = objective.load_image_evaluation(str(inputs_dir))
    rows = []
    for configuration in CONFIGURATIONS:
        merged = tokmerge.patch(evaluation.model, configuration.policy)
        images = image_sets.batches(evaluation.images, zoo.transform(evaluation.model), 1)
        outcome = outcomes.evaluate(merged, images)
        rows.append(outcome.frame().rename(columns={"tokens": "tokens_sent"}).assign(tokens=outcome.tokens.tolist()))
    return rows


@pytest.mark.parametrize(("size", "n_workers", "ray_address"), [(2, 1, None), (3, 2, None), (4, 1, "local")])
def test_rows_do_not_depend_on_shards_or_workers(tmp_path, inputs_dir, expected, size, n_workers, ray_address):
    load = partial(objective.load_image_evaluation, str(inputs_dir), 4)
    work, points = Cache(tmp_path, {}), CONFIGURATIONS
    tables = workers.evaluate_in_shards(work, points, 5, size, load(), load, n_workers, ray_address)
    for table, rows in zip(tables, expected, strict=True):
        pd.testing.assert_frame_equal(table.drop(columns="tokens"), rows.drop(columns="tokens"), atol=1e-4)
        assert [list(counts) for counts in table.tokens] == rows.tokens.tolist()
    assert tables[1].tokens_sent.tolist() == [197 - 12 * 12] * 5


def test_trials_may_be_measured_in_sixteen_bits(inputs_dir):
    point = Configuration(tokmerge.TopR(12), "int8", 2)
    exact, fast = (objective.load_objective(str(inputs_dir), 3, dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert fast.unmerged.logits.dtype == torch.float32
    for name, value in exact(point).items():
        assert fast(point)[name] == pytest.approx(value, abs=0.05), name


def test_images_are_those_that_were_recorded(inputs_dir):
    recorded = pd.read_parquet(inputs_dir / "splits.parquet").id.tolist()
    assert objective.load_objective(str(inputs_dir), 2, skip=1).images.ids == recorded[1:3]
    for split, ids in (("search", recorded[:3]), ("test", recorded[3:])):
        assert objective.load_image_evaluation(str(inputs_dir), split=split).images.ids == ids
    assert objective.load_image_evaluation(str(inputs_dir), n_images=2, skip=3).images.ids == recorded[6:]
    with pytest.raises(FileNotFoundError, match="10_inputs"):
        objective.load_objective(str(inputs_dir / "nowhere"), 2)
