"""Adaptive token merging for transformer semantic communication.

>>> import timm, torch, tokmerge
>>> model = timm.create_model("vit_tiny_patch16_224", img_size=64).eval()
>>> merged = tokmerge.patch(model, tokmerge.Threshold(0.9))
>>> logits, record = merged(torch.zeros(1, 3, 64, 64))
>>> record.tokens.shape
torch.Size([1, 13])
"""

from importlib import import_module
from typing import Any

# Loaded on first use, so that drawing figures from saved tables does not load the engine.
_HOME = {
    "merging.front": ("Front", "load_front"),
    "merging.matching": ("Policy",),
    "merging.peers": ("AdaMerge", "AttentionPruning", "RandomMerging", "RandomPruning", "StaticRates", "ToFu"),
    "merging.policies": ("PiToMe", "Threshold", "TopR"),
    "merging.thresholds": ("CappedThreshold", "ConfidenceThreshold", "LocalThreshold", "RelativeThreshold"),
    "models.classifier": ("MergedClassifier", "Record", "unmerge"),
    "models.patching": ("patch", "unpatch"),
}
__all__ = ["llava", *(name for names in _HOME.values() for name in names)]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name == "llava":
        try:
            return import_module("tokmerge.models.llava")
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"tokmerge.llava needs {error.name}: pip install 'tokmerge[llava]'") from error
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f"tokmerge.{module}"), name)
    raise AttributeError(f"module 'tokmerge' has no attribute {name!r}")
