import pandas as pd
import pytest
import tokmerge
import torch
from conftest import build
from tokmerge.data.image_sets import Batch
from tokmerge.evaluation import timing


def test_peak_memory_by_hand():
    def work():
        a = torch.ones(1000)  # 4000
        b = a + 1  # 8000
        del a
        c = b * 2  # 8000
        return b.view(10, 100), c.mul_(2)  # views and in-place work take nothing

    assert timing.peak_bytes(work) == 8000
    assert timing.peak_bytes(lambda: [torch.ones(1000) for _ in range(5)]) == 20_000


def test_compare_runs_every_variant(images):
    batches = [Batch(list("abc"), images[:3], torch.zeros(3)), Batch(list("de"), images[3:], torch.zeros(2))]
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


def test_functions_take_turns():
    calls = []
    seconds = timing.alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert calls == ["a", "b"] * 4
    assert seconds.shape == (3, 2)


def test_median_ratio_is_taken_round_by_round():
    seconds = pd.DataFrame({"a": [2.0, 30.0, 4.0], "b": [1.0, 10.0, 1.0]})
    assert timing.median_ratio(seconds, "a", "b") == 3.0
