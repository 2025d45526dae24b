import numpy as np
import pandas as pd
import pytest
import torch
from tokmerge import answering, embedded, llava, vqa
from tokmerge.policies import Threshold
from tokmerge.spaces import Configuration


@pytest.fixture(scope="module")
def objective():
    """The shipped easy-VQA model on the questions about six search images."""
    model, processor = embedded.load("easy-vqa-llava")
    search, _ = answering.splits("easy-vqa-llava", 6, 2)
    return answering.Answering(model, processor, search, template=embedded.TEMPLATE, batch_size=32)


def test_no_merging_costs_nothing_and_saves_nothing(objective):
    measured = objective(Configuration(Threshold(1.0)))
    assert [measured[name] for name in ("top1_drop", "kl", "macs_ratio", "bytes_ratio")] == [0, 0, 1, 1]
    assert measured["n_questions"] == len(objective.questions)


def test_agrees_with_the_plain_run(objective):
    policy = Threshold(objective.calibrate(32).thresholds([0.5] * objective.depth))
    measured = objective(Configuration(policy))
    tables = [
        vqa.run(
            llava.patch(objective.model, choice), objective.processor, objective.questions,
            template=embedded.TEMPLATE, batch_size=7, max_new_tokens=4,
        )
        for choice in (policy, None)
    ]  # fmt: skip
    merged, base = tables
    assert measured["accuracy"] == pytest.approx(merged.accuracy.mean())
    assert measured["macs_ratio"] == pytest.approx((merged.macs / base.macs).mean())
    assert measured["bytes_ratio"] == pytest.approx((merged.payload_bytes / base.payload_bytes).mean())
    assert 0 < measured["macs_ratio"] < 1


def test_compare_by_hand():
    base = pd.DataFrame({"accuracy": [1.0, 1.0], "macs": [10, 20], "tokens": [4, 4], "payload_bytes": [8, 8]})
    less = pd.DataFrame({"accuracy": [1.0, 0.0], "macs": [5, 5], "tokens": [2, 1], "payload_bytes": [4, 2]})
    p, q = torch.tensor([[0.5, 0.5]] * 2).log(), torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log()
    got = answering.compare((less, q), (base, p))
    assert got["top1_drop"] == 0.5
    assert got["macs_ratio"] == 0.375
    assert got["bytes_ratio"] == 0.375
    kl = 0.5 * np.log(2) + 0.5 * np.log(2 / 3)
    assert got["kl"] == pytest.approx(kl / 2)
    assert got["root_kl"] == pytest.approx((kl / 2) ** 0.5)


def test_splits_share_no_image_with_training():
    search, test = answering.splits("easy-vqa-llava", 5, 3)
    assert (search.split, test.split) == ("train", "test")
    assert len({q.image_id for q in search.questions}) == 5
    assert len({q.image_id for q in test.questions}) == 3
    with pytest.raises(ValueError, match="held 400 images back"):
        answering.splits("easy-vqa-llava", 401, 1)
