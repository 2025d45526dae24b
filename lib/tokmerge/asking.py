"""Visual question answering over the air: what a LLaVA answers when some visual tokens do not arrive.

Every question is asked of an image that is sent for it alone. Lost tokens are left out; when none arrives the language
model has the question and nothing else.
"""

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from tokmerge import llava, vqa, wire
from tokmerge.answering import Answering
from tokmerge.delivery import Air, arrive, taken
from tokmerge.fragments import AIR_CHUNK_TOKENS, Fragments, travel_order
from tokmerge.llava import MergedLlava
from tokmerge.packed import Layout, Packed
from tokmerge.policies import Policy
from tokmerge.schemes import Member
from tokmerge.visual import Seen


@dataclass
class Asked:
    """Questions put to a LLaVA whose visual tokens are sent.

    Attributes:
        merged: the model with its policy and precision.
        answering: questions and prompts.
        seen: tokens of each batch, a row per question, as they arrive if nothing is lost.
        chunk_tokens: tokens per chunk.
        edge_macs, macs: (B,) on the device (the vision tower) and in all.
    """

    merged: MergedLlava
    answering: Answering
    seen: list[Seen]
    chunk_tokens: int
    edge_macs: Tensor
    macs: Tensor
    _told: dict[bytes, Tensor] = field(default_factory=dict, repr=False)

    @property
    def layout(self) -> Layout:
        """Tokens of every question's image."""
        return Layout(torch.cat([seen.tokens.lengths for seen in self.seen]))

    def fragments(self, info_bits: Tensor | int) -> Fragments:
        """How the payloads lie in code blocks."""
        dim = self.seen[0].tokens.x.shape[1]
        return Fragments.of(self.layout, dim, self.merged.precision, None, info_bits, self.chunk_tokens)

    def deliver(
        self, air: Air, snr_db: float | np.ndarray, uses: int | Tensor, cap: int, generator: torch.Generator
    ) -> Tensor:
        """(B,) 1 where the answer is right, as `tokmerge.delivery.Sent.deliver`: compare with ones."""
        return self.right(arrive(self.fragments, air, snr_db, uses, cap, generator))

    def taken(self, air: Air, uses: int | Tensor, cap: int) -> Tensor:
        """As `tokmerge.delivery.Sent.taken`."""
        return taken(self.fragments(1).n_bytes, air, uses, cap)

    @torch.inference_mode()
    def right(self, received: Tensor) -> Tensor:
        """(B,) 1 where the answer is right when (T,) tokens arrive, in the order of travel; else 0."""
        key = np.packbits(received.numpy()).tobytes()
        if key not in self._told:
            arrived = torch.empty_like(received)
            arrived[travel_order(self.layout, 0)] = received
            scores, start = [], 0
            for (asked, _, _, prompts), seen in zip(self.answering.batches, self.seen, strict=True):
                keep = arrived[start : start + len(seen.tokens.x)]
                start += len(keep)
                left, most = thin(seen, keep), self.answering.max_new_tokens
                new, record = self.merged.generate(prompts["input_ids"], left, prompts["attention_mask"], most)
                table = vqa.tabulate(self.answering.processor, asked, new, record)
                scores.append(torch.tensor(table.accuracy.to_numpy() >= 0.5))
            if len(self._told) >= 64:
                self._told.clear()
            self._told[key] = torch.cat(scores).long()
        return self._told[key]


def thin(seen: Seen, keep: Tensor) -> Seen:
    """Images without the tokens where (T,) ``keep`` is False."""
    old = seen.tokens
    lengths = torch.zeros_like(old.lengths).index_add_(0, old.layout.image, keep.long())
    sizes = None if old.sizes is None else old.sizes[keep]
    first = None if seen.first is None else seen.first[keep]
    return replace(seen, tokens=Packed(old.x[keep], Layout(lengths), sizes), first=first)


@torch.inference_mode()
def ask(answering: Answering, policy: Policy | None, precision: str, chunk_tokens: int = AIR_CHUNK_TOKENS) -> Asked:
    """Look at the images of all questions once."""
    merged = llava.patch(answering.model, policy, precision=precision)
    looks, edge, total = [], [], []
    for _, pixels, picks, prompts in answering.batches:
        seen = merged.see(pixels).pick(picks)
        seen = replace(seen, tokens=seen.tokens.with_x(wire.quantise(seen.tokens.x, precision)))
        looks.append(seen)
        _, record = merged.generate(prompts["input_ids"], seen, prompts["attention_mask"], answering.max_new_tokens)
        edge.append(seen.vision_macs + (seen.projector_macs if merged.cut == "projector" else 0))
        total.append(record.macs)
    return Asked(merged, answering, looks, chunk_tokens, torch.cat(edge), torch.cat(total))


def question_members(search: Answering, test: Answering, policies: dict[str, Policy], precision: str) -> list[Member]:
    """Unmerged tokens as a whole and cut off, and one adaptive member per policy."""
    whole = [ask(one, None, precision) for one in (search, test)]
    members = [
        Member("unmerged", "unmerged", precision, whole[0], whole[1], "whole"),
        Member("cut off", "unmerged", precision, whole[0], whole[1]),
    ]
    for name, policy in policies.items():
        on_search, on_test = (ask(one, policy, precision) for one in (search, test))
        members.append(Member("adaptive", name, precision, on_search, on_test))
    return members
