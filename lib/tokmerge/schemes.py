"""Transmission schemes against each other: every one at its best, in the same number of channel uses.

A family (unmerged, fixed ratio, adaptive, image files) has members: policy, precision, quality. For every SNR a family
chooses member and fastest modulation and coding scheme on search images; only that choice meets the test images.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from tokmerge import codecs, data
from tokmerge.delivery import Air, lost, taken
from tokmerge.models import transform
from tokmerge.vit import patch


class Delivers(Protocol):
    """What a member does with one set of images."""

    @property
    def edge_macs(self) -> Tensor:
        """(B,) on the device."""
        ...

    @property
    def macs(self) -> Tensor:
        """(B,) in all."""
        ...

    def deliver(
        self, air: Air, snr_db: float | np.ndarray, uses: int | Tensor, cap: int, generator: torch.Generator
    ) -> Tensor:
        """(B,) classes the server gives, see `tokmerge.delivery.Sent.deliver`."""
        ...


@dataclass(frozen=True)
class Member:
    """One way of a family to send images.

    Args:
        family: it belongs to.
        name: of its policy, or whatever sets it apart.
        precision: of its payloads.
        search, test: what it does with the search and the test images.
        sending: "cut off": what the slot does not hold of a payload is left out, and how fast the fastest scheme
            may be is chosen; "whole": always the most robust scheme that the whole payload fits with; "analog".
    """

    family: str
    name: str
    precision: str
    search: Delivers
    test: Delivers
    sending: str = "cut off"

    def caps(self, air: Air, snr_db: float, most: int) -> list[int]:
        """Fastest schemes worth a try, see `caps`."""
        return caps(air, snr_db, most) if self.sending == "cut off" else [len(air.rates.schemes) - 1]


@dataclass(frozen=True)
class Whole:
    """Payloads that are of use only as a whole: image files.

    Attributes:
        n_bytes: (B,) of each file.
        answers: (B,) classes the server gives for them.
        nothing: class it gives when nothing arrives.
        edge_macs, macs: (B,) on the device and in all.
    """

    n_bytes: Tensor
    answers: Tensor
    nothing: int
    edge_macs: Tensor
    macs: Tensor

    def deliver(
        self, air: Air, snr_db: float | np.ndarray, uses: int | Tensor, cap: int, generator: torch.Generator
    ) -> Tensor:
        """As `tokmerge.delivery.Sent.deliver`."""
        _, errors = lost(self.n_bytes, air, snr_db, uses, cap, generator)
        return torch.where(errors.any(1), self.nothing, self.answers)

    def taken(self, air: Air, uses: int | Tensor, cap: int) -> Tensor:
        """As `tokmerge.delivery.Sent.taken`."""
        return taken(self.n_bytes, air, uses, cap)


@dataclass(frozen=True)
class Slot:
    """What one image may take of the channel and of time.

    Args:
        uses: channel uses; None: as many as the deadline leaves.
        deadline_s: from image to answer.
        symbols_per_s: channel uses in a second.
        edge_macs_per_s, server_macs_per_s: speed of device and server.
    """

    uses: int | None = None
    deadline_s: float = 0.1
    symbols_per_s: float = 1e5
    edge_macs_per_s: float = 2e9
    server_macs_per_s: float = 2e11

    def computing_s(self, member: Any) -> Tensor:
        """(B,) seconds of computing on device and server."""
        edge, server = member.edge_macs.double(), (member.macs - member.edge_macs).double()
        return edge / self.edge_macs_per_s + server / self.server_macs_per_s

    def of(self, member: Delivers) -> int | Tensor:
        """Channel uses of an image: one number, or (B,)."""
        if self.uses is not None:
            return self.uses
        left = (self.deadline_s - self.computing_s(member)).clamp(min=0)
        return (left * self.symbols_per_s).long()


def caps(air: Air, snr_db: float, most: int) -> list[int]:
    """Fastest schemes worth a try: the last few of those that get through at the average SNR.

    Args:
        air: the channel.
        snr_db: average SNR.
        most: how many; over fading channels slower ones are worth it.
    """
    n = len(air.rates.schemes)
    through = [index for index in range(n) if air.rates.probability(index, snr_db) < 0.9] or [0]
    return list(range(max(0, through[-1] - most + 1), through[-1] + 1))


def hits(
    one: Delivers, labels: Tensor, air: Air, snr_db: float, uses: int | Tensor, cap: int, draws: int, seed: int
) -> np.ndarray:
    """(B,) share of channel draws in which each image is answered rightly."""
    total = torch.zeros(len(labels))
    for draw in range(draws):
        generator = torch.Generator().manual_seed(10_000 * seed + draw)
        total += one.deliver(air, snr_db, uses, cap, generator) == labels
    return (total / draws).numpy()


def interval(values: np.ndarray) -> tuple[float, float]:
    """Mean over images, and half the width of its 95 % interval."""
    return float(values.mean()), float(1.96 * values.std(ddof=1) / len(values) ** 0.5)


def contest(
    members: Sequence[Member], air: Air, snrs_db: Iterable[float], slot: Slot, search_goal: Tensor,
    test_labels: Tensor, n_caps: int = 2, draws: int = 3, seed: int = 0, base: str = "unmerged",
) -> pd.DataFrame:  # fmt: skip
    """Accuracy of every family against the SNR.

    Args:
        members: of all families.
        air: the channel.
        snrs_db: average SNRs.
        slot: what one image may take.
        search_goal: what answers on search images are compared with to choose: their labels or, since most errors are
            common to all members, better the answers of the model itself.
        test_labels: of the test images.
        n_caps: fastest schemes to try, see `caps`.
        draws: of the channel, per test image.
        seed: of the draws; the same for all members.
        base: family that the others are compared with, image by image.

    Returns:
        One row per SNR and family: its choice (member, precision, cap), search_score, top1 on test images with
        top1_half, and over ``base`` gain with gain_half; halves of 95 % intervals over images and draws.
    """
    families = list(dict.fromkeys(member.family for member in members))
    rows: list[dict[str, Any]] = []
    answered: dict[tuple[float, str], np.ndarray] = {}
    for snr_db in tqdm(list(snrs_db), desc=air.channel.kind, unit="SNR"):
        for family in families:
            best: tuple[float, Member, int] | None = None
            for member in (one for one in members if one.family == family):
                for cap in member.caps(air, snr_db, n_caps):
                    uses = slot.of(member.search)
                    score = hits(member.search, search_goal, air, snr_db, uses, cap, 1, seed).mean()
                    if best is None or score > best[0]:
                        best = (float(score), member, cap)
            assert best is not None
            score, member, cap = best
            right = hits(member.test, test_labels, air, snr_db, slot.of(member.test), cap, draws, seed + 1)
            answered[snr_db, family] = right
            top1, half = interval(right)
            rows.append({
                "snr_db": float(snr_db), "family": family, "member": member.name, "precision": member.precision,
                "cap": str(air.rates.schemes[cap]) if member.sending == "cut off" else member.sending,
                "search_score": score, "top1": top1, "top1_half": half,
            })  # fmt: skip
    table = pd.DataFrame(rows)
    if base in families:
        differences = [
            interval(answered[snr_db, family] - answered[snr_db, base])
            for snr_db, family in zip(table.snr_db, table.family, strict=True)
        ]
        table["gain"], table["gain_half"] = zip(*differences, strict=True)
    return table


def gain_db(table: pd.DataFrame, family: str, base: str, at_db: float) -> tuple[float, bool]:
    """How much less SNR a family needs for the accuracy that another has at some SNR.

    Args:
        table: columns snr_db, family, top1, as `contest` gives them.
        family, base: the two.
        at_db: SNR of the base; one of the table, or between two.

    Returns:
        Decibels, linear in between the SNRs of the table; and whether that is a bound: the family is as accurate
        already at the lowest SNR of the table (at least so much), or nowhere (minus infinity is not returned, but how
        much more the largest SNR is).

    >>> rows = [(0, "a", 0.5), (10, "a", 0.9), (0, "b", 0.1), (10, "b", 0.7)]
    >>> gain, bound = gain_db(pd.DataFrame(rows, columns=["snr_db", "family", "top1"]), "a", "b", 10)
    >>> round(gain, 6), bound
    (5.0, False)
    """
    curves = {name: part.sort_values("snr_db") for name, part in table.groupby("family")}
    goal = float(np.interp(at_db, curves[base].snr_db, curves[base].top1))
    snr, top1 = curves[family].snr_db.to_numpy(), curves[family].top1.to_numpy()
    reached = np.flatnonzero(top1 >= goal)
    if not len(reached) or reached[0] == 0:
        return float(at_db - snr[-1 if not len(reached) else 0]), True
    above = reached[0]
    share = (goal - top1[above - 1]) / (top1[above] - top1[above - 1])
    return float(at_db - (snr[above - 1] + share * (snr[above] - snr[above - 1]))), False


@torch.inference_mode()
def files(model: Any, images: data.ImageSet, format: str, quality: int) -> Whole:
    """Images sent as files that the server decodes and classifies, all of it unmerged.

    Args:
        model: timm VisionTransformer.
        images: small enough to be held in memory.
        format: "jpeg" (without headers and tables, which both ends know: `tokmerge.codecs.scan_bytes`) or "webp".
        quality: 1 to 100.
    """
    config, merged = model.pretrained_cfg, patch(model, None)
    n_bytes: list[int] = []
    answers, macs = [], []
    for batch in data.batches(replace(images, stream=_through(images, format, quality, n_bytes)), transform(model), 64):
        logits, record = merged(batch.images)
        answers.append(logits.argmax(1))
        macs.append(record.macs)
    blank = merged(torch.zeros(1, *config["input_size"]))[0].argmax()
    total = torch.cat(macs)
    return Whole(torch.tensor(n_bytes), torch.cat(answers), int(blank), torch.zeros_like(total), total)


def _through(images: data.ImageSet, format: str, quality: int, n_bytes: list[int]) -> Any:
    """A stream of the images as their files show them; notes each file's bytes."""

    def stream(start: int) -> Iterator[data.Example]:
        for example in images.examples(start):
            mode = example.image.mode
            payload = codecs.compress(example.image, format, quality)
            n_bytes.append(codecs.scan_bytes(payload) if format == "jpeg" else len(payload))
            yield example._replace(image=codecs.decompress(payload, mode))

    return stream
