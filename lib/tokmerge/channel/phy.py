"""The physical layer: symbols over a noisy, fading channel, and bits on symbols.

Complex baseband, flat block fading: the received symbols of block b are y = h_b x + n with E|x|^2 = 1 and
n ~ CN(0, 1 / snr). The average of |h|^2 is 1, so ``snr`` is the average SNR per symbol and snr |h_b|^2 the block's own.
The receiver divides by what it knows of h: h itself, or the estimate h + CN(0, 1 / (P snr)) that P known pilot symbols
give. Every use of the channel counts, pilots as well.

Bits: code blocks of `CODED_BITS` coded bits each, 5G LDPC (3GPP TS 38.212), Gray QAM, soft demapping, belief
propagation, all of it from Sionna. Below rate 1/5, as in 5G, a block is repeated and its soft bits are added up.
"""

from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

FADING = ("awgn", "rayleigh", "rician")
MODULATIONS = {2: "QPSK", 4: "16-QAM", 6: "64-QAM", 8: "256-QAM"}
# Coded bits of a block: a multiple of 2, 4, 6 and 8, so that every modulation fills its symbols.
CODED_BITS = 960
ITERATIONS = 20


@dataclass(frozen=True)
class Channel:
    """What happens to a block of symbols on its way.

    Args:
        kind: "awgn" (h = 1), "rayleigh" (h ~ CN(0, 1)) or "rician" (a line of sight beside it).
        k_factor: Rician only: power of the line of sight over that of the rest (linear), at least 0.
        pilots: known symbols per block, at least 1, from which the receiver estimates h; None: it knows h, at no cost.
    """

    kind: str = "awgn"
    k_factor: float = 4.0
    pilots: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in FADING:
            raise ValueError(f"unknown channel {self.kind!r}: use one of {', '.join(FADING)}")
        if self.k_factor < 0:
            raise ValueError(f"k_factor is {self.k_factor}, but cannot be negative")
        if self.pilots is not None and self.pilots < 1:
            raise ValueError(f"pilots is {self.pilots}: give at least 1, or None for perfect knowledge")

    def gains(self, n: int, generator: torch.Generator) -> Tensor:
        """(n,) complex64 gains h with E|h|^2 = 1."""
        if self.kind == "awgn":
            return torch.ones(n, dtype=torch.complex64)
        scattered = torch.randn(n, dtype=torch.complex64, generator=generator)
        if self.kind == "rayleigh":
            return scattered
        return (self.k_factor / (self.k_factor + 1)) ** 0.5 + scattered / (self.k_factor + 1) ** 0.5

    def gains_db(self, n: int, blocks: int, generator: torch.Generator) -> np.ndarray:
        """(n, blocks) gains |h|^2 in dB."""
        power = self.gains(n * blocks, generator).abs().square().clamp(min=1e-12)
        return (10 * power.log10()).view(n, blocks).numpy()

    def estimate(self, gains: Tensor, noise: Any, generator: torch.Generator) -> tuple[Tensor, Any]:
        """What the receiver knows of (n,) gains, and the variance of its error, given that of the noise."""
        if self.pilots is None:
            return gains, 0.0
        error = noise / self.pilots
        return gains + error**0.5 * torch.randn(len(gains), dtype=gains.dtype, generator=generator), error

    def send(self, symbols: Tensor, snr_db: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Send (n, S) symbols of average power 1, a gain per block: received ones, and (n,) variance of their noise."""
        gains, noise = self.gains(len(symbols), generator), 10 ** (-snr_db / 10)
        drawn = torch.randn(symbols.shape, dtype=symbols.dtype, generator=generator)
        known, error = self.estimate(gains, noise, generator)
        # What the estimate leaves unknown of h acts like more noise.
        received = (gains[:, None] * symbols + noise**0.5 * drawn) / known[:, None]
        return received, (noise + error) / known.abs().square()

    def uses(self, scheme: "Mcs") -> int:
        """Channel uses of a code block: pilots count."""
        return scheme.uses + (self.pilots or 0)


@dataclass(frozen=True, order=True)
class Mcs:
    """A modulation and coding scheme.

    Args:
        rate: share of information bits among the coded bits, from 1/5 to 0.95.
        bits: coded bits per symbol, one of `MODULATIONS`.
        repeats: how often every block is sent.

    >>> scheme = Mcs(1 / 2, bits=4)
    >>> scheme.info_bits, scheme.uses, scheme.efficiency, str(scheme)
    (480, 240, 2.0, '16-QAM 1/2')
    """

    rate: float
    bits: int = 2
    repeats: int = 1

    def __post_init__(self) -> None:
        if self.bits not in MODULATIONS:
            raise ValueError(f"{self.bits} bits per symbol: use one of {', '.join(map(str, MODULATIONS))}")
        if not 1 / 5 - 1e-9 <= self.rate <= 0.95 or self.repeats < 1:
            raise ValueError(f"rate {self.rate:g} x {self.repeats}: rates from 1/5 to 0.95, sent at least once")

    @property
    def info_bits(self) -> int:
        """Information bits of a block."""
        return round(self.rate * CODED_BITS)

    @property
    def uses(self) -> int:
        """Channel uses of a block, without pilots."""
        return self.repeats * CODED_BITS // self.bits

    @property
    def efficiency(self) -> float:
        """Information bits per channel use."""
        return self.info_bits / self.uses

    def blocks(self, n_bytes: int | np.ndarray | Tensor) -> Any:
        """Blocks that so many bytes take; the last one is filled up with zeros."""
        return -(-8 * n_bytes // self.info_bits)

    def __str__(self) -> str:
        near = Fraction(self.rate).limit_denominator(6)
        rate = str(near) if abs(near - self.rate) < 1e-3 else f"{self.rate:.3f}"
        return f"{MODULATIONS[self.bits]} {rate}" + (f" x{self.repeats}" if self.repeats > 1 else "")


# From a tenth of a bit per channel use to nearly seven, in steps of about 2 dB.
LADDER = (
    Mcs(1 / 5, 2, 4), Mcs(1 / 5, 2, 2), Mcs(1 / 5), Mcs(1 / 3), Mcs(1 / 2), Mcs(3 / 4), Mcs(1 / 2, 4), Mcs(3 / 4, 4),
    Mcs(2 / 3, 6), Mcs(5 / 6, 6), Mcs(3 / 4, 8), Mcs(5 / 6, 8),
)  # fmt: skip


@cache
def _mapping(bits: int) -> tuple[Any, Any]:
    """Sionna's mapper and soft demapper of a Gray QAM."""
    from sionna.phy import mapping  # takes seconds to load, and is not needed for drawn errors

    constellation = mapping.Constellation("qam", bits)
    return mapping.Mapper(constellation=constellation), mapping.Demapper("app", constellation=constellation)


@cache
def _code(info_bits: int, bits: int) -> tuple[Any, Any]:
    """Sionna's 5G LDPC encoder and decoder."""
    from sionna.phy.fec import ldpc

    encoder = ldpc.LDPC5GEncoder(info_bits, CODED_BITS, num_bits_per_symbol=bits)
    return encoder, ldpc.LDPC5GDecoder(encoder, hard_out=True, num_iter=ITERATIONS)


def modulate(coded: Tensor, bits: int) -> Tensor:
    """(n, S * bits) zeros and ones to (n, S) complex64 symbols of average power 1."""
    return _mapping(bits)[0](coded.float())


def soft_bits(symbols: Tensor, noise: Tensor, bits: int) -> Tensor:
    """(n, S * bits) log-odds that a coded bit is one, from (n, S) symbols with (n,) variances of the noise on them."""
    return _mapping(bits)[1](symbols, noise[:, None].expand_as(symbols))


@torch.inference_mode()
def transmit(info: Tensor, scheme: Mcs, channel: Channel, snr_db: float, generator: torch.Generator) -> Tensor:
    """(n, info_bits) zeros and ones through the channel, one gain per block, and what is decoded of them (uint8)."""
    encoder, decoder = _code(scheme.info_bits, scheme.bits)
    symbols = modulate(encoder(info.float()), scheme.bits).repeat(1, scheme.repeats)
    llr = soft_bits(*channel.send(symbols, snr_db, generator), scheme.bits)
    return decoder(llr.view(len(info), scheme.repeats, CODED_BITS).sum(1)).to(torch.uint8)


def block_errors(scheme: Mcs, channel: Channel, snr_db: float, n: int, generator: torch.Generator) -> Tensor:
    """(n,) bool: which of n random code blocks are decoded wrongly."""
    info = torch.randint(0, 2, (n, scheme.info_bits), dtype=torch.uint8, generator=generator)
    return (transmit(info, scheme, channel, snr_db, generator) != info).any(1)


def send_bytes(
    payload: bytes, scheme: Mcs, channel: Channel, snr_db: float, generator: torch.Generator
) -> tuple[bytes, Tensor]:
    """A payload through the channel: as many bytes, some of them wrong; (blocks,) bool, which blocks they are in."""
    info = torch.zeros(scheme.blocks(len(payload)) * scheme.info_bits, dtype=torch.uint8)
    info[: 8 * len(payload)] = torch.from_numpy(np.unpackbits(np.frombuffer(payload, np.uint8)))
    info = info.view(-1, scheme.info_bits)
    got = transmit(info, scheme, channel, snr_db, generator)
    return np.packbits(got.flatten().numpy())[: len(payload)].tobytes(), (got != info).any(1)
