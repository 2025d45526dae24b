"""Analog transmission: token features on the symbols themselves, without bits, code or cliff.

A token x, with log2 of its size s beside it where the server needs that, becomes k complex symbols. What the receiver
gets of them it turns back into a token. More channel uses than N k send everything again, and the copies are averaged;
fewer leave out the tokens that would travel last.

*Linear codec*, training-free: principal components of tokens of other images, the 2k of largest variance on the real
and imaginary parts. Component i of variance v_i is sent with power in proportion to sqrt(v_i), which is the least
squared error a linear code of full rank can reach (Lee and Petersen, "Optimal linear coding for vector channels",
1976), and received by LMMSE: z = a / (a^2 + noise / 2) y for a component of unit variance sent with amplitude a.

*Learned codec*: two small networks, trained over random SNR for what the server makes of the tokens.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokmerge.channel import Received
from tokmerge.delivery import Air, Sent, take
from tokmerge.fragments import conceal
from tokmerge.packed import Packed


class Codec(Protocol):
    """Features to symbols and back."""

    def most(self) -> int:
        """Most complex symbols per token."""
        ...

    def least(self) -> int:
        """Fewest complex symbols per token."""
        ...

    def encode(self, features: Tensor, k: int) -> Tensor:
        """(T, F) features to (T, k) complex symbols, of average power 1 over many tokens."""
        ...

    def decode(self, symbols: Tensor, noise: Tensor) -> Tensor:
        """(T, k) received symbols, divided by the known gain, with (T,) variances of the noise on them, to (T, F)."""
        ...


def features(tokens: Packed, sized: bool, weight: float) -> Tensor:
    """(T, D), or (T, D + 1) with ``weight`` log2 of the sizes where they are sent."""
    if not sized:
        return tokens.x
    sizes = torch.ones(len(tokens.x)) if tokens.sizes is None else tokens.sizes
    return torch.cat([tokens.x, weight * sizes.log2()[:, None]], dim=1)


@dataclass(frozen=True)
class Linear:
    """The linear codec.

    Attributes:
        mean: (F,) of the features.
        basis: (F, F) principal directions in columns, of falling variance.
        variance: (F,) of the components.
    """

    mean: Tensor
    basis: Tensor
    variance: Tensor

    @classmethod
    def of(cls, features: Tensor) -> "Linear":
        """The principal components of (T, F) features."""
        mean = features.mean(0)
        centred = (features - mean).double()
        variance, basis = torch.linalg.eigh(centred.T @ centred / len(features))
        return cls(mean, basis.flip(1).float(), variance.flip(0).clamp(min=1e-12).float())

    def most(self) -> int:
        return len(self.mean) // 2

    def least(self) -> int:
        return 1

    def amplitudes(self, k: int) -> Tensor:
        """(2k,) amplitude of each component of unit variance; their squares sum up to k."""
        power = self.variance[: 2 * k].sqrt()
        return (k * power / power.sum()).sqrt()

    def encode(self, features: Tensor, k: int) -> Tensor:
        scores = (features - self.mean) @ self.basis[:, : 2 * k] / self.variance[: 2 * k].sqrt()
        return torch.view_as_complex((scores * self.amplitudes(k)).view(len(features), k, 2).contiguous())

    def decode(self, symbols: Tensor, noise: Tensor) -> Tensor:
        k = symbols.shape[1]
        a, y = self.amplitudes(k), torch.view_as_real(symbols).flatten(1)
        scores = a * y / (a.square() + noise[:, None] / 2)
        return self.mean + (scores * self.variance[: 2 * k].sqrt()) @ self.basis[:, : 2 * k].T


class Learned(nn.Module):
    """The learned codec: networks of one hidden layer, the decoder told the SNR.

    Args:
        width: features F.
        k: complex symbols per token.
        hidden: width of the hidden layers.
    """

    def __init__(self, width: int, k: int, hidden: int = 128) -> None:
        super().__init__()
        self.k = k
        self.encoder = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, 2 * k))
        self.decoder = nn.Sequential(nn.Linear(2 * k + 1, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("power", torch.ones(()))
        self.mean: Tensor
        self.scale: Tensor
        self.power: Tensor

    def most(self) -> int:
        return self.k

    def least(self) -> int:
        return self.k

    def encode(self, features: Tensor, k: int) -> Tensor:
        raw = self.encoder((features - self.mean) / self.scale)
        power = raw.square().mean() * 2
        if self.training:
            # What training normalised by is what sending normalises by: a device does not know other devices' tokens.
            self.power.lerp_(power.detach(), 0.02)
        raw = raw / (power if self.training else self.power).sqrt()
        return torch.view_as_complex(raw.view(len(features), self.k, 2).contiguous())

    def decode(self, symbols: Tensor, noise: Tensor) -> Tensor:
        level = noise.clamp(min=1e-4, max=1e2).log10()[:, None]
        # Symbols shrink with the noise, as LMMSE would have it.
        y = torch.view_as_real(symbols).flatten(1) / (1 + noise[:, None])
        return self.mean + self.scale * self.decoder(torch.cat([y, level], dim=1))


@dataclass
class AnalogSent:
    """What a device sends for a set of images by an analog codec, and what the server answers.

    Attributes:
        sent: the tokens, at full precision.
        codec: features to symbols and back.
        weight: of the sizes among the features, see `features`.
    """

    sent: Sent
    codec: Codec
    weight: float

    @property
    def edge_macs(self) -> Tensor:
        """(B,) on the device; the codec's are a thousandth of it and left out."""
        return self.sent.edge_macs

    @property
    def macs(self) -> Tensor:
        """(B,) in all."""
        return self.sent.macs

    def deliver(
        self, air: Air, snr_db: float | np.ndarray, uses: int | Tensor, cap: int, generator: torch.Generator
    ) -> Tensor:
        """As `tokmerge.delivery.Sent.deliver`; there is no scheme to cap."""
        tokens, arrived = self.arrivals(air, snr_db, uses, generator)
        answers = torch.empty(len(tokens.lengths), dtype=torch.int64)
        with torch.inference_mode():
            for part in torch.arange(len(tokens.lengths)).split(128):
                some, rows = take(tokens, part)
                served = conceal(some, arrived[rows], self.sent.prototype, self.sent.patches)
                answers[part] = self.sent.merged.serve(served).argmax(1)
        return answers

    @torch.inference_mode()
    def arrivals(
        self, air: Air, snr_db: float | np.ndarray, uses: int | Tensor, generator: torch.Generator
    ) -> tuple[Packed, Tensor]:
        """The tokens as the server gets them, and (T,) which of them were sent, in the order they had on the device."""
        tokens, lengths = self.sent.tokens, self.sent.tokens.lengths
        layout, n = tokens.layout, len(lengths)
        slot = torch.as_tensor(uses).expand(n) - (air.channel.pilots or 0)
        k = (slot // lengths).clamp(min=self.codec.least(), max=self.codec.most())
        fits = (slot // k).clamp(min=0)
        copies = (slot // (lengths * k)).clamp(min=1)
        rank = torch.empty_like(self.sent.order)
        rank[self.sent.order] = torch.arange(len(rank)) - layout.offsets[layout.image]
        sized = self.sent.sizes is not None
        given = features(tokens, sized, self.weight)
        gains, out = air.channel.gains(n, generator), torch.zeros_like(given)
        for size in k.unique().tolist():
            rows = (k == size)[layout.image]
            image = layout.image[rows]
            got = self._through(self.codec.encode(given[rows], size), air, snr_db, gains, copies, image, generator)
            out[rows] = self.codec.decode(got.symbols, got.noise)
        dim = tokens.x.shape[1]
        # A size below one or beyond all patches is the noise's.
        sizes = (2 ** (out[:, dim] / self.weight)).clamp(1, self.sent.patches) if sized else None
        return Packed(out[:, :dim], layout, sizes), rank < fits[layout.image]

    @staticmethod
    def _through(
        symbols: Tensor, air: Air, snr_db: float | np.ndarray, gains: Tensor, copies: Tensor, image: Tensor,
        generator: torch.Generator,
    ) -> Received:  # fmt: skip
        """One gain per image; the average of n copies is as one with 1 / n of the noise."""
        noise = torch.as_tensor(10 ** (-np.asarray(snr_db) / 10)).float().flatten().expand(len(gains))
        known, error = gains, torch.zeros_like(noise)
        if air.channel.pilots is not None:
            error = noise / air.channel.pilots
            known = gains + error.sqrt() * torch.randn(len(gains), dtype=gains.dtype, generator=generator)
        spread = (noise / copies)[image]
        drawn = torch.randn(symbols.shape, dtype=symbols.dtype, generator=generator)
        y = gains[image, None] * symbols + spread.sqrt()[:, None] * drawn
        left = spread + error[image]
        return Received(y / known[image, None], left / known[image].abs().square())


def size_weight(tokens: Packed) -> float:
    """Weight of log2 size among the features: twice the spread of an average value of the tokens."""
    if tokens.sizes is None or tokens.sizes.max() <= 1:
        return 1.0
    return float(2 * tokens.x.std(0).mean() / tokens.sizes.log2().std().clamp(min=1e-3))


def train(
    codec: Learned, sets: list[Sent], steps: int, weight: float, seed: int, batch: int = 32, rate: float = 2e-3,
    snrs_db: tuple[float, float] = (-5.0, 20.0), progress: bool = True,
) -> list[float]:  # fmt: skip
    """Train a codec for what the server makes of the tokens.

    Args:
        codec: to train, in place.
        sets: what devices send for training images at several policies, at full precision.
        steps: of the optimiser.
        weight: of the sizes among the features.
        seed: of batches, SNRs and noise.
        batch: images per step.
        rate: largest learning rate of the one-cycle schedule.
        snrs_db: range the SNR is drawn from, uniformly.
        progress: show a bar.

    Returns:
        The loss of every step: squared error relative to the features' spread, plus KL(whole || received) of the
        server's classes.
    """
    from tqdm.auto import trange

    generator = torch.Generator().manual_seed(seed)
    everything = torch.cat([features(one.tokens, True, weight) for one in sets])
    codec.mean.copy_(everything.mean(0))
    codec.scale.copy_((everything - codec.mean).square().mean().sqrt())
    optimiser = torch.optim.AdamW(codec.parameters(), rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, max(steps, 2))
    codec.train()
    losses = []
    for _ in trange(steps, desc=f"codec of {codec.k} symbols", disable=not progress):
        one = sets[int(torch.randint(len(sets), (), generator=generator))]
        images = torch.randperm(len(one.tokens.lengths), generator=generator)[:batch].sort().values
        tokens, _ = take(one.tokens, images)
        given = features(tokens, True, weight)
        low, high = snrs_db
        noise = 10 ** (-(low + (high - low) * torch.rand(len(images), generator=generator)) / 10)[tokens.layout.image]
        symbols = codec.encode(given, codec.k)
        drawn = torch.randn(symbols.shape, dtype=symbols.dtype, generator=generator)
        out = codec.decode(symbols + noise.sqrt()[:, None] * drawn, noise)
        sizes = (2 ** (out[:, -1] / weight)).clamp(1, one.patches)
        with torch.no_grad():
            whole = one.merged.serve(tokens).log_softmax(1)
        got = one.merged.serve(Packed(out[:, :-1], tokens.layout, sizes)).log_softmax(1)
        loss = F.kl_div(got, whole, log_target=True, reduction="batchmean")
        loss = loss + ((out - given) / codec.scale).square().mean()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(codec.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        losses.append(float(loss.detach()))
    codec.eval()
    return losses
