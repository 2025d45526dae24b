import numpy as np
import pandas as pd
import pytest
import tokmerge
import torch
from conftest import build
from tokmerge import data, evaluate, objective, store, wire
from tokmerge.data import Batch
from tokmerge.evaluate import Outcome
from tokmerge.objective import Objective
from tokmerge.policies import Calibration, Threshold, TopR
from tokmerge.spaces import Configuration

CALIBRATION = Calibration(np.tile(np.linspace(0.5, 1, 11), (4, 1)))


@pytest.fixture
def measured(images):
    return Objective(build(), Batch([f"i{n}" for n in range(5)], images, torch.tensor([0, 1, 2, 3, 4])), batch_size=2)


def outcome(logits, macs, tokens, size):
    n = len(logits)
    return Outcome(
        ids=[str(i) for i in range(n)],
        labels=torch.tensor([0, 1]),
        logits=torch.tensor(logits),
        tokens=torch.tensor([[9, t] for t in tokens]),
        macs=torch.tensor(macs),
        payload_bytes=torch.tensor(size),
    )


def test_compare_by_hand():
    unmerged = outcome([[np.log(3.0), 0.0], [0.0, 0.0]], [100, 100], [8, 8], [50, 50])
    merged = outcome([[0.0, 0.0], [np.log(3.0), 0.0]], [50, 70], [4, 2], [25, 10])
    found = objective.compare(merged, unmerged)
    kl = np.array([0.75 * np.log(1.5) + 0.25 * np.log(0.5), 0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25)])
    loss = np.array([np.log(2), np.log(4)])
    rise = loss - [np.log(4 / 3), np.log(2)]
    assert found["n_images"] == 2
    for name, values in {
        "kl": kl,
        "loss": loss,
        "loss_rise": rise,
        # Of two equal logits the first counts as the prediction.
        "top1": np.array([1, 0]),
        "top1_drop": np.array([0, 0]),
        "macs_ratio": np.array([0.5, 0.7]),
        "tokens_ratio": np.array([0.5, 0.25]),
        "bytes_ratio": np.array([0.5, 0.2]),
    }.items():
        assert found[name] == pytest.approx(values.mean()), name
        assert found[f"{name}_sem"] == pytest.approx(values.std(ddof=1) / 2**0.5), name
    assert found["root_kl"] == pytest.approx(kl.mean() ** 0.5)
    assert found["root_kl_sem"] == pytest.approx(found["kl_sem"] / (2 * kl.mean() ** 0.5))


def test_no_merging_costs_nothing(measured):
    for configuration in (Configuration(None), Configuration(Threshold(1.0))):
        found = measured(configuration)
        for axis in objective.AXES:
            assert found[axis] == pytest.approx(0, abs=1e-7)
            assert found[f"{axis}_sem"] == pytest.approx(0, abs=1e-7)
        assert [found[name] for name in objective.COSTS] == [1, 1]


def test_ratios_are_those_of_the_patched_model(measured):
    found = measured(Configuration(TopR(6)))
    ratio = measured._run(Configuration(TopR(6)), 5).macs / measured.unmerged().macs
    assert found["macs_ratio"] == pytest.approx(ratio.mean().item())
    assert found["tokens_ratio"] == pytest.approx((65 - 4 * 6) / 65)
    assert found["kl"] > 0
    half = measured(Configuration(None, precision="int8"))
    assert half["bytes_ratio"] < 0.7, "relative to the payload at float16"


def test_a_configuration_is_evaluated_once(measured, monkeypatch):
    runs = []
    real = evaluate.run
    monkeypatch.setattr(evaluate, "run", lambda *args: runs.append(1) or real(*args))
    first = measured(Configuration(Threshold([0.5] * 4)))
    first["kl"] = -1
    assert measured(Configuration(Threshold([0.5] * 4)))["kl"] >= 0, "a copy"
    assert len(runs) == 2, "the unmerged model and this one"
    measured(Configuration(Threshold([0.5] * 4)), n_images=3)
    assert len(runs) == 4, "fewer images are another measurement"


def test_a_cheap_look_uses_the_first_images(measured):
    few = measured(Configuration(Threshold(0.5)), n_images=3)
    alone = Objective(measured.model, Batch(*(part[:3] for part in measured.images)))
    assert few == pytest.approx(alone(Configuration(Threshold(0.5))), abs=1e-6)
    with pytest.raises(ValueError, match="cannot measure on 6 of 5"):
        measured(Configuration(None), n_images=6)


def test_load_takes_search_images_only(tmp_path):
    search = data.load("sample", "train")
    test = data.load("sample", "test")
    parts = [("search", search.ids[:40]), ("test", list(test.ids))]
    store.save_table(
        pd.DataFrame([(i, part) for part, ids in parts for i in ids], columns=["id", "split"]),
        tmp_path / "splits.parquet",
    )
    params = {"model_name": "fashion-vit", "checkpoint": None, "dataset": "sample", "data_path": None}
    params |= {"search_source": "train", "test_source": "test"}
    store.save_json({"params": params}, tmp_path / "inputs.json")
    loaded = objective.load(str(tmp_path), n_images=8)
    assert loaded.images.ids == list(search.ids[:8])
    assert objective.load(str(tmp_path), n_images=4, skip=36).images.ids == list(search.ids[36:40])
    with pytest.raises(ValueError, match="5 images after the first 36 are asked for: the search split has 40"):
        objective.load(str(tmp_path), n_images=5, skip=36)
    with pytest.raises(FileNotFoundError, match="10_inputs"):
        objective.load(str(tmp_path / "nowhere"), n_images=8)


@pytest.mark.parametrize("precision", ["float16", "int8", "int4"])
def test_the_server_works_on_the_precision_that_was_sent(images, precision):
    model, batch = build(), Batch(list("abcde"), images, torch.arange(5))
    configuration = Configuration(Threshold(0.3), precision, split_layer=2)
    found = objective.run(model, configuration, [batch])
    merged = tokmerge.patch(model, configuration.policy, precision=precision, split_layer=2)
    for i, image in enumerate(images):
        sent = merged.edge(image[None])
        payload = wire.encode(sent.x, sent.sizes, precision)
        assert found.payload_bytes[i] == len(payload)
        # float16 is near enough to the device's own values, which are used in its place.
        received = sent.with_x(wire.decode(payload).tokens)
        tolerance = 0.05 if precision == "float16" else 1e-4
        torch.testing.assert_close(found.logits[i], merged.serve(received)[0], atol=tolerance, rtol=tolerance)
