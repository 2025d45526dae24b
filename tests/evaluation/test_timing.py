import pandas as pd
import pytest
import tokmerge
import torch
from conftest import build
from tokmerge.evaluation import timing
from tokmerge.evaluation.dense_batches import dense_limit, dense_tome


def test_peak_memory_by_hand():
    def work():
        a = torch.ones(1000)  # 4000
        b = a + 1  # 8000
        del a
        c = b * 2  # 8000
        return b.view(10, 100), c.mul_(2)  # views and in-place work take nothing

    assert timing.peak_bytes(work) == 8000
    assert timing.peak_bytes(lambda: [torch.ones(1000) for _ in range(5)]) == 20_000


def test_compare_runs_every_variant(images, batches):
    model, policy = build(), tokmerge.Threshold(0.5)
    table = timing.compare_speed(model, batches, {"off": None, "merged": policy}, rounds=1).set_index("variant")
    assert list(table.index) == ["unpatched", "off", "merged"]
    assert (table.images_per_second > 0).all()
    expected = tokmerge.patch(model, policy)(images)[1].macs.sum() / tokmerge.patch(model, None)(images)[1].macs.sum()
    assert table.macs_ratio.tolist() == pytest.approx([1, 1, expected.item()])
    assert expected < 0.8
    assert (table.speedup_over_macs_reduction == table.speedup * table.macs_ratio).all()
    assert table.peak_megabytes["merged"] < 1.5 * table.peak_megabytes["unpatched"]
    assert table.peak_megabytes["off"] < 1.05 * table.peak_megabytes["unpatched"]


def test_deit_small_is_the_geometry_and_leaves_the_seed_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    model, photos = timing.deit_small(torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(0)))
    assert torch.rand(1) == expected
    assert photos.images.shape == (2, 3, 224, 224)
    assert (len(model.blocks), model.embed_dim, model.blocks[0].attn.num_heads) == (12, 384, 6)
    again, _ = timing.deit_small(photos.images)
    assert torch.equal(again.head.weight, model.head.weight)


def test_functions_take_turns_and_ratios_are_taken_round_by_round():
    calls = []
    seconds = timing.alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert calls == ["a", "b"] * 4
    assert seconds.shape == (3, 2)
    seconds = pd.DataFrame({"a": [2.0, 30.0, 4.0], "b": [1.0, 10.0, 1.0]})
    assert timing.median_ratio(seconds, "a", "b") == 3.0


def test_dense_tome_gives_the_scores_of_top_r_and_the_limit_its_counts(images):
    # After a first block the two keep their tokens in different orders.
    model = build(depth=1)
    merged = tokmerge.patch(model, tokmerge.TopR(5))
    logits, record = merged(images)
    torch.testing.assert_close(dense_tome(model, 5)(images), logits, atol=1e-4, rtol=1e-4)
    seen = []
    for block in model.blocks:
        block.mlp.register_forward_hook(lambda _, given, __: seen.append(given[0].shape[1]))
    counts = record.tokens[0].tolist()
    assert dense_limit(model, counts)(images).shape == logits.shape
    assert seen == counts[1:]
    ratios = timing.compare_engine(model, images, 5, 2)
    assert set(ratios) == {"over_limit", "over_tome", "off_overhead"}
    assert min(ratios.values()) > 0
