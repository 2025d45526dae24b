"""What leaves the device, and what an eavesdropper hears of it.

A defence says which tokens are sent and in what shape. The eavesdropper receives exactly what the server does, so
quantisation and channel noise reach both alike; how much the server loses by it is the price of the defence.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokmerge import wire
from tokmerge.front import Front
from tokmerge.packed import Layout, Packed
from tokmerge.peers import RandomPruning
from tokmerge.policies import Policy, Threshold, TopR
from tokmerge.vit import MergedViT

METHODS: dict[str, Callable[..., Policy] | None] = {
    "unmerged": None,
    "threshold": Threshold,
    "tome": TopR,
    "pruning": RandomPruning,
}


@dataclass(frozen=True)
class Defence:
    """Plain values, so that a table can hold it.

    Args:
        name: what tables and figures call it.
        method: key of `METHODS`.
        values: the method's thresholds or token counts, one per block.
        precision: of the values that are sent, one of `tokmerge.wire.PRECISIONS`.
        snr_db: signal-to-noise ratio of Gaussian noise on the tokens, dB; None for a clean channel.
        feature: what thresholds are compared with; the other methods know their own.

    Raises:
        ValueError: unknown method or precision.
    """

    name: str
    method: str = "unmerged"
    values: tuple[float, ...] = ()
    precision: str = "float16"
    snr_db: float | None = None
    feature: str = "tokens"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"{self.name}: unknown method {self.method!r}: use one of {', '.join(METHODS)}")
        if self.precision not in wire.PRECISIONS:
            raise ValueError(f"{self.name}: unknown precision {self.precision!r}: use {', '.join(wire.PRECISIONS)}")
        object.__setattr__(self, "values", tuple(self.values))

    @property
    def policy(self) -> Policy | None:
        """What merges."""
        if self.method == "threshold":
            return Threshold(self.values, self.feature)
        method = METHODS[self.method]
        return None if method is None else method(self.values)

    def receive(self, tokens: Packed, generator: torch.Generator | None = None) -> Packed:
        """The tokens as server and eavesdropper get them.

        Args:
            tokens: what the device computed.
            generator: draws the noise.
        """
        x = wire.quantise(tokens.x.float(), self.precision)
        if self.snr_db is not None:
            x = add_noise(x, tokens.layout, self.snr_db, generator)
        return tokens.with_x(x)


def add_noise(x: Tensor, layout: Layout, snr_db: float, generator: torch.Generator | None = None) -> Tensor:
    """White Gaussian noise on (T, D) values, each image at the same signal-to-noise ratio.

    The power of an image's signal is the mean square of all of its values.

    >>> x = torch.ones(40_000, 1)
    >>> noisy = add_noise(x, Layout(torch.tensor([40_000])), 10.0, torch.Generator().manual_seed(0))
    >>> round((noisy - x).square().mean().item(), 2)
    0.1
    """
    power = torch.zeros(len(layout.lengths), device=x.device).index_add_(0, layout.image, x.square().mean(1))
    deviation = (power / layout.lengths.clamp(min=1) * 10 ** (-snr_db / 10)).sqrt()
    noise = torch.randn(x.shape, generator=generator, device="cpu").to(x.device)
    return x + noise * deviation[layout.image][:, None]


def from_front(front: Front, max_drop: float, cost: str, name: str | None = None) -> Defence:
    """The point of a front with the least of one cost among those within a drop of top-1, else the most accurate one.

    Args:
        front: of a search.
        max_drop: against the unmerged model, on the front's data.
        cost: "bytes" or "macs".
        name: of the defence; by default the share of the bytes that are left.
    """
    fitting = front.within(max_drop) or (max(front.points, key=lambda point: point.top1),)
    best = min(fitting, key=lambda point: (getattr(point, f"{cost}_ratio"), -point.top1))
    return Defence(name or f"merged to {best.bytes_ratio:.1%}", "threshold", best.thresholds, feature=front.feature)


def decreasing(total: int, depth: int) -> tuple[int, ...]:
    """Token counts per block that fall linearly to zero (ToMe's decreasing schedule) and add up to ``total``.

    >>> decreasing(10, 4)
    (5, 3, 2, 0)
    """
    share = [total * (depth - 1 - layer) * 2 / (depth * (depth - 1)) for layer in range(depth)]
    ends = [round(sum(share[: layer + 1])) for layer in range(depth)]
    return tuple(end - start for start, end in zip([0, *ends], ends, strict=False))


def listen(merged: MergedViT) -> Callable[[Tensor], Packed]:
    """A function from images to the tokens that the model sends at its split, source map included."""

    def tokens(images: Tensor) -> Packed:
        heard: list[Packed] = []

        def copy(sent: Packed) -> Packed:
            heard.append(sent)
            return sent

        merged(images, source=True, through=copy)
        return heard[0]

    return tokens


def collect(tokens: Callable[[Tensor], Packed], images: Tensor, batch_size: int) -> Packed:
    """The tokens of many images as one packed batch, on the CPU, in float16 (what is sent unless said otherwise).

    Args:
        tokens: images to packed tokens, such as `listen` gives.
        images: (n, C, H, W).
        batch_size: images at a time.
    """
    parts = []
    with torch.inference_mode():
        for batch in images.split(batch_size):
            part = tokens(batch)
            x = wire.quantise(part.x.float(), "float16").half().cpu()
            sizes = torch.ones(len(x)) if part.sizes is None else part.sizes.float().cpu()
            assert part.source is not None
            parts.append(Packed(x, Layout(part.lengths.cpu()), sizes, part.source.cpu().short()))
    return join(parts)


def join(parts: Iterable[Packed]) -> Packed:
    """Packed batches with sizes and source maps, one after the other."""
    parts = list(parts)
    x, lengths = (torch.cat(column) for column in zip(*((part.x, part.lengths) for part in parts), strict=True))
    sizes = torch.cat([part.sizes for part in parts if part.sizes is not None])
    source = torch.cat([part.source for part in parts if part.source is not None])
    return Packed(x.clone(), Layout(lengths.clone()), sizes.clone(), source.clone())


def pick(tokens: Packed, rows: Tensor) -> Packed:
    """The images at positions ``rows`` (B,), in that order, in float32."""
    layout = Layout(tokens.lengths[rows])
    shift = (tokens.layout.offsets[rows] - layout.offsets).repeat_interleave(layout.lengths)
    index = torch.arange(len(shift)) + shift
    sizes, source = tokens.sizes, tokens.source
    return replace(
        tokens,
        x=tokens.x[index].float(),
        layout=layout,
        sizes=None if sizes is None else sizes[index],
        source=None if source is None else source[rows].long(),
    )


def serve(merged: MergedViT, tokens: Packed, defence: Defence, batch_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """What the server makes of the tokens, and what they took.

    Args:
        merged: the model, patched with the defence's policy.
        tokens: what was sent for n images.
        defence: what happens to them on the way.
        batch_size: images at a time.
        seed: of the channel.

    Returns:
        logits (n, classes) and payload bytes (n,).
    """
    generator, device = torch.Generator().manual_seed(seed), next(merged.parameters()).device
    logits, sent = [], []
    with torch.inference_mode():
        for rows in torch.arange(len(tokens.lengths)).split(batch_size):
            received = defence.receive(pick(tokens, rows), generator)
            sizes = merged.sent_sizes(received)
            sent.append(wire.payload_bytes(received.lengths, received.x.shape[1], defence.precision, sizes))
            logits.append(merged.serve(to(received, device)).cpu())
    return torch.cat(logits), torch.cat(sent)


def to(tokens: Packed, device: torch.device | str) -> Packed:
    """The same tokens on another device."""
    sizes, source = tokens.sizes, tokens.source
    return Packed(
        tokens.x.to(device),
        Layout(tokens.lengths.to(device)),
        None if sizes is None else sizes.to(device),
        None if source is None else source.to(device),
    )
