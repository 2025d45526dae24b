"""What leaves the device, and what an eavesdropper hears of it.

A defence says which tokens are sent and in what shape. The eavesdropper receives exactly what the server does, so
quantisation and channel noise reach both alike; how much the server loses by it is the price of the defence.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokmerge import wire
from tokmerge.merging.matching import Policy
from tokmerge.merging.notation import policy_from_json, policy_to_json
from tokmerge.merging.packed import Layout, Packed, join
from tokmerge.models.classifier import MergedClassifier

Distortion = Callable[[Packed, torch.Generator], Packed]


@dataclass(frozen=True)
class Defence:
    """What is sent, and how; ValueError if there is no such precision.

    >>> from tokmerge.merging.policies import Threshold
    >>> Defence.from_json(Defence("merged", Threshold([0.9, 1.0]), "int8").to_json()).policy
    Threshold(thresholds=(0.9, 1.0), feature='tokens', size_aware=False)
    """

    name: str  #: what tables and figures call it
    policy: Policy | None = None  #: what merges; None for nothing
    precision: str = "float16"  #: of the values that are sent, one of `tokmerge.wire.PRECISIONS`
    snr_db: float | None = None  #: signal-to-noise ratio of Gaussian noise on the tokens, dB; None for a clean channel

    def __post_init__(self) -> None:
        if self.precision not in wire.PRECISIONS:
            raise ValueError(f"{self.name}: unknown precision {self.precision!r}: use {', '.join(wire.PRECISIONS)}")

    def to_json(self) -> dict[str, Any]:
        """The defence as plain values."""
        return vars(self) | {"policy": policy_to_json(self.policy)}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> "Defence":
        """The defence that `to_json` wrote; ValueError if policy or precision are unknown, or values do not fit."""
        try:
            return cls(**{**plain, "policy": policy_from_json(plain["policy"])})
        except (KeyError, TypeError) as error:
            raise ValueError(f"{plain} is no defence: {error}") from error

    def receive(self, tokens: Packed, generator: torch.Generator | None = None) -> Packed:
        """The tokens as server and eavesdropper get them, in float32; the generator draws the noise."""
        x = wire.quantise(tokens.x.float(), self.precision)
        if self.snr_db is not None:
            x = add_noise(x, tokens.layout, self.snr_db, generator)
        return tokens.with_x(x)


def add_noise(x: Tensor, layout: Layout, snr_db: float, generator: torch.Generator | None = None) -> Tensor:
    """White Gaussian noise on (T, D) values; the power of each image's signal is the mean square of all its values.

    >>> x = torch.ones(40_000, 1)
    >>> noisy = add_noise(x, Layout(torch.tensor([40_000])), 10.0, torch.Generator().manual_seed(0))
    >>> round((noisy - x).square().mean().item(), 2)
    0.1
    """
    power = torch.zeros(len(layout.lengths), device=x.device).index_add_(0, layout.image, x.square().mean(1))
    deviation = (power / layout.lengths.clamp(min=1) * 10 ** (-snr_db / 10)).sqrt()
    noise = torch.randn(x.shape, generator=generator, device="cpu").to(x.device)
    return x + noise * deviation[layout.image][:, None]


def collect_tokens(tokens: Callable[[Tensor], Packed], images: Tensor, batch_size: int) -> Packed:
    """The tokens of (n, C, H, W) images as one packed batch with a source map, on the CPU, in float16 as they travel.

    ``tokens`` maps a batch of images to packed tokens with their source map, such as `MergedClassifier.edge` does.
    """
    parts = []
    with torch.inference_mode():
        for batch in images.split(batch_size):
            part = tokens(batch).to("cpu")
            assert part.source is not None
            x = wire.quantise(part.x.float(), "float16").half()
            # The source maps of many images are large; int16 holds any place in them.
            parts.append(replace(part, x=x, sizes=part.full_sizes.float(), source=part.source.short()))
    return join(parts)


def receive_batches(
    tokens: Packed, distort: Distortion, batch_size: int, generator: torch.Generator, device: torch.device | str
) -> Iterator[Packed]:
    """What arrives of the tokens of n images, ``batch_size`` images at a time, on a device."""
    for rows in torch.arange(len(tokens.lengths)).split(batch_size):
        yield distort(tokens.images(rows), generator).to(device)


def serve(
    merged: MergedClassifier, tokens: Packed, defence: Defence, batch_size: int, seed: int
) -> tuple[Tensor, Tensor]:
    """What the server makes of the tokens of n images (logits (n, ...)), and what they took (bytes (n,)).

    The model is patched with the defence's policy; the seed is the channel's.
    """
    generator, device = torch.Generator().manual_seed(seed), next(merged.parameters()).device
    logits, sent = [], []
    with torch.inference_mode():
        for part in receive_batches(tokens, defence.receive, batch_size, generator, device):
            assert part.source is not None
            # Which patch a token stands for travels only to a server that needs it.
            part = replace(part, source=part.source.long() if merged.sends_source else None)
            sizes, source = merged.sent_sizes(part), merged.sent_source(part)
            width, precision = part.x.shape[1], defence.precision
            sent.append(wire.payload_bytes(part.lengths, width, precision, sizes, source=source).cpu())
            logits.append(merged.serve(part).cpu())
    return torch.cat(logits), torch.cat(sent)
