"""Who competes for the channel: the members of every family, on the search and the test images."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from tokmerge import analog, data, schemes
from tokmerge.analog import AnalogSent
from tokmerge.data import Batch
from tokmerge.delivery import Sent, send
from tokmerge.fragments import AIR_CHUNK_TOKENS
from tokmerge.policies import Calibration, Policy, Threshold
from tokmerge.schemes import Member
from tokmerge.vit import patch


def late_profiles(calibration: Calibration, split_layer: int, shares: Sequence[float]) -> list[Threshold]:
    """Threshold policies that merge late: nothing in the first blocks, the more the nearer the split is.

    Early merging saves computing; for what is sent alone it is better to wait until tokens have seen each other.

    Args:
        calibration: maps shares of tokens to thresholds.
        split_layer: blocks on the device; nothing merges after them.
        shares: of set A that merge in the block before the split, half as much where merging begins; beyond 1, blocks
            before it merge everything as well.
    """
    depth = len(calibration.quantiles)
    policies = []
    for first in range(split_layer - 1):
        for share in shares:
            rising = np.linspace(share / 2, share, split_layer - first).clip(max=1)
            u = [0.0] * first + rising.tolist() + [0.0] * (depth - split_layer)
            policies.append(Threshold(calibration.thresholds(u)))
    return policies


def thin_out(table: pd.DataFrame, n: int) -> pd.DataFrame:
    """Up to n points of a table (columns tokens, score), spread evenly over log tokens: for each goal the best
    that needs no more.

    >>> thin_out(pd.DataFrame({"tokens": [10, 11, 100], "score": [0.8, 0.9, 0.95]}), 2).tokens.tolist()
    [10, 100]
    """
    table = table.sort_values("tokens")
    best = table[table.score > table.score.cummax().shift(fill_value=-1.0)]
    goals = np.geomspace(best.tokens.iloc[0], best.tokens.iloc[-1], n)
    # Of the points that need no more than the goal, the best, which on this staircase is the last.
    chosen = np.searchsorted(best.tokens.to_numpy(), goals * (1 + 1e-9), side="right") - 1
    return best.iloc[sorted(set(chosen.tolist()))]


def token_members(
    family: str, name: str, model: nn.Module, policy: Policy | None, split_layer: int, search: Batch, test: Batch,
    precisions: Sequence[str], chunk_tokens: int = AIR_CHUNK_TOKENS,
) -> list[Member]:  # fmt: skip
    """One member per precision."""
    merged = patch(model, policy, split_layer=split_layer)
    on_search = send(merged, search.images, precisions, chunk_tokens=chunk_tokens)
    prototype = on_search[precisions[0]].prototype
    on_test = send(merged, test.images, precisions, prototype, chunk_tokens)
    return [Member(family, name, precision, on_search[precision], on_test[precision]) for precision in precisions]


def analog_member(family: str, member: Member, codec: analog.Learned | None = None, weight: float = 0.0) -> Member:
    """A member's tokens sent by an analog codec: the linear one of its search tokens, or a learned one.

    Args:
        family: of the new member.
        member: whose precision is the finest there is.
        codec: None for the linear one.
        weight: of sizes in a learned codec.
    """
    assert isinstance(member.search, Sent)
    assert isinstance(member.test, Sent)
    tokens, sized = member.search.tokens, member.search.sizes is not None
    if codec is None:
        weight = analog.size_weight(tokens)
        code: Any = analog.Linear.of(analog.features(tokens, sized, weight))
    else:
        code = codec
    on_search, on_test = (AnalogSent(part, code, weight) for part in (member.search, member.test))
    return Member(family, member.name, "analog", on_search, on_test, "analog")


def file_members(
    model: nn.Module, search: data.ImageSet, test: data.ImageSet, qualities: Mapping[str, Sequence[int]]
) -> list[Member]:
    """Image files, a family per format, a member per quality."""
    members = []
    for format, some in qualities.items():
        for quality in some:
            on_search, on_test = (schemes.files(model, images, format, quality) for images in (search, test))
            members.append(Member(format, f"quality {quality}", "file", on_search, on_test, "whole"))
    return members


def learned(tensors: Mapping[str, Tensor], k: int) -> tuple[analog.Learned, float]:
    """A learned codec of k symbols among saved tensors, and its weight of the sizes.

    Raises:
        ValueError: there is none of k symbols.
    """
    own = {name.removeprefix(f"{k}."): tensor for name, tensor in tensors.items() if name.startswith(f"{k}.")}
    if not own:
        kept = sorted({name.split(".")[0] for name in tensors})
        raise ValueError(f"no learned codec of {k} symbols per token: there are those of {', '.join(kept)}")
    weight = float(own.pop("size_weight"))
    codec = analog.Learned(own["mean"].shape[0], k, own["encoder.0.weight"].shape[0])
    codec.load_state_dict(own)
    return codec.eval().requires_grad_(False), weight


def as_tensors(codec: analog.Learned, weight: float) -> dict[str, Tensor]:
    """What `learned` reads."""
    named = {f"{codec.k}.{name}": tensor.detach().clone() for name, tensor in codec.state_dict().items()}
    return named | {f"{codec.k}.size_weight": torch.tensor(weight)}
