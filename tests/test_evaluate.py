import numpy as np
import pandas as pd
import pytest
import tokmerge
import torch
from scipy import stats
from tokmerge import evaluate
from tokmerge.data import Batch


@pytest.fixture
def batch(images):
    return Batch([f"i{i}" for i in range(5)], images, torch.tensor([0, 1, 2, 3, 4]))


@pytest.mark.parametrize("size", [1, 2, 5, 9])
def test_run_equals_the_model_called_once(model, batch, size):
    merged = tokmerge.patch(model, tokmerge.Threshold(0.8))
    logits, record = merged(batch.images)
    outcome = evaluate.run(merged, evaluate.split_batch(batch, size))
    assert outcome.ids == batch.ids
    torch.testing.assert_close(outcome.logits, logits, atol=1e-5, rtol=0)
    assert torch.equal(outcome.tokens, record.tokens)
    assert torch.equal(outcome.macs, record.macs)
    assert torch.equal(outcome.payload_bytes, record.payload_bytes)
    assert torch.equal(outcome.labels, batch.labels)


def test_calibration_is_the_similarity_of_the_unmerged_model(model, batch):
    found = evaluate.calibrate(model, evaluate.split_batch(batch, 2)).quantiles
    assert found.shape == (len(model.blocks), 1001)
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(batch.images)))
    block = model.blocks[0]
    keys = block.attn.qkv(block.norm1(tokens)).view(5, -1, 3, block.attn.num_heads, 16)[:, 1:, 1].mean(2)
    attended = (tokens + block.attn(block.norm1(tokens)))[:, 1:]
    for feature, values in (("tokens", attended), ("keys", keys)):
        found = evaluate.calibrate(model, evaluate.split_batch(batch, 2), feature).quantiles
        metric = torch.nn.functional.normalize(values, dim=-1)
        best = (metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)).amax(2).double()
        np.testing.assert_allclose(found[0], np.quantile(best.detach(), np.linspace(0, 1, 1001)), atol=1e-6)


def test_frame_and_summary_by_hand():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    outcome = evaluate.Outcome(
        ["a", "b", "c"],
        torch.tensor([0, 1, 1]),
        logits,
        torch.tensor([[5, 3], [5, 1], [5, 2]]),
        torch.tensor([10, 20, 60]),
        torch.tensor([1, 2, 3]),
    )
    frame = outcome.frame()
    assert frame.prediction.tolist() == [0, 1, 0]
    assert frame.tokens.tolist() == [3, 1, 2]
    assert frame.confidence[0] == pytest.approx(1 / (1 + 2.718281828**-2))
    assert frame.loss[2] == pytest.approx(3.0485873)
    summary = outcome.summary()
    assert summary["top1"] == pytest.approx(2 / 3)
    assert summary["macs"] == 30
    assert summary["tokens"] == 2
    assert summary["n_images"] == 3


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (3, 10), (10, 10), (9123, 10000)])
def test_wilson_interval_equals_scipys(hits, n):
    expected = stats.binomtest(hits, n).proportion_ci(method="wilson")
    assert evaluate.wilson_interval(hits, n) == pytest.approx((expected.low, expected.high), abs=1e-7)


def test_relative_by_hand():
    whole = pd.DataFrame({"prediction": [0, 1, 2, 0], "label": [0, 1, 2, 3], "tokens_sent": [10] * 4})
    whole = whole.assign(macs=100, payload_bytes=40)
    rows = whole.assign(prediction=[0, 2, 2, 0], macs=[50, 20, 100, 30], payload_bytes=[4, 8, 40, 12])
    found = evaluate.relative(rows.drop(columns="tokens_sent"), whole)
    hand = {"n_images": 4, "top1": 0.5, "top1_drop": 0.25, "macs_ratio": 0.5, "bytes_ratio": 0.4, "payload_bytes": 16}
    assert {name: found[name] for name in hand} == pytest.approx(hand)
    assert "tokens_ratio" not in found
    assert found["top1_drop_sem"] == pytest.approx(stats.sem([0, 1, 0, 0]))
    assert (found["top1_low"], found["top1_high"]) == evaluate.wilson_interval(2, 4)
    assert evaluate.relative(whole, whole)["tokens_ratio"] == 1


def test_functions_take_turns():
    calls = []
    seconds = evaluate.alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert calls == ["a", "b"] * 4
    assert seconds.shape == (3, 2)


def test_median_ratio_is_taken_round_by_round():
    seconds = pd.DataFrame({"a": [2.0, 30.0, 4.0], "b": [1.0, 10.0, 1.0]})
    assert evaluate.median_ratio(seconds, "a", "b") == 3.0


def test_no_description_no_progress_bar(model, batch, capsys):
    merged = tokmerge.patch(model, None)
    evaluate.run(merged, evaluate.split_batch(batch, 2))
    assert capsys.readouterr().err == ""
    evaluate.run(merged, evaluate.split_batch(batch, 2), description="unmerged")
    assert "unmerged" in capsys.readouterr().err
