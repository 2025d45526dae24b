"""`patch`: the one way to attach a merge policy to a model, whichever of the supported kinds it is."""

from collections.abc import Sequence
from typing import Any

from timm.layers.attention import Attention, AttentionRope
from timm.models.eva import Eva, EvaAttention, EvaBlock
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from tokmerge.merging.matching import Policy
from tokmerge.models.classifier import MergedClassifier
from tokmerge.models.cost import linear_macs
from tokmerge.models.dense import DenseViT, MergedDense
from tokmerge.models.vit import MergedEva, MergedViT

POOLS = ("token", "avg", "max", "avgmax", "map")
# Kinds of model, of their blocks and of the attention in these.
SUPPORTED: dict[type, tuple[type, tuple[type, ...]]] = {
    VisionTransformer: (Block, (Attention,)),
    Eva: (EvaBlock, (EvaAttention, AttentionRope)),
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
    if not isinstance(given, tuple(SUPPORTED)):
        what = f"the class {given.__name__}" if isinstance(given, type) else f"a {type(given).__name__}"
        raise TypeError(
            f"cannot merge tokens in {what}: a timm VisionTransformer or Eva is needed "
            "(timm.create_model('deit_small_patch16_224') makes one)"
        )
    if isinstance(given, DenseViT):
        check_model(given, DenseViT, VisionTransformer, ("",))
        return MergedDense(given, policy, precision, split_layer)
    base = next(kind for kind in SUPPORTED if isinstance(given, kind))
    check_model(given, base, base)
    return (MergedEva if base is Eva else MergedViT)(given, policy, precision, split_layer)  # type: ignore[arg-type]


def check_model(model: Any, base: type, supported: type, pools: Sequence[str] = POOLS) -> None:
    """Raise TypeError if a model of a class in `SUPPORTED` has parts that are not known, or differ from ``base``'s."""
    kind, attentions = SUPPORTED[supported]
    blocks: Any = model.blocks
    for layer, block in enumerate(blocks):
        if type(block) is not kind or type(blocks[layer].attn) not in attentions:
            found = f"{type(block).__name__} with {type(getattr(block, 'attn', None)).__name__}"
            known = " or ".join(one.__name__ for one in attentions)
            raise TypeError(
                f"block {layer} of the model is a {found}: only timm's {kind.__name__} with {known} is supported"
            )
        linear_macs(blocks[layer])
    if model.global_pool not in pools:
        raise TypeError(f"global_pool={model.global_pool!r} is not supported: use one of {', '.join(map(repr, pools))}")
    own = ["forward", "forward_features", *(["forward_head", "pool"] if model.global_pool != "token" else [])]
    for name in own:
        if name in vars(model) or getattr(type(model), name) is not getattr(base, name):
            raise TypeError(f"{type(model).__name__}.{name} is not {base.__name__}'s own, and would be ignored")


def unpatch(merged: MergedClassifier) -> nn.Module:
    """The model as it was before `patch`."""
    return merged.model
