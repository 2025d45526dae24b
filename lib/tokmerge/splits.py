"""Where to cut the model: what every split costs on either side and sends, from one run.

Until values are rounded, the split changes nothing about the answer, so accuracy is that of the run.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import pandas as pd
import torch
from torch import Tensor, nn

from tokmerge import wire
from tokmerge.data import Batch
from tokmerge.merge import Context, Merges
from tokmerge.policies import Policy
from tokmerge.vit import patch


@dataclass(frozen=True)
class _Sizes:
    """A policy, or None for nothing, that keeps the sizes of the tokens that enter each block."""

    policy: Policy | None
    seen: list[Tensor] = field(default_factory=list)

    @property
    def feature(self) -> str:
        return "keys" if self.policy is None else self.policy.feature

    def check(self, depth: int) -> None:
        if self.policy is not None:
            self.policy.check(depth)

    def active(self, layer: int) -> bool:
        return True

    def select(self, context: Context) -> Merges:
        n = len(context.metric)
        self.seen.append(context.metric.new_ones(n) if context.sizes is None else context.sizes)
        if self.policy is not None and self.policy.active(context.layer):
            return self.policy.select(context)
        nothing = context.layout.lengths.new_empty(0)
        return Merges(nothing, nothing, torch.zeros_like(context.layout.lengths))

    def match_macs(self, n: Tensor, d: int) -> Tensor:
        return torch.zeros_like(n)


def measure(
    model: nn.Module, policy: Policy | None, batches: Iterable[Batch], precision: str = "float16"
) -> pd.DataFrame:
    """Cost and payload of every split.

    Args:
        model: timm VisionTransformer.
        policy: what merges; None for nothing.
        batches: the images.
        precision: of the payload.

    Returns:
        One row per image and split: id, split_layer (blocks before the tokens are sent, 0 to L), tokens sent,
        edge_macs, server_macs, payload_bytes.
    """
    frames = []
    for batch in batches:
        watched = _Sizes(policy)
        merged = patch(model, watched)
        with torch.inference_mode():
            tokens, record = merged.forward_features(batch.images.to(next(model.parameters()).device))
        cost, counts, width = merged.cost(tuple(batch.images.shape[1:])), record.tokens, merged.model.embed_dim
        total, blocks = cost.total(counts, policy), cost.blocks(counts, policy)
        for split in range(counts.shape[1]):
            whole = patch(model, policy, precision=precision, split_layer=split)
            sent = tokens.sizes if split == len(watched.seen) else watched.seen[split]
            if sent is None:
                sent = torch.ones(int(counts[:, split].sum()), device=counts.device)
            edge = cost.embed + blocks[:, :split].sum(1)
            payload = wire.payload_bytes(counts[:, split], width, precision, sent if whole.server_needs_sizes else None)
            columns = {"tokens": counts[:, split], "edge_macs": edge, "server_macs": total - edge}
            columns = {name: value.cpu() for name, value in {**columns, "payload_bytes": payload}.items()}
            frames.append(pd.DataFrame({"id": batch.ids, "split_layer": split, **columns}))
    return pd.concat(frames, ignore_index=True)
