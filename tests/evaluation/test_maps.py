import numpy as np
import pytest
import tokmerge
import torch
from scipy.special import xlogy
from sklearn.metrics import f1_score, fbeta_score, jaccard_score
from tokmerge.evaluation import maps, outcomes

RNG = np.random.default_rng(0)
LOGITS, REFERENCE = RNG.normal(0, 3, (2, 6, 12, 9))
MASKS = RNG.random((6, 12, 9)) < 0.4


def outcome(logits, masks=None):
    n = len(logits)
    made = torch.arange(2 * n).view(n, 2)
    ids, masks = [str(i) for i in range(n)], None if masks is None else torch.tensor(masks)
    labels, costs = torch.full((n,), -1), (made[:, 0] + 1, made[:, 1] + 1)
    return outcomes.MapOutcome(ids, labels, torch.tensor(logits), made, *costs, masks)


def test_scores_are_those_of_scikit_learn():
    found = maps.score_maps(torch.tensor(LOGITS), torch.tensor(MASKS))
    for i, (logits, mask) in enumerate(zip(LOGITS, MASKS, strict=True)):
        said, true = (logits > 0).ravel(), mask.ravel()
        assert found["score"][i] == pytest.approx(jaccard_score(true, said))
        assert found["f_measure"][i] == pytest.approx(fbeta_score(true, said, beta=maps.BETA2**0.5))
        assert found["mae"][i] == pytest.approx(abs(1 / (1 + np.exp(-logits)) - mask).mean())
    assert f1_score(true, said) != pytest.approx(found["f_measure"][i]), "beta is not 1"


def test_nothing_found_where_nothing_is_is_right():
    empty, none = torch.full((1, 3, 3), -5.0), torch.zeros(1, 3, 3, dtype=torch.bool)
    assert maps.score_maps(empty, none)["score"].tolist() == [1.0]
    assert maps.score_maps(-empty, none)["score"].tolist() == [0.0]
    assert maps.score_maps(empty, ~none)["f_measure"].tolist() == [0.0]


def test_differences_are_those_of_numpy():
    found = maps.compare_maps(torch.tensor(LOGITS), torch.tensor(REFERENCE))
    for i, (given, true) in enumerate(zip(LOGITS, REFERENCE, strict=True)):
        q, p = 1 / (1 + np.exp(-given)), 1 / (1 + np.exp(-true))
        kl = xlogy(p, p / q) + xlogy(1 - p, (1 - p) / (1 - q))
        doubt = 1 - abs(2 * p - 1)
        assert found["kl"][i] == pytest.approx(kl.mean())
        assert found["margin_kl"][i] == pytest.approx(np.average(kl, weights=doubt))
        assert found["disagreement"][i] == pytest.approx(((given > 0) != (true > 0)).mean())
        assert found["correlation"][i] == pytest.approx(np.corrcoef(p.ravel(), q.ravel())[0, 1])
        assert found["difference"][i] == pytest.approx(abs(p - q).mean())


def test_with_masks_the_score_is_iou_and_without_agreement():
    known, before = outcome(LOGITS, MASKS), outcome(REFERENCE, MASKS)
    assert (known.score_name, outcome(LOGITS).score_name) == ("IoU", "correlation")
    compared = known.compare(before)
    assert torch.equal(compared["score"], known.answers()["score"])
    assert torch.equal(compared["score_drop"], before.answers()["score"] - known.answers()["score"])
    assert torch.equal(compared["loss_rise"], known.answers()["mae"] - before.answers()["mae"])
    unknown = outcome(LOGITS).compare(outcome(REFERENCE))
    assert torch.equal(unknown["score_drop"], 1 - unknown["correlation"])
    assert outcome(LOGITS).answers()["score"].tolist() == [1.0] * 6
    assert "loss_rise" not in unknown
    summary = known.summary()
    assert summary["f_measure"] == pytest.approx(known.answers()["f_measure"].mean())
    assert summary["score_low"] < summary["score"] < summary["score_high"]


def test_of_classes_nobody_knows_the_score_is_agreement(model, batch):
    bare = batch._replace(labels=torch.full_like(batch.labels, -1))
    whole = outcomes.evaluate(tokmerge.patch(model, None), [bare])
    merged = outcomes.evaluate(tokmerge.patch(model, tokmerge.TopR(14)), [bare])
    assert whole.score_name == "agreement"
    compared, same = merged.compare(whole), (whole.logits.argmax(1) == merged.logits.argmax(1)).double()
    assert torch.equal(compared["score"], same)
    assert torch.equal(compared["score_drop"], 1 - same)
    assert 0 < same.mean() < 1
    assert "loss" not in compared
    assert whole.summary()["score"] == 1
