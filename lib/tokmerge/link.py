"""The link: how likely a code block is lost, and what to send when.

Decoding LDPC for every payload of a sweep would take days. Its block error rate is measured once for every scheme and
SNR; errors are then drawn from the table, block by block. Over a fading channel the rate at a block's own SNR
snr |h|^2 is what counts: given that, the gain has no say in how well a block is decoded.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from tokmerge import paths, store
from tokmerge.channel import LADDER, Channel, Mcs, block_errors

TABLE = "channel_bler.parquet"


@dataclass(frozen=True)
class ErrorRates:
    """Block error rates of some schemes against the SNR.

    Attributes:
        schemes: from the most robust to the fastest.
        snr_db: for each scheme the SNRs measured, ascending.
        rates: for each scheme the share of blocks in error.
    """

    schemes: tuple[Mcs, ...]
    snr_db: tuple[np.ndarray, ...]
    rates: tuple[np.ndarray, ...]

    @classmethod
    def of(cls, table: pd.DataFrame, pilots: int | None = None) -> "ErrorRates":
        """Read a table with columns rate, bits, repeats, pilots (0: none), snr_db, blocks, errors.

        Raises:
            ValueError: nothing was measured with so many pilots.
        """
        table = table[table.pilots == (pilots or 0)]
        if table.empty:
            raise ValueError(f"the table has no block error rates with pilots={pilots}")
        schemes, snrs, rates = [], [], []
        for (rate, bits, repeats), part in table.groupby(["rate", "bits", "repeats"]):
            part = part.sort_values("snr_db")
            schemes.append(Mcs(float(rate), int(bits), int(repeats)))
            snrs.append(part.snr_db.to_numpy())
            # More noise does no good: what falls the other way is the Monte-Carlo's.
            rates.append(np.minimum.accumulate((part.errors / part.blocks).to_numpy()))
        order = sorted(range(len(schemes)), key=lambda index: schemes[index].efficiency)
        return cls(
            tuple(schemes[index] for index in order),
            tuple(snrs[index] for index in order),
            tuple(rates[index] for index in order),
        )

    def probability(self, scheme: int, snr_db: np.ndarray | float) -> np.ndarray:
        """Chance that a block is lost at these SNRs: 1 below those measured, above them the last; linear in between.

        >>> rates = ErrorRates((Mcs(0.5),), (np.array([0.0, 2.0]),), (np.array([0.8, 0.0]),))
        >>> [round(float(p), 6) for p in rates.probability(0, np.array([-1.0, 1.0, 3.0]))]
        [1.0, 0.4, 0.0]
        """
        return np.interp(snr_db, self.snr_db[scheme], self.rates[scheme], left=1.0)

    def draw(
        self, scheme: Tensor, blocks: Tensor, limit: Tensor, gains_db: np.ndarray, snr_db: float | np.ndarray,
        generator: torch.Generator,
    ) -> Tensor:  # fmt: skip
        """Draw which blocks of each payload are in error.

        Args:
            scheme: (B,) scheme of each payload.
            blocks: (B,) blocks of each payload.
            limit: (B,) blocks that are sent; those beyond are lost.
            gains_db: (B, 1) or (B, longest) gain of each payload or block.
            snr_db: average SNR.
            generator: of the draw.

        Returns:
            (B, longest) bool.
        """
        longest = int(blocks.max())
        chance = np.zeros(np.broadcast_shapes(gains_db.shape, (len(blocks), 1)))
        for index in scheme.unique().tolist():
            rows = (scheme == index).numpy()
            chance[rows] = self.probability(index, (snr_db + gains_db)[rows])
        drawn = torch.rand(len(blocks), longest, generator=generator) < torch.from_numpy(chance)
        return drawn | (torch.arange(longest) >= limit[:, None])


def gains_db(channel: Channel, n: int, blocks: int, generator: torch.Generator) -> np.ndarray:
    """(n, blocks) gains |h|^2 in dB."""
    gains = channel.gains(n * blocks, generator).abs().square().clamp(min=1e-12)
    return (10 * gains.log10()).view(n, blocks).numpy()


def measure(
    scheme: Mcs, pilots: int | None, snrs_db: Sequence[float], most: int, enough: int, generator: torch.Generator,
    batch: int = 50,
) -> pd.DataFrame:  # fmt: skip
    """Block error rates of one scheme over AWGN, by decoding.

    Args:
        scheme: modulation and coding.
        pilots: what the receiver knows of the gain, as in `Channel`.
        snrs_db: where to measure, ascending; after two SNRs without an error the rest is left out.
        most: blocks per SNR, at most.
        enough: errors after which an SNR is done.
        generator: of bits and noise.
        batch: blocks at a time.
    """
    rows, clean = [], 0
    for snr_db in snrs_db:
        blocks = errors = 0
        while blocks < most and errors < enough:
            n = min(batch, most - blocks)
            errors += int(block_errors(scheme, Channel(pilots=pilots), snr_db, n, generator).sum())
            blocks += n
        rows.append({"rate": scheme.rate, "bits": scheme.bits, "repeats": scheme.repeats, "pilots": pilots or 0,
                     "snr_db": float(snr_db), "blocks": blocks, "errors": errors})  # fmt: skip
        clean = clean + 1 if errors == 0 else 0
        if clean == 2:
            break
    return pd.DataFrame(rows)


def shipped(pilots: int | None = None) -> ErrorRates:
    """The block error rates that ship with the package, of `LADDER`."""
    rates = ErrorRates.of(store.load_table(paths.ASSETS / TABLE), pilots)
    if rates.schemes != LADDER:
        raise ValueError(f"{TABLE} is of other schemes than tokmerge.channel.LADDER: run notebooks/55_channel_study")
    return rates
