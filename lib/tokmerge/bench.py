"""`python -m tokmerge.bench`: images per second and peak memory, in one process, taking turns.

Compares the unpatched timm forward with the packed engine: merging off, and at several thresholds; on the shipped
model and on the geometry of DeiT-S. Peak memory is that of live tensors, temporaries inside kernels left out.
"""

import argparse
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pandas as pd
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tokmerge import data, evaluate, models, paths, policies, store, vit
from tokmerge.data import Batch
from tokmerge.policies import Policy

SHARES = (0.1, 0.3, 0.5)  # share of each layer's set A that merges on the benchmark's images


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


def compare(
    model: nn.Module, batches: Sequence[Batch], variants: Mapping[str, Policy | None], rounds: int
) -> pd.DataFrame:
    """Time a model as it is against the packed engine under several policies.

    Args:
        model: timm VisionTransformer.
        batches: every variant runs through all of them in each round.
        variants: policy of each variant; None: merging off.
        rounds: timed rounds, after one warm-up.

    Returns:
        One row per variant, "unpatched" first: images_per_second, speedup over the unpatched model (median of the
        rounds' ratios), macs_ratio to the unmerged model, their product speedup_over_macs_reduction, peak_megabytes.
    """
    device = next(model.parameters()).device
    inputs = [batch.images.to(device) for batch in batches]
    count = sum(len(images) for images in inputs)
    with torch.inference_mode():
        models = {"unpatched": model} | {name: vit.patch(model, policy) for name, policy in variants.items()}
        functions = {name: partial(_through, one, inputs) for name, one in models.items()}
        seconds = evaluate.alternate(functions, rounds)
        unmerged = vit.patch(model, None)
        macs = {name: sum(one(images)[1].macs.sum().item() for images in inputs)
                for name, one in (models | {"unpatched": unmerged}).items()}  # fmt: skip
        rows = [
            {
                "variant": name,
                "images_per_second": count / seconds[name].median(),
                "speedup": 1 / evaluate.median_ratio(seconds, name, "unpatched"),
                "macs_ratio": macs[name] / macs["unpatched"],
                "peak_megabytes": peak_bytes(functions[name]) / 1e6,
            }
            for name in models
        ]
    table = pd.DataFrame(rows)
    table["speedup_over_macs_reduction"] = table.speedup * table.macs_ratio
    return table


def _through(model: nn.Module, inputs: Sequence[Tensor]) -> None:
    for images in inputs:
        model(images)


def deit_small(photos: Tensor, seed: int = 0) -> tuple[nn.Module, Batch]:
    """The geometry of DeiT-S with random weights, and photos in its size: its speed is real, its answers are not.

    Args:
        photos: (B, 1 or 3, H, W) images.
        seed: of the weights.

    Returns:
        The model, and the photos as (B, 3, 224, 224).
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = timm.create_model("deit_small_patch16_224").eval()
    large = F.interpolate(photos.expand(-1, 3, -1, -1), size=224, mode="bicubic")
    return model, Batch([str(index) for index in range(len(large))], large, torch.zeros(len(large), dtype=torch.int64))


def main() -> None:
    """Run the benchmark, print the table and save it to results/bench.parquet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds (default 15)")
    rounds = parser.parse_args().rounds
    shipped = models.load(models.FASHION_VIT)
    photos = data.tensors(data.load("sample"), models.transform(shipped))
    tables = []
    for name, (model, images), slower in (
        (models.FASHION_VIT, (shipped, photos), 1),
        ("deit_small", deit_small(photos.images[:32]), 4),
    ):
        calibration = evaluate.calibrate(model, evaluate.split_batch(images, 32))
        shares = {f"u = {share:g}": [share] * len(calibration.quantiles) for share in SHARES}
        merging = {key: policies.Threshold(calibration.thresholds(share)) for key, share in shares.items()}
        for batch in (1, 32):
            batches = list(evaluate.split_batch(images, batch))[: 1 if batch > 1 else 8]
            table = compare(model, batches, {"off": None, **merging}, max(3, rounds // slower))
            tables.append(table.assign(model=name, batch=batch))
    table = pd.concat(tables, ignore_index=True)
    columns = ["model", "batch", *(name for name in table.columns if name not in ("model", "batch"))]
    store.save_table(table[columns], paths.root() / "results" / "bench.parquet")
    print(table[columns].round(3).to_string(index=False))


if __name__ == "__main__":
    main()
