import torch
from conftest import build
from tokmerge import bench


def test_peak_memory_by_hand():
    def work():
        a = torch.ones(1000)  # 4000
        b = a + 1  # 8000
        del a
        c = b * 2  # 8000
        return b.view(10, 100), c.mul_(2)  # views and in-place work take nothing

    assert bench.peak_bytes(work) == 8000
    assert bench.peak_bytes(lambda: [torch.ones(1000) for _ in range(5)]) == 20_000


def test_compare_runs_every_variant(images):
    table = bench.compare(build(), images, rounds=1, shares=(0.5,)).set_index("variant")
    assert list(table.index) == ["unpatched", "off", "u = 0.5"]
    assert (table.images_per_second > 0).all()
    assert table.macs_ratio["off"] == 1
    assert table.macs_ratio["u = 0.5"] < 0.8
    assert table.peak_megabytes["u = 0.5"] < 1.5 * table.peak_megabytes["unpatched"]
