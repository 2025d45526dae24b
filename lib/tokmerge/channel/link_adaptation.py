"""What to send when: a table computed offline that a device looks its choice up in.

For every bandwidth, deadline and SNR the table names what answered most select images as it should: which member
(policy and precision) and which fastest modulation and code rate. Between two that do as well the faster one is named.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from tokmerge.channel.comparison import options
from tokmerge.channel.schemes import Member, Slot
from tokmerge.channel.transmission import Link, Sent, SentPayloads
from tokmerge.evaluation.outcomes import agreement
from tokmerge.io import store

LOOKUP_VERSION = 1
# A share of select images this close to the best counts as as good.
SCORE_SLACK = 0.002


@dataclass(frozen=True)
class Choice:
    """One cell of the table.

    Attributes:
        uses, deadline_s, snr_db: channel uses an image may take, time it may take, lower end of the SNR.
        member, cap: index of what is sent, and of the fastest scheme.
        score: share of select images answered as they should be.
        latency_s: mean seconds from image to answer.
    """

    uses: int
    deadline_s: float
    snr_db: float
    member: int
    cap: int
    score: float
    latency_s: float


@dataclass(frozen=True)
class Lookup:
    """The table: name and precision of what its choices may name, and the choices."""

    members: tuple[tuple[str, str], ...]
    choices: tuple[Choice, ...]

    def pick(self, snr_db: float, uses: int, deadline_s: float) -> Choice:
        """The choice of the cell at or below a state of the link; below the table's SNRs its lowest row holds.

        Raises:
            ValueError: fewer channel uses or less time than the table begins with.

        >>> cells = [Choice(1000, 0.1, 0.0, 0, 2, 0.8, 0.05), Choice(1000, 0.1, 5.0, 1, 4, 0.9, 0.06)]
        >>> Lookup((("a", "int4"), ("b", "int8")), tuple(cells)).pick(7.0, 4000, 0.2).member
        1
        """
        fitting = [one for one in self.choices if one.uses <= uses and one.deadline_s <= deadline_s + 1e-12]
        if not fitting:
            least = min((one.uses, one.deadline_s) for one in self.choices)
            raise ValueError(
                f"no choice for {uses} channel uses within {deadline_s:g} s: the table begins with {least[0]} uses "
                f"and {least[1]:g} s"
            )
        widest = max((one.uses, one.deadline_s) for one in fitting)
        rows = sorted((one for one in fitting if (one.uses, one.deadline_s) == widest), key=lambda one: one.snr_db)
        below = [one for one in rows if one.snr_db <= snr_db + 1e-9]
        return below[-1] if below else rows[0]

    def restrict(self, members: Collection[tuple[str, str]]) -> "Lookup":
        """The table without the choices that name other members; a ValueError if none is left."""
        kept = [index for index, name in enumerate(self.members) if name in members]
        choices = tuple(replace(one, member=kept.index(one.member)) for one in self.choices if one.member in kept)
        if not choices:
            raise ValueError(f"the table names none of {', '.join(map(str, sorted(members)))}")
        return Lookup(tuple(self.members[index] for index in kept), choices)


def latency_s(sent: Sent, slot: Slot, link: Link, cap: int) -> Tensor:
    """(B,) seconds from image to answer: computing, and the channel uses really taken."""
    assert isinstance(sent, SentPayloads)
    used = link.used(sent.n_bytes, slot.uses_for(sent), cap)
    return slot.computing_s(sent) + used.double() / slot.symbols_per_s


def compute_lookup(
    members: Sequence[Member], link: Link, snrs_db: Iterable[float], slots: Sequence[Slot], goal: Tensor, seed: int = 0
) -> Lookup:
    """Fill the table in, on select images alone.

    Args:
        members: what may be sent.
        link: the channel at a given SNR (AWGN), and its block error rates.
        snrs_db, slots: of the cells: lower ends, ascending; channel uses and deadline, both set.
        goal, seed: as of `tokmerge.channel.comparison.contest`.
    """
    choices = []
    for slot in slots:
        assert slot.uses is not None
        for snr_db in tqdm(list(snrs_db), desc=f"{slot.uses} uses, {slot.deadline_s:g} s", unit="SNR"):
            tried = options(members, link, snr_db, slot, goal, n_caps=2, seed=seed)
            best = max(score for score, _, _ in tried)
            timed = [(float(latency_s(members[index].select, slot, link, cap).mean()), score, index, cap)
                     for score, index, cap in tried if score >= best - SCORE_SLACK]  # fmt: skip
            seconds, score, index, cap = min(timed, key=lambda one: one[0])
            choices.append(Choice(slot.uses, slot.deadline_s, float(snr_db), index, cap, score, seconds))
    return Lookup(tuple((member.name, member.precision) for member in members), tuple(choices))


def fading_trace(n: int, mean_db: float, doppler: float, generator: torch.Generator) -> np.ndarray:
    """(n,) SNRs in dB of a Rayleigh channel over time, one per slot.

    The gain is a sum of 32 plane waves from evenly spread directions with random phases (Clarke's model, as Jakes
    simulates it). ``doppler`` is the largest Doppler shift times the length of a slot: 0.01 fades about once in a
    hundred slots.
    """
    waves = 32
    angles = 2 * math.pi * (torch.arange(waves) + torch.rand((), generator=generator)) / waves
    phases = 2 * math.pi * torch.rand(waves, generator=generator)
    time = torch.arange(n, dtype=torch.float64)[:, None]
    shifts = 2 * math.pi * doppler * angles.cos().double()
    gain = torch.polar(torch.ones((), dtype=torch.float64), time * shifts + phases.double()).sum(1) / waves**0.5
    return mean_db + (10 * gain.abs().square().clamp(min=1e-9).log10()).numpy()


def estimate_snr(snrs_db: np.ndarray, pilots: int, generator: torch.Generator) -> np.ndarray:
    """(n,) what a device takes SNRs in dB for that hears so many pilots of each slot from its server.

    The average of P pilots is the gain and noise of a P-th of the variance; its power, less what noise adds on average.
    """
    snr = torch.from_numpy(10 ** (np.asarray(snrs_db) / 10))
    heard = snr.sqrt() + torch.randn(len(snr), dtype=torch.complex128, generator=generator) / pilots**0.5
    return (10 * (heard.abs().square() - 1 / pilots).clamp(min=1e-3).log10()).numpy()


def follow_trace(
    table: Lookup, senders: Sequence[Sent], link: Link, snrs_db: np.ndarray, believed_db: np.ndarray, slot: Slot,
    labels: Tensor, seed: int,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """One image per slot of a trace, each sent as the table says for what the device believes of the SNR.

    Args:
        table, senders: choices, and what each member of the table does with the images.
        link, slot: the channel at a given SNR, its bandwidth and deadline.
        snrs_db, believed_db: (B,) what the SNR is, and what the device takes it for.
        labels, seed: of the images, and of the draws.

    Returns:
        (B,) how well each image is answered, from 0 to 1; (B,) seconds each takes.
    """
    assert slot.uses is not None
    picks = [table.pick(float(snr), slot.uses, slot.deadline_s) for snr in believed_db]
    right, seconds = np.zeros(len(picks)), np.zeros(len(picks))
    for index, cap in sorted({(one.member, one.cap) for one in picks}):
        rows = np.array([(one.member, one.cap) == (index, cap) for one in picks])
        got, taken = fixed_choice(senders[index], cap, link, snrs_db, slot, labels, seed)
        right[rows], seconds[rows] = got[rows], taken[rows]
    return right, seconds


def fixed_choice(
    sent: Sent, cap: int, link: Link, snrs_db: np.ndarray, slot: Slot, labels: Tensor, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """As `follow_trace`, with one choice for all slots."""
    generator = torch.Generator().manual_seed(seed)
    answers = sent.deliver(link, snrs_db[:, None], slot.uses_for(sent), cap, generator)
    return agreement(answers, labels).numpy(), latency_s(sent, slot, link, cap).numpy()


def lookup_to_json(table: Lookup) -> dict[str, Any]:
    """A table as plain values."""
    return {"version": LOOKUP_VERSION, **asdict(table)}


def load_lookup(path: str | Path) -> Lookup:
    """Read a JSON file of what `lookup_to_json` gave; a ValueError names it if it is another version, or no table."""
    content = store.load_json(path)
    if content.get("version") != LOOKUP_VERSION:
        raise ValueError(f"{path}: version {content.get('version')!r}, this package reads version {LOOKUP_VERSION}")
    try:
        choices = tuple(Choice(**cell) for cell in content["choices"])
        return Lookup(tuple((str(name), str(precision)) for name, precision in content["members"]), choices)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a lookup table ({error}): run notebooks/55_channel_study again") from error
