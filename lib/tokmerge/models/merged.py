"""What merged models share: a wrapper that leaves the model as it is, and the loop over a transformer's layers.

One layer (pre-norm):

    x = x + attention(norm1(x))     proportional: softmax_j(q_i.k_j / sqrt(d) + log s_j)
    x = merge(x)                    the policy chooses pairs by tokens or mean-over-heads keys (`policy.feature`)
    x = x + mlp(norm2(x))           on the survivors
"""

import hashlib
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from tokmerge.merging import merge
from tokmerge.merging.matching import Policy
from tokmerge.merging.packed import Packed


class MergedModel(nn.Module):
    """A module around a model that stays as it is: its class, its weights and their names."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The wrapped model's state_dict, under its own names."""
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load into the wrapped model."""
        return self.model.load_state_dict(*args, **kwargs)

    def check_inference(self) -> None:
        """Raise RuntimeError in training mode."""
        if self.training:
            raise RuntimeError("token merging is for inference: call .eval() first")


class MergedTransformer(MergedModel, ABC):
    """A vision transformer whose tokens merge layer by layer; subclasses know its layers."""

    def __init__(self, model: nn.Module, policy: Policy | None, depth: int, protected: int) -> None:
        super().__init__(model)
        self.policy = policy  #: what merges; None for nothing
        self.depth = depth  #: layers that are run
        self.protected = protected  #: leading tokens that never merge

    @abstractmethod
    def attention(self, layer: int, tokens: Packed) -> tuple[Tensor, Tensor]:
        """What a layer's attention adds, (T, D), and its queries, keys and values (T, 3, H, d)."""

    @abstractmethod
    def mlp(self, layer: int, x: Tensor) -> Tensor:
        """What a layer's MLP adds: (T, D) -> (T, D)."""

    def run_layers(self, tokens: Packed, layers: range) -> tuple[Packed, list[Tensor]]:
        """The tokens after these layers, and the (B,) counts that entered each."""
        lengths = []
        for layer in layers:
            lengths.append(tokens.lengths)
            tokens = self._attend_and_merge(tokens, layer)
            tokens = tokens.with_x(tokens.x + self.mlp(layer, tokens.x))
        return tokens, lengths

    def _attend_and_merge(self, tokens: Packed, layer: int) -> Packed:
        """By themselves: queries, keys and values are gone before the MLP needs the memory."""
        out, qkv = self.attention(layer, tokens)
        tokens = tokens.with_x(tokens.x + out)
        return merge.step(tokens, self.policy, layer=layer, depth=self.depth, protected=self.protected, qkv=qkv)


def check_policy(name: str, policy: Policy | None, depth: int) -> None:
    """Raise TypeError if it is no policy, ValueError if it does not fit the layers."""
    if policy is None:
        return
    if not isinstance(policy, Policy):
        raise TypeError(f"{name} is a {type(policy).__name__}: use a policy such as tokmerge.Threshold(0.9), or None")
    policy.check(depth)


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
