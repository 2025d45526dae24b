"""Who competes for the channel: the members of every family, on the select and the test images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from tokmerge.channel.analog import LearnedCodec, LinearCodec, SentAnalog, size_weight, to_features
from tokmerge.channel.segmentation import LINK_CHUNK, Segmentation
from tokmerge.channel.transmission import Link, Sent, SentPayloads, SentTokens, Uses, send_image_tokens
from tokmerge.data.image_sets import Batch, ImageSet
from tokmerge.evaluation import image_codecs
from tokmerge.evaluation.outcomes import decide
from tokmerge.merging.calibration import Calibration
from tokmerge.merging.matching import Policy
from tokmerge.merging.policies import Threshold
from tokmerge.models.patching import patch
from tokmerge.models.zoo import transform


@dataclass(frozen=True)
class Member:
    """One way of a family to send images.

    Args:
        family, name, precision: what it belongs to; its policy, or whatever sets it apart; of its payloads.
        select, test: what it does with the select and the test images.
        sending: "cut off": what the slot does not hold of a payload is left out, and how fast the fastest scheme
            may be is chosen; "whole": always the most robust scheme that the whole payload fits with; "analog".
    """

    family: str
    name: str
    precision: str
    select: Sent
    test: Sent
    sending: str = "cut off"

    def caps(self, link: Link, snr_db: float, most: int) -> list[int]:
        """Fastest schemes worth a try: the last ``most`` that get through at the average SNR, where that matters."""
        schemes = range(len(link.rates.schemes))
        if self.sending != "cut off":
            return [schemes[-1]]
        fastest = max((index for index in schemes if link.rates.probability(index, snr_db) < 0.9), default=0)
        return list(range(max(0, fastest - most + 1), fastest + 1))


@dataclass(frozen=True)
class SentFiles(SentPayloads):
    """Image files, which are of use only as a whole.

    Attributes:
        file_bytes, answers: (B,) of each file, and (B, ...) what the server answers to it.
        blind_answer: (...) what it answers to a file that does not arrive.
    """

    file_bytes: Tensor
    answers: Tensor
    blind_answer: Tensor

    def segmentation(self, info_bits: Tensor | int) -> Segmentation:
        return Segmentation.of_files(self.file_bytes, info_bits)

    def _answer(self, received: Tensor, how: str) -> Tensor:
        answers = self.answers.clone()
        answers[~received] = self.blind_answer
        return answers


@dataclass(frozen=True)
class Slot:
    """What one image may take of the channel and of time.

    Args:
        uses: channel uses; None: as many as the deadline leaves.
        deadline_s: from image to answer.
        symbols_per_s, edge_macs_per_s, server_macs_per_s: speed of the channel, of device and server.
    """

    uses: int | None = None
    deadline_s: float = 0.1
    symbols_per_s: float = 1e5
    edge_macs_per_s: float = 2e9
    server_macs_per_s: float = 2e11

    def computing_s(self, sent: Sent) -> Tensor:
        """(B,) seconds of computing on device and server."""
        edge, server = sent.edge_macs.double(), (sent.macs - sent.edge_macs).double()
        return edge / self.edge_macs_per_s + server / self.server_macs_per_s

    def uses_for(self, sent: Sent) -> Uses:
        """Channel uses of an image: one number, or (B,)."""
        if self.uses is not None:
            return self.uses
        left = (self.deadline_s - self.computing_s(sent)).clamp(min=0)
        return (left * self.symbols_per_s).long()


def late_profiles(calibration: Calibration, split_layer: int, shares: Sequence[float]) -> list[Threshold]:
    """Threshold policies that merge late: nothing in the first blocks, the more the nearer the split is.

    Early merging saves computing; for what is sent alone it is better to wait until tokens have seen each other.

    Args:
        calibration, split_layer: maps shares of tokens to thresholds; blocks on the device, after which nothing merges.
        shares: of set A that merge in the block before the split, half as much where merging begins; beyond 1, blocks
            before it merge everything as well.
    """
    depth = len(calibration.quantiles)
    policies = []
    for first in range(split_layer - 1):
        for share in shares:
            rising = np.linspace(share / 2, share, split_layer - first).clip(max=1)
            u = [0.0] * first + rising.tolist() + [0.0] * (depth - split_layer)
            policies.append(Threshold(calibration.thresholds(u)))
    return policies


def thin_out(table: pd.DataFrame, n: int) -> pd.DataFrame:
    """Up to n points of a table (columns tokens, score), spread evenly over log tokens: for each goal the best
    that needs no more.

    >>> thin_out(pd.DataFrame({"tokens": [10, 11, 100], "score": [0.8, 0.9, 0.95]}), 2).tokens.tolist()
    [10, 100]
    """
    table = table.sort_values("tokens")
    best = table[table.score > table.score.cummax().shift(fill_value=-1.0)]
    goals = np.geomspace(best.tokens.iloc[0], best.tokens.iloc[-1], n)
    # Of the points that need no more than the goal, the best, which on this staircase is the last.
    chosen = np.searchsorted(best.tokens.to_numpy(), goals * (1 + 1e-9), side="right") - 1
    return best.iloc[sorted(set(chosen.tolist()))]


def token_members(
    family: str, name: str, model: nn.Module, policy: Policy | None, split_layer: int, select: Batch, test: Batch,
    precisions: Sequence[str], chunk_tokens: int = LINK_CHUNK,
) -> list[Member]:  # fmt: skip
    """One member per precision; what it puts in the place of lost tokens is known from the select images."""
    merged = patch(model, policy, split_layer=split_layer)
    on_select = send_image_tokens(merged, select.images, precisions, chunk_tokens=chunk_tokens)
    prototype = on_select[precisions[0]].server.prototype
    on_test = send_image_tokens(merged, test.images, precisions, prototype, chunk_tokens)
    return [Member(family, name, precision, on_select[precision], on_test[precision]) for precision in precisions]


def analog_member(family: str, member: Member, codec: LearnedCodec | LinearCodec | None = None) -> Member:
    """A member's tokens, of the finest precision, sent by a learned codec or by the linear one of its select tokens."""
    select, test = member.select, member.test
    assert isinstance(select, SentTokens)
    assert isinstance(test, SentTokens)
    if codec is None:
        weight = size_weight(select.tokens)
        codec = LinearCodec.of(to_features(select.tokens, None if select.sizes is None else weight), weight)
    on_select, on_test = (SentAnalog(part.edge_macs, part.macs, part, codec) for part in (select, test))
    return Member(family, member.name, "analog", on_select, on_test, "analog")


@torch.inference_mode()
def send_files(model: Any, images: ImageSet, format: str, quality: int) -> SentFiles:
    """Images, held in memory, as "jpeg" (without the tables, which both ends know) or "webp"; nothing is merged."""
    merged, prepare = patch(model, None), transform(model)
    n_bytes, seen = [], []
    for example in images.examples():
        payload = image_codecs.compress(example.image, format, quality)
        n_bytes.append(image_codecs.scan_bytes(payload) if format == "jpeg" else len(payload))
        seen.append(prepare(image_codecs.decompress(payload, example.image.mode)))
    device, blank = next(merged.parameters()).device, torch.zeros_like(seen[0])
    parts = [merged(part.to(device)) for part in torch.stack([*seen, blank]).split(64)]
    answers = torch.cat([decide(logits) for logits, _ in parts]).cpu()
    macs = torch.cat([record.macs for _, record in parts])[:-1].cpu()
    return SentFiles(torch.zeros_like(macs), macs, torch.tensor(n_bytes), answers[:-1], answers[-1])


def file_members(
    model: nn.Module, select: ImageSet, test: ImageSet, qualities: Mapping[str, Sequence[int]]
) -> list[Member]:
    """Image files, a family per format, a member per quality."""
    members = []
    for format, some in qualities.items():
        for quality in some:
            on_select, on_test = (send_files(model, images, format, quality) for images in (select, test))
            members.append(Member(format, f"quality {quality}", "file", on_select, on_test, "whole"))
    return members
