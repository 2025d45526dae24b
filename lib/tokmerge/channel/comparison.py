"""Transmission schemes against each other: every one at its best, in the same number of channel uses.

A family (unmerged, fixed ratio, adaptive, image files) has members: policy, precision, quality. For every SNR a family
chooses member and fastest modulation and coding scheme on search images; only that choice meets the test images.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from tokmerge.channel.schemes import Member, Slot
from tokmerge.channel.transmission import Link, Sent, Uses


def hits(
    sent: Sent, goal: Tensor, link: Link, snr_db: float, uses: Uses, cap: int, draws: int, seed: int
) -> np.ndarray:
    """(B,) share of channel draws in which each image is answered as (B,) ``goal`` says."""
    total = torch.zeros(len(goal))
    for draw in range(draws):
        generator = torch.Generator().manual_seed(10_000 * seed + draw)
        total += sent.deliver(link, snr_db, uses, cap, generator) == goal
    return (total / draws).numpy()


def interval(values: np.ndarray) -> tuple[float, float]:
    """Mean over images, and half the width of its 95 % interval."""
    return float(values.mean()), float(1.96 * values.std(ddof=1) / len(values) ** 0.5)


def options(
    members: Sequence[Member], link: Link, snr_db: float, slot: Slot, goal: Tensor, n_caps: int, seed: int
) -> list[tuple[float, int, int]]:
    """Score on search images, index of the member and of its fastest scheme, for all that is worth a try."""
    return [
        (float(hits(one.search, goal, link, snr_db, slot.uses_for(one.search), cap, 1, seed).mean()), index, cap)
        for index, one in enumerate(members)
        for cap in one.caps(link, snr_db, n_caps)
    ]


def contest(
    members: Sequence[Member], link: Link, snrs_db: Iterable[float], slot: Slot, search_goal: Tensor,
    test_labels: Tensor, n_caps: int = 2, draws: int = 3, seed: int = 0, base: str = "unmerged",
) -> pd.DataFrame:  # fmt: skip
    """Accuracy of every family against the SNR.

    Args:
        members: of all families.
        link, snrs_db, slot: the channel, its average SNRs, and what one image may take of it.
        search_goal: what answers on search images are compared with to choose: their labels or, since most errors are
            common to all members, better the answers of the model itself.
        test_labels: of the test images.
        n_caps: fastest schemes to try, see `Member.caps`.
        draws, seed: of the channel, per test image; the same for all members.
        base: family that the others are compared with, image by image.

    Returns:
        One row per SNR and family: its choice (member, precision, cap), search_score, top1 on test images with
        top1_half, and over ``base`` gain with gain_half; halves of 95 % intervals over images and draws.
    """
    families = {one.family: [other for other in members if other.family == one.family] for one in members}
    rows: list[dict[str, Any]] = []
    for snr_db in tqdm(list(snrs_db), desc=link.channel.kind, unit="SNR"):
        right = {}
        for family, own in families.items():
            tried = options(own, link, snr_db, slot, search_goal, n_caps, seed)
            score, index, cap = max(tried, key=lambda option: option[0])
            member, uses = own[index], slot.uses_for(own[index].test)
            right[family] = hits(member.test, test_labels, link, snr_db, uses, cap, draws, seed + 1)
            top1, half = interval(right[family])
            rows.append({
                "snr_db": float(snr_db), "family": family, "member": member.name, "precision": member.precision,
                "cap": str(link.rates.schemes[cap]) if member.sending == "cut off" else member.sending,
                "search_score": score, "top1": top1, "top1_half": half,
            })  # fmt: skip
        for row in rows[-len(families) :] if base in families else ():
            row["gain"], row["gain_half"] = interval(right[row["family"]] - right[base])
    return pd.DataFrame(rows)


def gain_db(table: pd.DataFrame, family: str, base: str, at_db: float) -> tuple[float, bool]:
    """How many decibels less a family needs for the accuracy that ``base`` has at an SNR.

    Args:
        table: columns snr_db, family, top1, as `contest` gives them; linear in between.
        family, base, at_db: the two, and the SNR of the base.

    Returns:
        Decibels, and whether they are a bound: the family is as accurate already at the lowest SNR of the table (at
        least so much), or nowhere (how much more the largest SNR is).

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
