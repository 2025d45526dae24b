"""Block error rates: how likely a code block is lost.

Decoding LDPC for every payload of a sweep would take days. Its block error rate is measured once for every scheme and
SNR; errors are then drawn from the table, block by block. Over a fading channel the rate at a block's own SNR
snr |h|^2 is what counts: given that, the gain has no say in how well a block is decoded.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from tokmerge.channel.phy import Channel, Mcs, block_errors

BLOCKS_AT_ONCE = 50


@dataclass(frozen=True)
class ErrorRates:
    """Block error rates of some schemes, from the most robust to the fastest.

    Attributes:
        schemes: modulation and coding.
        snr_db, rates: for each scheme the SNRs measured, ascending, and the shares of blocks in error.
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
        table = table[table.pilots == (pilots or 0)].sort_values("snr_db")
        if table.empty:
            raise ValueError(f"the table has no block error rates with pilots={pilots}")
        measured = [
            # More noise does no good: what falls the other way is the Monte-Carlo's.
            (Mcs(float(rate), int(bits), int(repeats)), part.snr_db.to_numpy(),
             np.minimum.accumulate((part.errors / part.blocks).to_numpy()))
            for (rate, bits, repeats), part in table.groupby(["rate", "bits", "repeats"])
        ]  # fmt: skip
        return cls(*zip(*sorted(measured, key=lambda one: one[0].efficiency), strict=True))

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
        """(B, longest) bool, which blocks are lost: all from ``limit`` on; gains of payloads (B, 1) or of blocks."""
        position = torch.arange(int(blocks.max()))
        chance = np.zeros(np.broadcast_shapes(gains_db.shape, (len(blocks), 1)))
        for index in scheme.unique().tolist():
            rows = (scheme == index).numpy()
            chance[rows] = self.probability(index, (snr_db + gains_db)[rows])
        drawn = torch.rand(len(blocks), len(position), generator=generator) < torch.from_numpy(chance)
        return (drawn | (position >= limit[:, None])) & (position < blocks[:, None])


def measure_block_errors(
    scheme: Mcs, pilots: int | None, snrs_db: Sequence[float] | np.ndarray, most: int, enough: int,
    generator: torch.Generator,
) -> pd.DataFrame:  # fmt: skip
    """Block error rates of one scheme over AWGN, by decoding: the table that `ErrorRates.of` reads.

    Args:
        scheme, pilots: modulation and coding; what the receiver knows of the gain, as in `Channel`.
        snrs_db: where to measure, ascending; after two SNRs without an error the rest is left out.
        most, enough: blocks per SNR, at most; errors after which an SNR is done.
        generator: of bits and noise.
    """
    rows, clean = [], 0
    for snr_db in snrs_db:
        blocks = errors = 0
        while blocks < most and errors < enough:
            n = min(BLOCKS_AT_ONCE, most - blocks)
            errors += int(block_errors(scheme, Channel(pilots=pilots), snr_db, n, generator).sum())
            blocks += n
        measured = {"pilots": pilots or 0, "snr_db": float(snr_db), "blocks": blocks, "errors": errors}
        rows.append(asdict(scheme) | measured)
        clean = clean + 1 if errors == 0 else 0
        if clean == 2:
            break
    return pd.DataFrame(rows)
