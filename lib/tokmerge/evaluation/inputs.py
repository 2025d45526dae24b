"""What notebook 10_inputs settled on: the model, and which images belong to which split."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from tokmerge.data import image_sets
from tokmerge.data.image_sets import SPLITS, Batch, ImageSet
from tokmerge.data.registry import load_images
from tokmerge.io import paths, store
from tokmerge.models import zoo


@dataclass(frozen=True)
class Inputs:
    """The results of notebook 10_inputs; model and images are loaded when they are first asked for.

    Attributes:
        folder: where they are.
        facts: its inputs.json: data set, model, parameters, scores of the unmerged model.
        splits: its splits.parquet: split, id and label of every image that is used.
        device: where the model goes.
    """

    folder: Path
    facts: dict[str, Any]
    splits: pd.DataFrame
    device: str | torch.device

    @cached_property
    def model(self) -> nn.Module:
        """The model, ready to evaluate."""
        params = self.facts["params"]
        return zoo.load_model(params["model_name"], params["checkpoint"]).to(self.device)

    @cached_property
    def unmerged(self) -> pd.DataFrame:
        """One row per test image, in the split's order: what the unmerged model makes of it."""
        return store.load_table(paths.need(self.folder / "unmerged.parquet", made_by="10_inputs"))

    def images(self, split: str, n: int | None = None, skip: int = 0) -> ImageSet:
        """The images of a split ("search", "select" or "test"), in order: n (all by default) after the first ``skip``.

        Raises:
            ValueError: no such split, it holds fewer images, or the data no longer holds the ids that were recorded.
        """
        if split not in SPLITS[1:]:
            raise ValueError(f"unknown split {split!r}: use {', '.join(SPLITS[1:])}")
        params = self.facts["params"]
        where = {"path": params["data_path"], "data_dir": paths.data()}
        images = load_images(params["dataset"], source_of(split, params), **where)
        wanted = set(self.splits.id[self.splits.split == split])
        part = image_sets.subset(images, [i for i, identifier in enumerate(images.ids) if identifier in wanted])
        if len(part) != len(wanted):
            raise ValueError(
                f"{images.name} has {len(part)} of the {len(wanted)} recorded {split} images: run 10_inputs again"
            )
        return image_sets.stretch(part, len(part) - skip if n is None else n, skip, split)

    def batch(self, split: str, n: int | None = None, skip: int = 0) -> Batch:
        """Those images in one batch, as the model takes them: for sets that fit in memory."""
        return image_sets.tensors(self.images(split, n, skip), zoo.transform(self.model))


def source_of(split: str, params: Mapping[str, Any]) -> str:
    """The part of a data set that a split's images come from; those to choose by are cut from the search images' own
    where there is no part for them."""
    name = {"test": "test_source", "select": "select_source"}.get(split, "search_source")
    return str(params[name] or params["search_source"])


def open_inputs(inputs_dir: str | Path, device: str | torch.device | None = None) -> Inputs:
    """The results of notebook 10_inputs; its model goes to the device, by default a GPU if there is one.

    Raises:
        FileNotFoundError: it has not been run.
    """
    facts = store.load_json(paths.need(f"{inputs_dir}/inputs.json", made_by="10_inputs"))
    splits = store.load_table(paths.need(f"{inputs_dir}/splits.parquet", made_by="10_inputs"))
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return Inputs(paths.resolve(inputs_dir), facts, splits, device)
