"""Functions, and models, timed against each other: seconds and peak memory, in one process, taking turns.

`python -m tokmerge.evaluation.timing` compares the unpatched timm forward with the packed engine: merging off, and at
several thresholds; on the shipped model and on the geometry of DeiT-S. Peak memory is that of live tensors, temporaries
inside kernels left out.
"""

import argparse
import time
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
from torch.utils._pytree import tree_leaves

from tokmerge.data import image_sets
from tokmerge.data.image_sets import Batch
from tokmerge.data.registry import load_images
from tokmerge.evaluation.calibrate import calibrate
from tokmerge.evaluation.dense_batches import dense_limit, dense_tome
from tokmerge.io import paths, store
from tokmerge.merging import policies
from tokmerge.merging.matching import Policy
from tokmerge.models import patching, zoo

R = 13  # tokens merged at every block, ToMe's own choice for small models
SHARES = (0.1, 0.3, 0.5)  # share of each layer's set A that merges on the benchmark's images


def alternate(functions: Mapping[str, Callable[[], Any]], rounds: int) -> pd.DataFrame:
    """(rounds, functions) seconds: one call of each in turn, ``rounds`` times after one warm-up round.

    Machines drift; compare the columns of one round, or their medians, as ratios.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds + 1):
        for name, function in functions.items():
            _wait()
            start = time.perf_counter()
            function()
            _wait()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return pd.DataFrame(seconds)


def _wait() -> None:
    """Until a GPU, if there is one, has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def median_ratio(seconds: pd.DataFrame, numerator: str, denominator: str) -> float:
    """Median over the rounds of one function's time divided by another's."""
    return float((seconds[numerator] / seconds[denominator]).median())


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
        inputs = {t.untyped_storage()._cdata for t in args if isinstance(t, Tensor)}
        for storage in (t.untyped_storage() for t in tree_leaves(out) if isinstance(t, Tensor)):
            key, size = storage._cdata, storage.nbytes()
            if key not in self._seen | inputs:
                self._seen.add(key)
                self.live += size
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._free, key, size)
        return out

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def peak_bytes(function: Callable[[], Any]) -> int:
    """Peak bytes of live tensors that one call creates."""
    with PeakMemory() as memory:
        function()
    return memory.peak


def compare_speed(
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
        models = {"unpatched": model} | {name: patching.patch(model, policy) for name, policy in variants.items()}
        functions = {name: partial(_run_all, one, inputs) for name, one in models.items()}
        seconds = alternate(functions, rounds)
        counted = models | {"unpatched": patching.patch(model, None)}
        macs = {name: sum(one(images)[1].macs.sum().item() for images in inputs) for name, one in counted.items()}
        peaks = [peak_bytes(function) / 1e6 for function in functions.values()]
    table = pd.DataFrame({
        "variant": list(models),
        "images_per_second": [count / seconds[name].median() for name in models],
        "speedup": [1 / median_ratio(seconds, name, "unpatched") for name in models],
        "macs_ratio": [macs[name] / macs["unpatched"] for name in models],
        "peak_megabytes": peaks,
    })  # fmt: skip
    table["speedup_over_macs_reduction"] = table.speedup * table.macs_ratio
    return table


def compare_engine(model: Any, images: Tensor, r: int, rounds: int) -> dict[str, float]:
    """Time the packed engine against what it could be at best, and against what it replaces, taking turns.

    Args:
        model, rounds: as of `compare_speed`.
        images: (B, C, H, W), one batch.
        r: tokens that merge at every block (`tokmerge.TopR`).

    Returns:
        Medians over the rounds of ratios of times: over_limit, over plain blocks at the same counts; over_tome, over
        dense ToMe with the same r (`tokmerge.evaluation.dense_batches`); off_overhead, merging off over the model as
        it is.
    """
    with torch.inference_mode():
        merged, off = patching.patch(model, policies.TopR(r)), patching.patch(model, None)
        counts = merged(images)[1].tokens[0].tolist()
        functions: dict[str, Callable[[Tensor], Any]] = {"ours": merged, "off": off, "plain": model}
        functions |= {"limit": dense_limit(model, counts), "tome": dense_tome(model, r)}
        seconds = alternate({name: partial(one, images) for name, one in functions.items()}, rounds)
    pairs = {"over_limit": ("ours", "limit"), "over_tome": ("ours", "tome"), "off_overhead": ("off", "plain")}
    return {name: median_ratio(seconds, *pair) for name, pair in pairs.items()}


def _run_all(model: nn.Module, inputs: Sequence[Tensor]) -> None:
    for images in inputs:
        model(images)


def deit_small(photos: Tensor, seed: int = 0) -> tuple[nn.Module, Batch]:
    """The geometry of DeiT-S with random weights: its speed is real, its answers are not.

    Returns:
        The model, and the (B, 1 or 3, H, W) photos in its size, (B, 3, 224, 224).
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
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shipped = zoo.load_model(zoo.FASHION_VIT)
    photos = image_sets.tensors(load_images("sample"), zoo.transform(shipped))
    models = {zoo.FASHION_VIT: (shipped, photos, 1), "deit_small": (*deit_small(photos.images[:32]), 4)}
    tables = {}
    for name, (model, images, slower) in models.items():
        model, images = model.to(device), images._replace(images=images.images.to(device))
        calibration = calibrate(model, image_sets.split_batch(images, 32))
        shares = {f"u = {share:g}": [share] * len(calibration.quantiles) for share in SHARES}
        merging = {key: policies.Threshold(calibration.thresholds(share)) for key, share in shares.items()}
        for batch, n_batches in ((1, 8), (32, 1)):
            batches = list(image_sets.split_batch(images, batch))[:n_batches]
            tables[name, batch] = compare_speed(model, batches, {"off": None, **merging}, max(3, rounds // slower))
            ratios = compare_engine(model, batches[0].images, R, 2 * rounds if batch == 1 else max(3, rounds // slower))
            print(f"{name}, batch {batch}, r = {R}:", ", ".join(f"{key} {value:.3f}" for key, value in ratios.items()))
    table = pd.concat(tables, names=["model", "batch"]).reset_index(["model", "batch"])
    store.save_table(table, paths.root() / "results" / "bench.parquet")
    print(table.round(3).to_string(index=False))


if __name__ == "__main__":
    main()
