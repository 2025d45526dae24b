"""What to send when: a table computed offline that a device looks its choice up in.

For every bandwidth, deadline and SNR the table names what answered most search images as it should: which member
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

from tokmerge import store
from tokmerge.delivery import Air
from tokmerge.schemes import Member, Slot, hits

LOOKUP_VERSION = 1


@dataclass(frozen=True)
class Choice:
    """One cell of the table.

    Attributes:
        uses: channel uses an image may take.
        deadline_s: from image to answer.
        snr_db: lower end of the cell.
        member: index of what is sent.
        cap: index of the fastest scheme.
        score: share of search images answered as they should be, see `compute`.
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
    """The table.

    Attributes:
        members: name and precision of what the choices may name.
        choices: the cells.
    """

    members: tuple[tuple[str, str], ...]
    choices: tuple[Choice, ...]

    def pick(self, snr_db: float, uses: int, deadline_s: float) -> Choice:
        """The choice for a state of the link: of the cell at or below it in every direction.

        Args:
            snr_db: what the device believes of the SNR; below the table's range its lowest row holds.
            uses: channel uses it may take.
            deadline_s: from image to answer.

        Raises:
            ValueError: less bandwidth or time than the table begins with.

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


def latency_s(member: Any, slot: Slot, air: Air, cap: int) -> Tensor:
    """(B,) seconds from image to answer: computing, and the channel uses really taken."""
    uses = slot.of(member)
    taken = member.taken(air, uses, cap)
    return slot.computing_s(member) + taken.double() / slot.symbols_per_s


def compute(
    members: Sequence[Member], air: Air, snrs_db: Iterable[float], slots: Sequence[Slot], goal: Tensor,
    n_caps: int = 2, slack: float = 0.002, seed: int = 0,
) -> Lookup:  # fmt: skip
    """Fill the table in, on search images alone.

    Args:
        members: what may be sent.
        air: the channel at a given SNR (AWGN), and its block error rates.
        snrs_db: lower ends of the cells, ascending.
        slots: bandwidth and deadline of the cells; both must be set.
        goal: what answers on search images are compared with: labels, or the answers of the model itself.
        n_caps: fastest schemes to try, see `tokmerge.schemes.Member.caps`.
        slack: a choice this close to the best counts as as good.
        seed: of the draws.
    """
    choices = []
    for slot in slots:
        for snr_db in tqdm(list(snrs_db), desc=f"{slot.uses} uses, {slot.deadline_s:g} s", unit="SNR"):
            tried = []
            for index, member in enumerate(members):
                for cap in member.caps(air, snr_db, n_caps):
                    score = hits(member.search, goal, air, snr_db, slot.of(member.search), cap, 1, seed).mean()
                    seconds = float(latency_s(member.search, slot, air, cap).mean())
                    tried.append((float(score), seconds, index, cap))
            best = max(one[0] for one in tried)
            score, seconds, index, cap = min((one for one in tried if one[0] >= best - slack), key=lambda one: one[1])
            assert slot.uses is not None
            choices.append(Choice(slot.uses, slot.deadline_s, float(snr_db), index, cap, score, seconds))
    return Lookup(tuple((member.name, member.precision) for member in members), tuple(choices))


def restrict(table: Lookup, members: Collection[tuple[str, str]]) -> Lookup:
    """The table without the choices that name other members.

    Raises:
        ValueError: none is left.
    """
    kept = [index for index, name in enumerate(table.members) if name in members]
    choices = tuple(replace(one, member=kept.index(one.member)) for one in table.choices if one.member in kept)
    if not choices:
        raise ValueError(f"the table names none of {', '.join(map(str, sorted(members)))}")
    return Lookup(tuple(table.members[index] for index in kept), choices)


def fading_trace(n: int, mean_db: float, doppler: float, generator: torch.Generator) -> np.ndarray:
    """(n,) SNRs in dB of a Rayleigh channel over time, one per slot.

    The gain is a sum of 32 plane waves from evenly spread directions with random phases (Clarke's model, as Jakes
    simulates it).

    Args:
        n: slots.
        mean_db: average SNR.
        doppler: largest Doppler shift times the length of a slot: 0.01 fades about once in a hundred slots.
        generator: of the phases.
    """
    waves = 32
    angles = 2 * math.pi * (torch.arange(waves) + torch.rand((), generator=generator)) / waves
    phases = 2 * math.pi * torch.rand(waves, generator=generator)
    time = torch.arange(n, dtype=torch.float64)[:, None]
    shifts = 2 * math.pi * doppler * angles.cos().double()
    gain = torch.polar(torch.ones((), dtype=torch.float64), time * shifts + phases.double()).sum(1) / waves**0.5
    return mean_db + (10 * gain.abs().square().clamp(min=1e-9).log10()).numpy()


def follow(
    table: Lookup, members: Sequence[Member], air: Air, snrs_db: np.ndarray, believed_db: np.ndarray, slot: Slot,
    labels: Tensor, part: str, seed: int,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """One image per slot of a trace, each sent as the table says for what the device believes of the SNR.

    Args:
        table: choices.
        members: that the table names.
        air: the channel at a given SNR.
        snrs_db: (B,) what the SNR is.
        believed_db: (B,) what the device takes it for.
        slot: bandwidth and deadline.
        labels: of the images.
        part: "search" or "test".
        seed: of the draws.

    Returns:
        (B,) bool, which images are answered rightly; (B,) seconds each takes.
    """
    assert slot.uses is not None
    picks = [table.pick(float(snr), slot.uses, slot.deadline_s) for snr in believed_db]
    right, seconds = np.zeros(len(picks), dtype=bool), np.zeros(len(picks))
    for index, cap in sorted({(one.member, one.cap) for one in picks}):
        rows = np.array([(one.member, one.cap) == (index, cap) for one in picks])
        one = getattr(members[index], part)
        got, taken = fixed(one, cap, air, snrs_db, slot, labels, seed)
        right[rows], seconds[rows] = got[rows], taken[rows]
    return right, seconds


def fixed(
    one: Any, cap: int, air: Air, snrs_db: np.ndarray, slot: Slot, labels: Tensor, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """As `follow`, with one choice for all slots."""
    generator = torch.Generator().manual_seed(seed)
    answers = one.deliver(air, snrs_db[:, None], slot.of(one), cap, generator)
    return (answers == labels).numpy(), latency_s(one, slot, air, cap).numpy()


def save(table: Lookup, path: str | Path) -> None:
    """Write a table as JSON."""
    store.save_json({"version": LOOKUP_VERSION, **asdict(table)}, path)


def load(path: str | Path) -> Lookup:
    """Read a table that `save` wrote.

    Raises:
        ValueError: it is of another version, or not such a table; the message names the file.
    """
    content = store.load_json(path)
    if content.get("version") != LOOKUP_VERSION:
        raise ValueError(f"{path}: version {content.get('version')!r}, this package reads version {LOOKUP_VERSION}")
    try:
        choices = tuple(Choice(**cell) for cell in content["choices"])
        return Lookup(tuple((str(name), str(precision)) for name, precision in content["members"]), choices)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a lookup table ({error}): run notebooks/55_channel_study again") from error
