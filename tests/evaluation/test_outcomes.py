import numpy as np
import pandas as pd
import pytest
import tokmerge
import torch
from scipy import stats
from tokmerge.data import image_sets
from tokmerge.evaluation import outcomes


@pytest.mark.parametrize("size", [1, 2, 5, 9])
def test_run_equals_the_model_called_once_and_shows_a_bar_that_has_a_description(model, batch, size, capsys):
    merged = tokmerge.patch(model, tokmerge.Threshold(0.8))
    logits, record = merged(batch.images)
    outcome = outcomes.evaluate(merged, image_sets.split_batch(batch, size))
    assert capsys.readouterr().err == ""
    outcomes.evaluate(merged, image_sets.split_batch(batch, size), description="merged")
    assert "merged" in capsys.readouterr().err
    assert outcome.ids == batch.ids
    torch.testing.assert_close(outcome.logits, logits, atol=1e-5, rtol=0)
    for name in ("tokens", "macs", "payload_bytes"):
        assert torch.equal(getattr(outcome, name), getattr(record, name)), name
    assert torch.equal(outcome.labels, batch.labels)


def test_frame_and_summary_by_hand():
    labels, logits = torch.tensor([0, 1, 1]), torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    tokens, macs, sizes = torch.tensor([[5, 3], [5, 1], [5, 2]]), torch.tensor([10, 20, 60]), torch.tensor([1, 2, 3])
    outcome = outcomes.Outcome(["a", "b", "c"], labels, logits, tokens, macs, sizes)
    frame, summary = outcome.frame(), outcome.summary()
    assert frame.prediction.tolist() == [0, 1, 0]
    assert frame.tokens.tolist() == [3, 1, 2]
    assert frame.confidence[0] == pytest.approx(1 / (1 + 2.718281828**-2))
    assert frame.loss[2] == pytest.approx(3.0485873)
    hand = {"score": 2 / 3, "macs": 30, "tokens": 2, "n_images": 3}
    assert {name: summary[name] for name in hand} == pytest.approx(hand)


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (3, 10), (10, 10), (9123, 10000)])
def test_shares_have_wilsons_interval(hits, n):
    found = outcomes.score_interval(np.array([1.0] * hits + [0.0] * (n - hits)))
    z, share = stats.norm.ppf(0.975), hits / n
    middle, spread = share + z * z / (2 * n), z * (share * (1 - share) / n + (z / (2 * n)) ** 2) ** 0.5
    expected = [share, (middle - spread) / (1 + z * z / n), (middle + spread) / (1 + z * z / n)]
    assert list(found.values()) == pytest.approx(expected, abs=1e-12)


def test_relative_by_hand():
    whole = pd.DataFrame({"score": [1.0, 1.0, 1.0, 0.0], "tokens_sent": [10] * 4})
    whole = whole.assign(macs=100, payload_bytes=40)
    rows = whole.assign(score=[1.0, 0.0, 1.0, 0.0], macs=[50, 20, 100, 30], payload_bytes=[4, 8, 40, 12])
    found = outcomes.relative(rows.drop(columns="tokens_sent"), whole)
    hand = {"n_images": 4, "score": 0.5, "score_drop": 0.25, "macs_ratio": 0.5, "bytes_ratio": 0.4, "payload_bytes": 16}
    assert {name: found[name] for name in hand} == pytest.approx(hand)
    assert "tokens_ratio" not in found
    assert found["score_drop_sem"] == pytest.approx(stats.sem([0, 1, 0, 0]))
    assert (found["score_low"], found["score_high"]) == pytest.approx((0.15004, 0.84996), abs=1e-5)
    assert outcomes.relative(whole, whole)["tokens_ratio"] == 1
