"""Where to cut the model: what every split costs on either side and sends, from one run.

Until values are rounded, the split changes nothing about the answer, so accuracy is that of the run.
"""

from collections.abc import Iterable

import pandas as pd
import torch
from torch import Tensor, nn

from tokmerge import wire
from tokmerge.data.image_sets import Batch
from tokmerge.merging.calibration import observe
from tokmerge.merging.matching import Policy
from tokmerge.merging.packed import Layout
from tokmerge.models.patching import patch


def measure_splits(
    model: nn.Module, policy: Policy | None, batches: Iterable[Batch], precision: str = "float16"
) -> pd.DataFrame:
    """Cost and payload of every split of a timm VisionTransformer whose tokens a policy merges.

    Returns:
        One row per image and split: id, split_layer (blocks before the tokens are sent, 0 to L), tokens sent,
        edge_macs, server_macs, payload_bytes (at the precision).
    """
    ids: list[str] = []
    counts, after, shapes = [], [], []

    @torch.inference_mode()
    def run(observer: Policy) -> None:
        merged = patch(model, observer)
        for batch in batches:
            tokens, record = merged.forward_features(batch.images.to(next(model.parameters()).device))
            ids.extend(batch.ids)
            counts.append(record.tokens.cpu())
            after.append(_sizes(tokens.x, tokens.sizes).cpu())
            shapes.append(tuple(batch.images.shape[1:]))

    sizes = [*observe(run, lambda context: _sizes(context.metric, context.sizes), policy), torch.cat(after)]
    tokens, cost = torch.cat(counts), patch(model, None).cost(shapes[0])
    total, blocks = cost.total(tokens, policy), cost.blocks(tokens, policy)
    frames = []
    for split, sent in enumerate(sizes):
        merged, edge = patch(model, policy, split_layer=split), cost.embed + blocks[:, :split].sum(1)
        source = None
        if merged.sends_source and policy is not None:
            # How long a map is depends on whether some patches have no token, and on nothing else in it.
            image = Layout(tokens[:, split]).image
            whole = torch.zeros(len(tokens)).index_add(0, image, sent.float()) == tokens[:, 0]
            source = torch.where(whole, 0, -1)[:, None].expand(-1, int(tokens[0, 0]))
        sizes_sent = sent if merged.server_needs_sizes else None
        payload = wire.payload_bytes(tokens[:, split], merged.embed_dim, precision, sizes_sent, source=source)
        columns = {"tokens": tokens[:, split], "edge_macs": edge, "server_macs": total - edge, "payload_bytes": payload}
        frames.append(pd.DataFrame({"id": ids, "split_layer": split, **columns}))
    return pd.concat(frames, ignore_index=True)


def _sizes(tokens: Tensor, sizes: Tensor | None) -> Tensor:
    return tokens.new_ones(len(tokens)) if sizes is None else sizes
