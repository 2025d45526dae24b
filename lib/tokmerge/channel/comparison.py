"""Transmission schemes against each other: every one at its best, in the same number of channel uses.

A family (unmerged, fixed ratio, adaptive, image files) has members: policy, precision, quality. For every SNR a family
chooses member and fastest modulation and coding scheme on select images; only that choice meets the test images.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from tokmerge.channel.schemes import Member, Slot
from tokmerge.channel.transmission import Link, Sent, Uses
from tokmerge.evaluation import selection
from tokmerge.evaluation.outcomes import agreement


def hits(
    sent: Sent, goal: Tensor, link: Link, snr_db: float, uses: Uses, cap: int, draws: int, seed: int
) -> np.ndarray:
    """(B,) agreement of what is answered with ``goal``, a mean over channel draws: of classes, how often it is that."""
    total = torch.zeros(len(goal), dtype=torch.float64)
    for draw in range(draws):
        generator = torch.Generator().manual_seed(10_000 * seed + draw)
        total += agreement(sent.deliver(link, snr_db, uses, cap, generator), goal)
    return (total / draws).numpy()


def options(
    members: Sequence[Member], link: Link, snr_db: float, slot: Slot, goal: Tensor, n_caps: int, seed: int
) -> list[tuple[float, int, int]]:
    """Score on select images, index of the member and of its fastest scheme, for all that is worth a try."""
    return [
        (float(hits(one.select, goal, link, snr_db, slot.uses_for(one.select), cap, 1, seed).mean()), index, cap)
        for index, one in enumerate(members)
        for cap in one.caps(link, snr_db, n_caps)
    ]


def contest(
    members: Sequence[Member], link: Link, snrs_db: Iterable[float], slot: Slot, goal: Tensor,
    test_labels: Tensor, n_caps: int = 2, draws: int = 3, seed: int = 0, base: str = "unmerged",
) -> pd.DataFrame:  # fmt: skip
    """Accuracy of every family against the SNR.

    Args:
        members: of all families.
        link, snrs_db, slot: the channel, its average SNRs, and what one image may take of it.
        goal: what answers on select images are compared with to choose: their labels or, since most errors are common
            to all members, better the answers of the model itself.
        test_labels: of the test images.
        n_caps: fastest schemes to try, see `Member.caps`.
        draws, seed: of the channel, per test image; the same for all members.
        base: family that the others are compared with, image by image.

    Returns:
        One row per SNR and family: its choice (member, precision, cap), select_score, score on test images with
        score_half, and over ``base`` gain with gain_half; halves of 95 % intervals over images and draws; and right,
        per test image the share of draws in which the answer is.
    """
    families = {one.family: [other for other in members if other.family == one.family] for one in members}
    rows: list[dict[str, Any]] = []
    for snr_db in tqdm(list(snrs_db), desc=link.channel.kind, unit="SNR"):
        right = {}
        for family, own in families.items():
            tried = options(own, link, snr_db, slot, goal, n_caps, seed)
            on_select, index, cap = max(tried, key=lambda option: option[0])
            member, uses = own[index], slot.uses_for(own[index].test)
            right[family] = hits(member.test, test_labels, link, snr_db, uses, cap, draws, seed + 1)
            score, half = selection.interval(right[family])
            rows.append({
                "snr_db": float(snr_db), "family": family, "member": member.name, "precision": member.precision,
                "cap": str(link.rates.schemes[cap]) if member.sending == "cut off" else member.sending,
                "select_score": on_select, "score": score, "score_half": half, "right": right[family].tolist(),
            })  # fmt: skip
        for row in rows[-len(families) :] if base in families else ():
            row["gain"], row["gain_half"] = selection.paired(right[row["family"]], right[base])
    return pd.DataFrame(rows)


class Gain(NamedTuple):
    """Decibels, their 95 % interval, and whether they are a bound only."""

    db: float
    low: float
    high: float
    bounded: bool


def cliff_gain_db(
    table: pd.DataFrame, family: str, over: str = "unmerged", slack: float = 0.01, draws: int = 1000
) -> Gain:
    """How many decibels less a family needs than another where the unmerged fall off the cliff.

    The cliff is ``slack`` below what they reach at the largest SNR; each curve, linear between SNRs, is followed
    upwards to where it first gets there. The interval is over images; `tokmerge.claims.with_step` adds the SNR step.

    Args:
        table: of one sweep, as `contest` gives it: columns snr_db, family, right.
        family, over, slack: who is compared with whom, and at which accuracy.
        draws: of a bootstrap over the test images.

    Returns:
        The gain; bounded where a curve is there at the smallest SNR already, or not even at the largest: those are
        taken in its place.

    >>> rows = [(0, "a", [0.5]), (10, "a", [0.9]), (0, "unmerged", [0.3]), (10, "unmerged", [0.71])]
    >>> gain = cliff_gain_db(pd.DataFrame(rows, columns=["snr_db", "family", "right"]), "a", draws=2)
    >>> round(gain.db, 3), gain.bounded
    (4.756, False)
    """
    ordered = table.sort_values("snr_db")
    right = {name: np.stack([np.asarray(row, float) for row in part.right]) for name, part in ordered.groupby("family")}
    snrs = ordered[ordered.family == "unmerged"].snr_db.to_numpy(float)

    def reached(curve: np.ndarray, goal: float) -> tuple[float, bool]:
        above = np.flatnonzero(curve >= goal)
        if not len(above) or above[0] == 0:
            return float(snrs[0 if len(above) else -1]), True
        last = above[0]
        return float(np.interp(goal, curve[last - 1 : last + 1], snrs[last - 1 : last + 1])), False

    def gain(images: np.ndarray) -> tuple[float, bool]:
        goal = right["unmerged"][-1, images].mean() - slack
        (theirs, one), (own, other) = (reached(right[name][:, images].mean(1), goal) for name in (over, family))
        return theirs - own, one or other

    n, rng = right["unmerged"].shape[1], np.random.default_rng(0)
    db, bounded = gain(np.arange(n))
    low, high = np.quantile([gain(rng.integers(n, size=(n,)))[0] for _ in range(draws)], [0.025, 0.975])
    return Gain(db, float(low), float(high), bounded)
