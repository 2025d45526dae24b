"""Long evaluations in pieces: a shard is a stretch of images under one configuration, and a file once it is done.

Shards can be evaluated in any order, by any number of workers (processes, or a Ray cluster whose machines share the
folder), and by several runs one after the other: what has a file is not evaluated again. Every image's row is the same
whatever the shards are.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn
from tqdm.auto import tqdm

from tokmerge import data, models, objective, store, workers
from tokmerge.data import ImageSet
from tokmerge.spaces import Configuration
from tokmerge.trials import Trial


@dataclass(frozen=True)
class Shard:
    """A piece of work.

    Attributes:
        path: the file its rows go to.
        configuration: what is evaluated.
        start, stop: the images, by position in the set.
    """

    path: str
    configuration: Configuration
    start: int
    stop: int


@dataclass(frozen=True)
class Evaluation:
    """Evaluates shards of one set of images with one model.

    Attributes:
        model: timm VisionTransformer.
        images: the set.
        batch_size: images per forward pass.
    """

    model: nn.Module
    images: ImageSet
    batch_size: int = 32

    def __call__(self, shard: Shard) -> dict[str, float]:
        """Evaluate a shard and write its rows, whole or not at all.

        Returns:
            How many images it has.
        """
        part = data.subset(self.images, range(shard.start, shard.stop))
        outcome = objective.run(
            self.model, shard.configuration, data.batches(part, models.transform(self.model), self.batch_size)
        )
        frame = outcome.frame().rename(columns={"tokens": "tokens_sent"})
        frame["tokens"] = outcome.tokens.tolist()
        store.save_table(frame, shard.path)
        return {"n_images": len(frame)}


def load(
    inputs_dir: str, batch_size: int = 32, n_images: int | None = None, split: str = "test", skip: int = 0
) -> Evaluation:
    """The evaluation of a split that notebook 10_inputs settled on; workers call this in their own process.

    Args:
        inputs_dir: results of 10_inputs.
        batch_size: images per forward pass.
        n_images: only so many, in the split's order; None for all.
        split: "test" or "search".
        skip: images left out before the first.

    Raises:
        ValueError: no such split, or it holds fewer images.
    """
    if split not in ("test", "search"):
        raise ValueError(f"unknown split {split!r}: use test or search")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, search, test = models.reload(*models.recorded(inputs_dir), device)
    images = test if split == "test" else search
    n_images = len(images) - skip if n_images is None else n_images
    return Evaluation(model, data.stretch(images, n_images, skip, split), batch_size)


def plan(
    folder: str | Path,
    configurations: Mapping[str, Configuration],
    n_images: int,
    shard_size: int,
    about: Mapping[str, Any],
) -> list[Shard]:
    """All shards of some configurations on the same images.

    Args:
        folder: where the shards' files are kept.
        configurations: by name.
        n_images: in the set.
        shard_size: images per shard; the last ones are shorter.
        about: what else the rows depend on (data, model); other files are made where it changes.

    Raises:
        ValueError: shards of no images.
    """
    if shard_size < 1:
        raise ValueError(f"shard_size is {shard_size}: at least one image is needed")
    shards = []
    for configuration in configurations.values():
        key = hashlib.sha256(f"{json.dumps(about, sort_keys=True)} {configuration!r}".encode()).hexdigest()[:12]
        for start in range(0, n_images, shard_size):
            stop = min(n_images, start + shard_size)
            path = Path(folder) / f"{key}_{start:06d}_{stop:06d}.parquet"
            shards.append(Shard(str(path), configuration, start, stop))
    # Two names of one configuration are one piece of work.
    return list(dict.fromkeys(shards))


def run(
    shards: Sequence[Shard],
    evaluation: Callable[[Shard], dict[str, float]],
    factory: Callable[[], Callable[[Shard], dict[str, float]]],
    n_workers: int = 1,
    ray_address: str | None = None,
    description: str | None = None,
) -> None:
    """Evaluate the shards that have no file yet.

    Args:
        shards: of `plan`.
        evaluation: an `Evaluation`, used where everything stays in this process.
        factory: makes it in other processes, as `tokmerge.workers.start` says; `functools.partial` of `load`.
        n_workers, ray_address: as there. A cluster's machines must share the folder.
        description: shown beside the progress bar; None for no bar.

    Raises:
        RuntimeError: a shard failed; all others have been evaluated, and another run goes on from there.
    """
    left = [shard for shard in shards if not Path(shard.path).exists()]
    trials = [Trial(index, "shard", {}, shard) for index, shard in enumerate(left)]  # type: ignore[arg-type]
    failed: list[str] = []
    total = sum(shard.stop - shard.start for shard in left)
    with (
        workers.start(evaluation, factory, n_workers, ray_address) as evaluate,  # type: ignore[arg-type]
        tqdm(total=total, desc=description, unit="img", mininterval=2, disable=description is None) as bar,
    ):
        for trial, result in evaluate(trials):
            shard = left[trial.index]
            if isinstance(result, Exception):
                failed.append(f"images {shard.start} to {shard.stop}: {type(result).__name__}: {result}")
            bar.update(shard.stop - shard.start)
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(trials)} shards failed; the first: {failed[0]}")


def table(shards: Sequence[Shard], configuration: Configuration) -> pd.DataFrame:
    """The rows of one configuration in the images' order.

    Columns: id, label, prediction, confidence, loss, tokens_sent, macs, payload_bytes, and tokens, entering each block
    and after the last.
    """
    own = sorted((shard for shard in shards if shard.configuration == configuration), key=lambda shard: shard.start)
    return pd.concat([store.load_table(shard.path) for shard in own], ignore_index=True)
