"""Adaptive token merging for transformer semantic communication.

>>> import timm, torch, tokmerge
>>> model = timm.create_model("vit_tiny_patch16_224", img_size=64).eval()
>>> merged = tokmerge.patch(model, tokmerge.Threshold(0.9))
>>> logits, record = merged(torch.zeros(1, 3, 64, 64))
>>> record.tokens.shape
torch.Size([1, 13])
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokmerge.front import Front, load_front
    from tokmerge.peers import (
        AdaMerge,
        AttentionPruning,
        CappedThreshold,
        RandomMerging,
        RandomPruning,
        RelativeThreshold,
        StaticRates,
        ToFu,
    )
    from tokmerge.policies import PiToMe, Policy, Threshold, TopR
    from tokmerge.vit import MergedViT, Record, patch, unmerge, unpatch

# Loaded on first use, so that drawing figures from saved tables does not depend on the engine.
_HOME = {
    "front": ("Front", "load_front"),
    "peers": (
        "AdaMerge",
        "AttentionPruning",
        "CappedThreshold",
        "RandomMerging",
        "RandomPruning",
        "RelativeThreshold",
        "StaticRates",
        "ToFu",
    ),
    "policies": ("PiToMe", "Policy", "Threshold", "TopR"),
    "vit": ("MergedViT", "Record", "patch", "unmerge", "unpatch"),
}

__all__ = [
    "AdaMerge", "AttentionPruning", "CappedThreshold", "Front", "MergedViT", "PiToMe", "Policy",
    "RandomMerging", "RandomPruning", "Record", "RelativeThreshold", "StaticRates", "Threshold", "ToFu", "TopR",
    "load_front", "patch", "unmerge", "unpatch",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f"tokmerge.{module}"), name)
    raise AttributeError(f"module 'tokmerge' has no attribute {name!r}")
