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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokmerge.channel.transmission import Decibels, Link, Sent, SentTokens, Uses
from tokmerge.evaluation.outcomes import decide
from tokmerge.merging.packed import Layout, Packed
from tokmerge.models import training

# Of the learned codec's training: images per step, largest learning rate, range of the SNR in dB.
BATCH, RATE, SNRS_DB = 32, 2e-3, (-5.0, 20.0)


def to_features(tokens: Packed, weight: float | Tensor | None) -> Tensor:
    """(T, D) of the tokens, or (T, D + 1) with ``weight`` log2 of their sizes; None where sizes are not sent.

    Raises:
        ValueError: tokens with a source map, which symbols cannot carry.
    """
    if tokens.source is not None:
        raise ValueError("this model's server needs to know which patches a token stands for, which analog symbols do "
                         "not say: send its tokens as bytes (without codec_symbols)")  # fmt: skip
    if weight is None:
        return tokens.x
    return torch.cat([tokens.x, weight * tokens.full_sizes.log2()[:, None]], dim=1)


def from_features(features: Tensor, layout: Layout, weight: float | Tensor | None, patches: int) -> Packed:
    """The tokens that `to_features` was given, of images of so many patches."""
    if weight is None:
        return Packed(features, layout)
    # A size below one or beyond all patches is the noise's.
    return Packed(features[:, :-1], layout, (2 ** (features[:, -1] / weight)).clamp(1, patches))


def size_weight(tokens: Packed) -> float:
    """Weight of log2 size among the features: twice the spread of an average value of the tokens."""
    if tokens.sizes is None or tokens.sizes.max() <= 1:
        return 1.0
    return float(2 * tokens.x.std(0).mean() / tokens.sizes.log2().std().clamp(min=1e-3))


@dataclass(frozen=True)
class LinearCodec:
    """The linear codec.

    Attributes:
        mean, basis, variance: (F,) of the features; (F, F) principal directions in columns; (F,) falling, along them.
        size_weight: of the sizes among the features.
    """

    mean: Tensor
    basis: Tensor
    variance: Tensor
    size_weight: float

    @classmethod
    def of(cls, features: Tensor, size_weight: float = 1.0) -> "LinearCodec":
        """The principal components of (T, F) features."""
        mean = features.mean(0)
        centred = (features - mean).double()
        variance, basis = torch.linalg.eigh(centred.T @ centred / len(features))
        return cls(mean, basis.flip(1).float(), variance.flip(0).clamp(min=1e-12).float(), size_weight)

    @property
    def symbols(self) -> tuple[int, int]:
        """Fewest and most complex symbols per token."""
        return 1, len(self.mean) // 2

    def amplitudes(self, k: int) -> Tensor:
        """(2k,) amplitude of each component of unit variance; their squares sum up to k."""
        power = self.variance[: 2 * k].sqrt()
        return (k * power / power.sum()).sqrt()

    def encode(self, features: Tensor, k: int) -> Tensor:
        """(T, F) features to (T, k) complex symbols, of average power 1 over many tokens."""
        scores = (features - self.mean) @ self.basis[:, : 2 * k] / self.variance[: 2 * k].sqrt()
        return torch.view_as_complex((scores * self.amplitudes(k)).view(len(features), k, 2).contiguous())

    def decode(self, symbols: Tensor, noise: Tensor) -> Tensor:
        """(T, k) received symbols, divided by the known gain, with (T,) variances of the noise on them, to (T, F)."""
        k = symbols.shape[1]
        a, y = self.amplitudes(k), torch.view_as_real(symbols).flatten(1)
        scores = a * y / (a.square() + noise[:, None] / 2)
        return self.mean + (scores * self.variance[: 2 * k].sqrt()) @ self.basis[:, : 2 * k].T


class LearnedCodec(nn.Module):
    """The learned codec of ``width`` features on k symbols: two networks of one hidden layer, used like the linear."""

    mean: Tensor
    scale: Tensor
    power: Tensor
    size_weight: Tensor

    def __init__(self, width: int, k: int, hidden: int = 128) -> None:
        super().__init__()
        self.k, self.symbols = k, (k, k)
        self.encoder = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, 2 * k))
        self.decoder = nn.Sequential(nn.Linear(2 * k + 1, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.register_buffer("mean", torch.zeros(width))
        for name in ("scale", "power", "size_weight"):
            self.register_buffer(name, torch.ones(()))

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], k: int) -> "LearnedCodec":
        """The codec of k symbols among the `named_tensors` of several; a ValueError if there is none."""
        own = {name.removeprefix(f"{k}."): tensor for name, tensor in tensors.items() if name.startswith(f"{k}.")}
        if not own:
            kept = sorted({name.split(".")[0] for name in tensors})
            raise ValueError(f"no learned codec of {k} symbols per token: there are those of {', '.join(kept)}")
        codec = cls(own["mean"].shape[0], k, own["encoder.0.weight"].shape[0])
        codec.load_state_dict(own)
        return codec.eval().requires_grad_(False)

    def named_tensors(self) -> dict[str, Tensor]:
        """Weights and buffers, to be saved beside those of other numbers of symbols."""
        return {f"{self.k}.{name}": tensor.detach().clone() for name, tensor in self.state_dict().items()}

    def encode(self, features: Tensor, k: int) -> Tensor:
        raw = self.encoder((features - self.mean) / self.scale)
        power = raw.square().mean() * 2 if self.training else self.power
        if self.training:
            # What training normalised by is what sending normalises by: a device does not know other devices' tokens.
            self.power.lerp_(power.detach(), 0.02)
        return torch.view_as_complex((raw / power.sqrt()).view(len(features), self.k, 2).contiguous())

    def decode(self, symbols: Tensor, noise: Tensor) -> Tensor:
        level = noise.clamp(min=1e-4, max=1e2).log10()[:, None]
        # Symbols shrink with the noise, as LMMSE would have it.
        y = torch.view_as_real(symbols).flatten(1) / (1 + noise[:, None])
        return self.mean + self.scale * self.decoder(torch.cat([y, level], dim=1))


@dataclass(frozen=True)
class SentAnalog(Sent):
    """Tokens of full precision, sent by an analog codec, whose MACs, a thousandth of the device's, are left out."""

    sent: SentTokens
    codec: LinearCodec | LearnedCodec

    @torch.inference_mode()
    def deliver(self, link: Link, snr_db: Decibels, uses: Uses, cap: int, generator: torch.Generator) -> Tensor:
        """As of `Sent`; there is no scheme to cap."""
        tokens, sent = self.receive(link, snr_db, uses, generator)
        server, rows = self.sent.server, tokens.layout.rows
        parts = torch.arange(len(tokens.lengths)).split(128)
        return torch.cat([decide(server.classify(tokens.images(part), sent[rows(part)])) for part in parts])

    @torch.inference_mode()
    def receive(self, link: Link, snr_db: Decibels, uses: Uses, generator: torch.Generator) -> tuple[Packed, Tensor]:
        """The tokens as the server gets them, and (T,) which of them were sent, in the order they had on the device."""
        tokens, codec, n = self.sent.tokens, self.codec, len(self.macs)
        layout, lengths = tokens.layout, tokens.lengths
        weight = None if self.sent.sizes is None else codec.size_weight
        slot = torch.as_tensor(uses).expand(n) - (link.channel.pilots or 0)
        k = (slot // lengths).clamp(*codec.symbols)
        copies = (slot // (lengths * k)).clamp(min=1)
        # One gain per image; the average of n copies is as one with 1 / n of the noise.
        gains = link.channel.gains(n, generator)
        noise = torch.as_tensor(10 ** (-np.asarray(snr_db) / 10)).float().flatten().expand(n)
        known, error = link.channel.estimate(gains, noise, generator)
        spread = noise / copies
        left = (spread + error) / known.abs().square()
        features = to_features(tokens, weight)
        out = torch.zeros_like(features)
        for size in k.unique().tolist():
            rows = (k == size)[layout.image]
            image = layout.image[rows]
            symbols = codec.encode(features[rows], size)
            drawn = torch.randn(symbols.shape, dtype=symbols.dtype, generator=generator)
            y = gains[image, None] * symbols + spread[image].sqrt()[:, None] * drawn
            out[rows] = codec.decode(y / known[image, None], left[image])
        sent = (layout.position < (slot // k).clamp(min=0)[layout.image])[self.sent.order.argsort()]
        return from_features(out, layout, weight, self.sent.server.merged.n_patches), sent


def train_codec(codec: LearnedCodec, sets: Sequence[SentTokens], steps: int, seed: int) -> list[float]:
    """Train a codec in place, for what the server makes of the tokens.

    Args:
        codec, steps, seed: what to train, how long, and of batches, SNRs and noise.
        sets: what devices send for training images at several policies, at full precision.

    Returns:
        The loss of every step: squared error relative to the features' spread, plus KL(whole || received) of the
        server's classes.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = codec.size_weight.fill_(float(np.mean([size_weight(one.tokens) for one in sets])))
    everything = torch.cat([to_features(one.tokens, weight) for one in sets])
    codec.mean.copy_(everything.mean(0))
    codec.scale.copy_((everything - codec.mean).square().mean().sqrt())

    def loss(step: int) -> Tensor:
        one = sets[int(torch.randint(len(sets), (), generator=generator))]
        images = torch.randperm(len(one.tokens.lengths), generator=generator)[:BATCH].sort().values
        tokens, (low, high) = one.tokens.images(images), SNRS_DB
        given, server = to_features(tokens, weight), one.server
        noise = 10 ** (-(low + (high - low) * torch.rand(len(images), generator=generator)) / 10)[tokens.layout.image]
        symbols = codec.encode(given, codec.k)
        drawn = torch.randn(symbols.shape, dtype=symbols.dtype, generator=generator)
        out = codec.decode(symbols + noise.sqrt()[:, None] * drawn, noise)
        with torch.no_grad():
            whole = server.serve(tokens).log_softmax(1)
        received = from_features(out, tokens.layout, weight, server.merged.n_patches)
        got = server.serve(received).log_softmax(1)
        divergence = F.kl_div(got, whole, log_target=True, reduction="batchmean")
        return divergence + ((out - given) / codec.scale).square().mean()

    optimization = training.adamw(codec, RATE, steps, weight_decay=0.0)
    return training.train(codec, loss, optimization, steps, clip=1.0, description=f"codec of {codec.k} symbols")
