"""`patch`: the one way to attach a merge policy to a model, whichever of the supported kinds it is."""

from typing import Any

from timm.layers.attention import Attention, AttentionRope
from timm.models.eva import Eva, EvaAttention, EvaBlock
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from tokmerge.merging.matching import Policy
from tokmerge.models.classifier import MergedClassifier
from tokmerge.models.cost import linear_macs
from tokmerge.models.dense import DenseViT, MergedDense
from tokmerge.models.merged import MergedModel
from tokmerge.models.vit import MergedEva, MergedViT

POOLS = ("token", "avg", "max", "avgmax", "map")
# Kinds of model: what merges in them, and the kinds of their blocks, of the attention in these and of pooling.
SUPPORTED: dict[type, tuple[type[MergedViT], type, tuple[type, ...], tuple[str, ...]]] = {
    DenseViT: (MergedDense, Block, (Attention,), ("",)),
    VisionTransformer: (MergedViT, Block, (Attention,), POOLS),
    Eva: (MergedEva, EvaBlock, (EvaAttention, AttentionRope), POOLS),
}


def patch(
    model: nn.Module, policy: Policy | None, *, precision: str = "float16", split_layer: int | None = None
) -> MergedClassifier:
    """Attach a merge policy to a vision transformer; of a patched one policy, precision and split are replaced.

    Args:
        model: timm VisionTransformer or Eva with standard pre-norm blocks (class token or none, registers, distilled,
            layer scale, qk-norm, rotary positions; pooling token, avg, max, avgmax or map); one of transformers' models
            in `tokmerge.models.encoders.ENCODERS`; or a patched model.
        policy: what merges; None for nothing.
        precision: of the token values in the payload, one of `tokmerge.wire.PRECISIONS`.
        split_layer: how many blocks run before the tokens are sent; all of them by default.

    Returns:
        A module that maps images to (logits, Record). The model's class and state_dict are unchanged.

    Raises:
        TypeError: the model or the policy is of an unsupported kind.
        ValueError: the policy does not fit the model, or an unknown precision or split.
    """
    given: Any = model.model if isinstance(model, MergedClassifier) else model
    if type(given).__module__.startswith("transformers."):
        from tokmerge.models.encoders import MergedEncoder

        return MergedEncoder(given, policy, precision, split_layer)
    base = next((kind for kind in SUPPORTED if isinstance(given, kind)), None)
    if base is None:
        what = f"the class {given.__name__}" if isinstance(given, type) else f"a {type(given).__name__}"
        raise TypeError(
            f"cannot merge tokens in {what}: a timm VisionTransformer or Eva is needed "
            "(timm.create_model('deit_small_patch16_224') makes one)"
        )
    check_model(given, base)
    return SUPPORTED[base][0](given, policy, precision, split_layer)


def check_model(model: Any, base: type) -> None:
    """Raise TypeError if a model of a class in `SUPPORTED` has parts that are not known, or not that class's own."""
    _, kind, attentions, pools = SUPPORTED[base]
    for layer, block in enumerate(model.blocks):
        own, attention = type(block), type(getattr(block, "attn", None))
        if own is not kind or attention not in attentions:
            known = " or ".join(one.__name__ for one in attentions)
            raise TypeError(
                f"block {layer} of the model is a {own.__name__} with {attention.__name__}: only timm's "
                f"{kind.__name__} with {known} is supported"
            )
        linear_macs(block)
    if model.global_pool not in pools:
        raise TypeError(f"global_pool={model.global_pool!r} is not supported: use one of {', '.join(map(repr, pools))}")
    for name in ["forward", "forward_features", *(["forward_head", "pool"] if model.global_pool != "token" else [])]:
        if name in vars(model) or getattr(type(model), name) is not getattr(base, name):
            raise TypeError(f"{type(model).__name__}.{name} is not {base.__name__}'s own, and would be ignored")


def unpatch(merged: MergedModel) -> nn.Module:
    """The model as it was before it was patched."""
    return merged.model
