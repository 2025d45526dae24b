"""What merged models share: a wrapper that leaves the model as it is, and the loop over a transformer's layers.

One layer (pre-norm):

    x = x + attention(norm1(x))     proportional: softmax_j(q_i.k_j / sqrt(d) + log s_j)
    x = merge(x)                    the policy chooses pairs by tokens or mean-over-heads keys (`policy.feature`)
    x = x + mlp(norm2(x))           on the survivors

The parts of a model are called, some of its modules as a whole are not: a hook on one of those, or a forward of its
own, is refused.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tokmerge.merging import merge
from tokmerge.merging.matching import Policy, needed_by
from tokmerge.merging.packed import Packed, pack


class MergedModel(nn.Module):
    """A module around a model that stays as it is: its class, its weights and their names."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model
        self.training = model.training
        # The wrapped model's state_dict, under its own names, wherever this module is a part of another.
        self.register_state_dict_post_hook(_without_wrapper)
        self.register_load_state_dict_pre_hook(_with_wrapper)

    def passed_over(self) -> list[nn.Module]:
        """Modules of the wrapped model that are not called as a whole."""
        return [self.model]

    def check_ready(self) -> None:
        """Raise RuntimeError in training mode, and where something on a module that is not called would be ignored."""
        for module in self.passed_over():
            given = vars(module)
            if self.training or given["training"]:
                name = self._name(module)
                raise RuntimeError(f"token merging is for inference, and {name} is being trained: call .eval() first")
            # Empty dictionaries are not looked into: an image's forward takes milliseconds.
            hooked = given["_forward_hooks"] or given["_forward_pre_hooks"]
            hooked = hooked or given["_backward_hooks"] or given["_backward_pre_hooks"]
            if "forward" in given or (hooked and _has_foreign_hook(given)):
                raise RuntimeError(
                    f"{self._name(module)} has a hook or a forward of its own, which would be ignored: merging calls "
                    "its parts only. Hook a part, or the merged model"
                )

    def _name(self, module: nn.Module) -> str:
        return next(name for name, part in self.model.named_modules() if part is module) or "the model"


def _has_foreign_hook(given: dict[str, Any]) -> bool:
    """Transformers leaves hooks of its own behind, which record outputs when they are asked for."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooks = (hook for kind in kinds for hook in given[kind].values())
    return not all(str(getattr(hook, "__module__", "")).startswith("transformers.") for hook in hooks)


def _without_wrapper(module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    inner = f"{prefix}model."
    for key in [key for key in state_dict if key.startswith(inner)]:
        state_dict[prefix + key.removeprefix(inner)] = state_dict.pop(key)


def _with_wrapper(module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    for key in [key for key in state_dict if key.startswith(prefix)]:
        state_dict[f"{prefix}model.{key.removeprefix(prefix)}"] = state_dict.pop(key)


class MergedTransformer(MergedModel, ABC):
    """A vision transformer whose tokens merge layer by layer; subclasses know its layers."""

    has_class_token = True  #: the first token is one
    classifies = False  #: the head makes class scores of the tokens
    wants_places = False  #: tokens keep their places in the patch grid, whatever the policy needs

    def __init__(self, model: nn.Module, policy: Policy | None, depth: int, protected: int) -> None:
        super().__init__(model)
        check_policy("policy", policy, depth, self.has_class_token, self.classifies)
        self.policy = policy  #: what merges; None for nothing
        self.depth = depth  #: layers that are run
        self.protected = protected  #: leading tokens that never merge

    @property
    @abstractmethod
    def blocks(self) -> Any:
        """Layers that are run."""

    @abstractmethod
    def attention(self, layer: int, block: Any, tokens: Packed) -> tuple[Tensor, Tensor]:
        """What a layer's attention adds, (T, D), and its queries, keys and values (T, 3, H, d)."""

    @abstractmethod
    def mlp(self, block: Any, x: Tensor) -> Tensor:
        """What a layer's MLP adds: (T, D) -> (T, D)."""

    def read_out(self, tokens: Packed) -> Callable[[], Tensor] | None:
        """Gives `Context.confidence` for these tokens; None where no head makes class scores of them."""
        return None

    def pack_embedded(self, x: Tensor, grid: tuple[int, int], prefix: int, source: bool) -> Packed:
        """(B, N, D) embedded tokens, ``prefix`` leading ones and then a grid's rows of patches, as they enter layer 0.

        Raises:
            ValueError: N is not that.
        """
        rows, columns = grid
        if x.shape[1] != prefix + rows * columns:
            raise ValueError(f"the embedding gives {x.shape[1]} tokens, not {prefix} and {rows} x {columns} patches")
        tokens = pack(x, source)
        if not self.wants_places and (self.policy is None or "places" not in needed_by(self.policy)):
            return tokens
        patch = (torch.arange(x.shape[1], device=x.device) - prefix).clamp(min=0)
        place = torch.stack([patch // columns, patch % columns], dim=1).float()
        return replace(tokens, place=place.repeat(len(x), 1))

    def run_layers(self, tokens: Packed, layers: range) -> tuple[Packed, list[Tensor]]:
        """The tokens after these layers, and the (B,) counts that entered each."""
        # Looked up once: a list of modules takes as long to give one as a small layer's norm.
        lengths, blocks = [], list(self.blocks)
        for layer in layers:
            lengths.append(tokens.lengths)
            tokens = self._attend_and_merge(tokens, layer, blocks[layer])
            tokens = tokens.with_x(tokens.x + self.mlp(blocks[layer], tokens.x))
        return tokens, lengths

    def _attend_and_merge(self, tokens: Packed, layer: int, block: Any) -> Packed:
        """By themselves: queries, keys and values are gone before the MLP needs the memory."""
        out, qkv = self.attention(layer, block, tokens)
        tokens, policy = tokens.with_x(tokens.x + out), self.policy
        if policy is None:
            return tokens
        read_out = self.read_out(tokens) if "confidence" in needed_by(policy) else None
        return merge.step(
            tokens, policy, layer=layer, depth=self.depth, protected=self.protected, qkv=qkv, read_out=read_out
        )


def check_policy(name: str, policy: Policy | None, depth: int, has_class_token: bool, classifies: bool) -> None:
    """Raise TypeError if it is no policy, ValueError if it does not fit the layers or needs what the model lacks."""
    if policy is None:
        return
    if isinstance(policy, type) or not isinstance(policy, Policy):
        what = f"the class {policy.__name__}" if isinstance(policy, type) else f"a {type(policy).__name__}"
        raise TypeError(f"{name} is {what}: use a policy such as tokmerge.Threshold(0.9), or None")
    policy.check(depth)
    for what, given in (("class token", has_class_token), ("confidence", classifies)):
        if what in needed_by(policy) and not given:
            raise ValueError(f"{name}: {type(policy).__name__} needs a model that gives it: {what}")


def digest_weights(model: nn.Module) -> str:
    """Twelve hex digits that tell a model's weights (names, types, shapes and values) from others.

    >>> digest_weights(nn.Identity())
    'e3b0c44298fc'
    """
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()[:12]
