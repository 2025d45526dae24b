"""What a sceptic would send instead: the image, coarser values, one token; and a head that one token cannot serve."""

import copy
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from tokmerge import codecs, models, wire
from tokmerge.data import Batch
from tokmerge.policies import Policy
from tokmerge.vit import patch


def send_images(model: nn.Module, batches: Iterable[Batch], format: str, quality: int) -> pd.DataFrame:
    """The device sends the model's input as a compressed image, the server runs the whole model.

    Args:
        model: timm model.
        batches: transformed images. What is compressed are the pixels that the model sees, after its own resizing and
            cropping, which is all the server needs.
        format: one of `tokmerge.codecs.FORMATS`.
        quality: 1 to 100.

    Returns:
        One row per image: id, label, prediction, payload_bytes, and scan_bytes, a JPEG without headers and tables.
    """
    rows = []
    device = next(model.parameters()).device
    for batch in batches:
        payloads = [codecs.compress(_picture(model, image), format, quality) for image in batch.images]
        received = torch.stack([_normalised(model, codecs.decompress(payload)) for payload in payloads])
        with torch.inference_mode():
            predictions = model(received.to(device)).argmax(1).tolist()
        scans = [codecs.scan_bytes(payload) if format == "jpeg" else len(payload) for payload in payloads]
        sent = {"payload_bytes": [len(payload) for payload in payloads], "scan_bytes": scans}
        rows.append(pd.DataFrame({"id": batch.ids, "label": batch.labels, "prediction": predictions, **sent}))
    return pd.concat(rows, ignore_index=True)


def _picture(model: nn.Module, image: Tensor) -> Image.Image:
    pixels = models.pixels(model, image)
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def _normalised(model: nn.Module, picture: Image.Image) -> Tensor:
    config = resolve_model_data_config(model)
    mean, std = (torch.tensor(config[name]).view(-1, 1, 1) for name in ("mean", "std"))
    pixels = np.array(picture.convert("L") if len(mean) == 1 else picture, np.float32) / 255
    values = torch.from_numpy(pixels)
    return ((values[None] if values.ndim == 2 else values.permute(2, 0, 1)) - mean) / std


def send_tokens(
    model: nn.Module, policy: Policy | None, batches: Iterable[Batch], precisions: Sequence[str], split_layer: int
) -> pd.DataFrame:
    """The payload of every image at each precision, as it is and behind a lossless coder.

    Args:
        model: timm VisionTransformer.
        policy: what merges; None for nothing.
        batches: the images.
        precisions: of `tokmerge.wire.PRECISIONS`.
        split_layer: blocks that run before the tokens are sent.

    Returns:
        One row per image and precision: id, label, prediction from the received values, precision, payload_bytes,
        coded_bytes (zstandard).
    """
    rows = []
    merged = patch(model, policy, split_layer=split_layer)
    for batch in batches:
        with torch.inference_mode():
            sent = merged.edge(batch.images.to(next(model.parameters()).device))
            sizes = merged.sent_sizes(sent)
            parts = [None] * len(batch.ids) if sizes is None else sizes.split(sent.layout.counts)
            for precision in precisions:
                received = sent.with_x(wire.quantise(sent.x, precision))
                payloads = [wire.encode(x, s, precision) for x, s in zip(sent.split(), parts, strict=True)]
                columns = {
                    "prediction": merged.serve(received).argmax(1).tolist(),
                    "payload_bytes": [len(payload) for payload in payloads],
                    "coded_bytes": [len(codecs.shrink(payload)) for payload in payloads],
                }
                rows.append(pd.DataFrame({"id": batch.ids, "label": batch.labels, "precision": precision, **columns}))
    return pd.concat(rows, ignore_index=True)


def class_token_bytes(model: nn.Module) -> int:
    """What is sent after the last block where the head reads nothing but its leading tokens, at float16."""
    merged = patch(model, None)
    leading = torch.tensor([merged.model.num_prefix_tokens])
    return int(wire.payload_bytes(leading, merged.model.embed_dim)[0])


def average_head(model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
    """The same blocks under a head that needs all tokens: average pooling and a linear classifier.

    Args:
        model: timm VisionTransformer.
        batches: labelled images that the classifier is fitted to (logistic regression on the unmerged model's means).

    Returns:
        A copy of the model with ``global_pool="avg"``; `tokmerge.patch` weighs its tokens by their sizes. Classes that
        none of the images is of are never predicted.

    Raises:
        ValueError: the images are of one class.
    """
    pooled, labels = [], []
    merged = patch(model, None)
    for batch in batches:
        with torch.inference_mode():
            tokens = merged.features(batch.images.to(next(model.parameters()).device))
        values = tokens.x.view(len(batch.ids), -1, tokens.x.shape[1])
        pooled.append(values[:, merged.model.num_prefix_tokens :].mean(1).cpu())
        labels.append(batch.labels)
    values, classes = torch.cat(pooled).double(), torch.cat(labels)
    kinds = classes.unique()
    if len(kinds) < 2:
        raise ValueError(f"all {len(classes)} images are of one class: more are needed")
    # Of unit variance, so that the penalty means the same for every dimension; folded back into the weights.
    mean, scale = values.mean(0), values.std(0) + 1e-8
    fitted = LogisticRegression(max_iter=2000).fit(((values - mean) / scale).numpy(), classes.numpy())
    weight = torch.tensor(fitted.coef_) / scale
    bias = torch.tensor(fitted.intercept_) - weight @ mean
    if len(weight) == 1:
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    other = copy.deepcopy(merged.model)
    other.global_pool, other.fc_norm = "avg", nn.Identity()
    head = nn.Linear(weight.shape[1], merged.model.num_classes)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.fill_(-1e4)  # of classes that were not seen
        head.weight[kinds], head.bias[kinds] = weight.float(), bias.float()
    other.head = head.to(next(model.parameters()).device)
    return other.requires_grad_(False).eval()
