"""`python -m tokmerge.bench`: images per second and peak memory, in one process, taking turns.

Compares the unpatched timm forward with the packed engine: merging off, and at several thresholds; on the shipped
model and on the geometry of DeiT-S. Peak memory is that of live tensors, temporaries inside kernels left out.
"""

import argparse
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tokmerge import data, evaluate, models, paths, policies, store, vit

SHARES = (0.1, 0.2, 0.4)  # share of each layer's set A that merges on the benchmark's images


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of tensors created inside the block and still alive; keeps the maximum.

    >>> with PeakMemory() as memory:
    ...     total = (torch.ones(1000) + 1).sum()
    >>> memory.peak
    8000
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage(), args)
        return out

    def _count(self, storage: torch.UntypedStorage, args: Any) -> None:
        key = storage._cdata
        inputs = {t.untyped_storage()._cdata for t in args if isinstance(t, Tensor)}
        if key in self._seen or key in inputs:
            return
        self._seen.add(key)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def peak_bytes(function: Callable[[], Any]) -> int:
    """Peak bytes of live tensors that one call creates."""
    with PeakMemory() as memory:
        function()
    return memory.peak


def compare(model: nn.Module, images: Tensor, rounds: int, shares: Sequence[float] = SHARES) -> pd.DataFrame:
    """Time the unpatched model, the engine with merging off, and the engine at several calibrated thresholds.

    Args:
        model: timm VisionTransformer.
        images: (B, C, H, W), one batch.
        rounds: timed rounds, after one warm-up; every variant runs once in each.
        shares: shares of set A that merge, in every layer.

    Returns:
        One row per variant: images_per_second, speedup over the unpatched model (median of the rounds' ratios),
        macs_ratio, their quotient, peak_megabytes.
    """
    observer = policies.Observe()
    with torch.inference_mode():
        off = vit.patch(model, None)
        unmerged = off(images)[1].macs.sum().item()
        vit.patch(model, observer)(images)
        calibration = observer.calibration()
        variants: dict[str, Callable[[], Any]] = {"unpatched": lambda: model(images), "off": lambda: off(images)}
        ratios = {"unpatched": 1.0, "off": 1.0}
        for share in shares:
            thresholds = calibration.thresholds([share] * len(calibration.quantiles))
            merged = vit.patch(model, policies.Threshold(thresholds))
            name = f"u = {share:g}"
            variants[name] = lambda merged=merged: merged(images)  # type: ignore[misc]
            ratios[name] = merged(images)[1].macs.sum().item() / unmerged
        seconds = evaluate.alternate(variants, rounds)
        rows = [
            {
                "variant": name,
                "images_per_second": len(images) / seconds[name].median(),
                "speedup": 1 / evaluate.median_ratio(seconds, name, "unpatched"),
                "macs_ratio": ratios[name],
                "peak_megabytes": peak_bytes(variants[name]) / 1e6,
            }
            for name in variants
        ]
    table = pd.DataFrame(rows)
    table["speedup_over_macs_reduction"] = table.speedup * table.macs_ratio
    return table


def main() -> None:
    """Run the benchmark, print the table and save it to results/bench.parquet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds (default 15)")
    rounds = parser.parse_args().rounds
    torch.manual_seed(0)
    shipped = models.load(models.FASHION_VIT)
    photos = data.tensors(data.load("sample"), models.transform(shipped)).images
    deit = timm.create_model("deit_small_patch16_224").eval()
    # DeiT-S runs with random weights (nothing is downloaded): its speed is real, its answers are not.
    large = torch.nn.functional.interpolate(photos[:32].repeat(1, 3, 1, 1), size=224, mode="bicubic")
    tables = [
        compare(model, images[:batch], max(3, rounds // slower)).assign(model=name, batch=batch)
        for name, model, images, slower in ((models.FASHION_VIT, shipped, photos, 1), ("deit_small", deit, large, 4))
        for batch in (1, 32)
    ]
    table = pd.concat(tables, ignore_index=True)
    columns = ["model", "batch", *(name for name in table.columns if name not in ("model", "batch"))]
    store.save_table(table[columns], paths.root() / "results" / "bench.parquet")
    print(table[columns].round(3).to_string(index=False))


if __name__ == "__main__":
    main()
