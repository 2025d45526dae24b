"""What a sceptic would send instead: the image, coarser values, one token; and a head that one token cannot serve."""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from tokmerge import wire
from tokmerge.data.image_sets import Batch
from tokmerge.evaluation import image_codecs
from tokmerge.evaluation.outcomes import kind_of
from tokmerge.merging.matching import Policy
from tokmerge.models import zoo
from tokmerge.models.classifier import MergedClassifier
from tokmerge.models.patching import patch


def send_images(model: nn.Module, batches: Iterable[Batch], format: str, quality: int) -> pd.DataFrame:
    """The device sends the model's input as a compressed image, the server runs the whole model.

    Args:
        model: timm model.
        batches: transformed images. What is compressed are the pixels that the model sees: all that the server needs.
        format, quality: as of `tokmerge.evaluation.image_codecs.compress`.

    Returns:
        One row per image: id, label, `tokmerge.evaluation.outcomes.Outcome.answers`, payload_bytes, and scan_bytes, a
        JPEG without headers and tables.
    """
    rows = []
    merged, device = patch(model, None), next(model.parameters()).device
    for batch in batches:
        pictures = [Image.fromarray(zoo.pixels(model, image).squeeze()) for image in batch.images]
        payloads = [image_codecs.compress(picture, format, quality) for picture in pictures]
        received = torch.stack([_normalised(model, image_codecs.decompress(payload)) for payload in payloads])
        with torch.inference_mode():
            logits = model(received.to(device))
        scans = [image_codecs.scan_bytes(payload) if format == "jpeg" else len(payload) for payload in payloads]
        rows.append(_sent(merged, batch, logits, payloads, scan_bytes=scans))
    return pd.concat(rows, ignore_index=True)


def _normalised(model: nn.Module, picture: Image.Image) -> Tensor:
    config = resolve_model_data_config(model)
    mean, std = (torch.tensor(config[name]).view(-1, 1, 1) for name in ("mean", "std"))
    pixels = torch.from_numpy(np.array(picture.convert("L") if len(mean) == 1 else picture, np.float32) / 255)
    return ((pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)) - mean) / std


def send_tokens(
    model: nn.Module, policy: Policy | None, batches: Iterable[Batch], precisions: Sequence[str], split_layer: int
) -> pd.DataFrame:
    """The tokens after ``split_layer`` blocks of a timm VisionTransformer, at each of some `tokmerge.wire.PRECISIONS`.

    Returns:
        One row per image and precision: id, label, `tokmerge.evaluation.outcomes.Outcome.answers` from the received
        values, precision, payload_bytes.
    """
    rows = []
    merged = patch(model, policy, split_layer=split_layer)
    for batch in batches:
        with torch.inference_mode():
            sent = merged.edge(batch.images.to(next(model.parameters()).device))
            for precision in precisions:
                sizes, source = merged.sent_sizes(sent), merged.sent_source(sent)
                payloads = wire.encode_images(sent.x, sent.layout.counts, sizes, precision, source=source)
                logits = merged.serve(sent.with_x(wire.quantise(sent.x, precision)))
                rows.append(_sent(merged, batch, logits, payloads, precision=precision))
    return pd.concat(rows, ignore_index=True)


def _sent(
    merged: MergedClassifier, batch: Batch, logits: Tensor, payloads: Sequence[bytes], **columns: Any
) -> pd.DataFrame:
    """One row per image: what its payload was taken for, and how long it is."""
    lengths = torch.tensor([len(payload) for payload in payloads])
    nothing = lengths.new_zeros(len(lengths), 1)
    made = kind_of(merged)(batch.ids, batch.labels, logits.cpu(), nothing, nothing[:, 0], lengths, batch.masks)
    return made.frame().drop(columns=["tokens", "macs"]).assign(**columns)


def class_token_bytes(model: nn.Module) -> int:
    """What is sent after the last block where the head reads nothing but its leading tokens, at float16."""
    merged = patch(model, None)
    return int(wire.payload_bytes(torch.tensor([merged.protected]), merged.embed_dim)[0])


def average_head(model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
    """The same blocks under a head that needs all tokens: mean pooling and a linear classifier of the images' means.

    Returns:
        A copy of the model with ``global_pool="avg"``; `tokmerge.patch` weighs its tokens by their sizes. Classes that
        none of the images is of are never predicted.

    Raises:
        ValueError: the images are of one class.
    """
    pooled, labels, merged = [], [], patch(model, None)
    device = next(model.parameters()).device
    for batch in batches:
        with torch.inference_mode():
            tokens = torch.stack(merged.features(batch.images.to(device)).split())
        pooled.append(tokens[:, merged.protected :].mean(1).cpu())
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
    other.head = head.to(device)
    return other.requires_grad_(False).eval()
