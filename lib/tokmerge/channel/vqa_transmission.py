"""Visual question answering over a link: what a LLaVA answers when some visual tokens do not arrive.

Every question is asked of an image that is sent for it alone. Lost tokens are left out; when none arrives the language
model has the question and nothing else.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from tokmerge import wire
from tokmerge.channel.schemes import Member
from tokmerge.channel.segmentation import LINK_CHUNK, Segmentation, travel_order
from tokmerge.channel.transmission import SentPayloads
from tokmerge.evaluation import vqa
from tokmerge.evaluation.vqa_objective import QuestionObjective
from tokmerge.merging.matching import Policy
from tokmerge.merging.packed import Layout
from tokmerge.models import llava
from tokmerge.models.llava import MergedLlava
from tokmerge.models.visual_tokens import VisualTokens


@dataclass(frozen=True)
class SentVisualTokens(SentPayloads):
    """Questions put to a LLaVA whose visual tokens are sent; an answer is 1 where it is right: compare with ones.

    Attributes:
        merged: the model with its policy and precision; the vision tower runs on the device.
        answering: questions and prompts.
        images: tokens of each batch, a row per question, as they arrive if nothing is lost.
        chunk_tokens: tokens per chunk.
    """

    merged: MergedLlava
    answering: QuestionObjective
    images: list[VisualTokens]
    chunk_tokens: int

    @cached_property
    def layout(self) -> Layout:
        """Tokens of every question's image."""
        return Layout(torch.cat([part.tokens.lengths for part in self.images]))

    def segmentation(self, info_bits: Tensor | int) -> Segmentation:
        dim = self.images[0].tokens.x.shape[1]
        return Segmentation.of_tokens(self.layout, dim, self.merged.precision, None, info_bits, self.chunk_tokens)

    def _answer(self, received: Tensor, how: str) -> Tensor:
        arrived = received[travel_order(self.layout, 0).argsort()]
        parts = arrived.split([len(part.tokens.x) for part in self.images])
        scores = []
        for (questions, _, _, prompts), images, kept in zip(self.answering.batches, self.images, parts, strict=True):
            left, most = keep_visual_tokens(images, kept), self.answering.max_new_tokens
            new, record = self.merged.generate(prompts["input_ids"], left, prompts["attention_mask"], most)
            table = vqa.tabulate(self.answering.processor, questions, new, record)
            scores.append(torch.tensor(table.accuracy.to_numpy() >= 0.5))
        return torch.cat(scores).long()


def keep_visual_tokens(images: VisualTokens, kept: Tensor) -> VisualTokens:
    """Images with the tokens where (T,) bool ``kept`` is True alone."""
    first = None if images.first is None else images.first[kept]
    return replace(images, tokens=images.tokens.keep(kept), first=first)


@torch.inference_mode()
def send_visual_tokens(answering: QuestionObjective, policy: Policy | None, precision: str) -> SentVisualTokens:
    """Encode the images of all questions once."""
    merged = llava.patch(answering.model, policy, precision=precision)
    parts, edge, total = [], [], []
    for _, pixels, picks, prompts in answering.batches:
        images = merged.encode_images(pixels).pick(picks)
        images = replace(images, tokens=images.tokens.with_x(wire.quantise(images.tokens.x, precision)))
        parts.append(images)
        _, record = merged.generate(prompts["input_ids"], images, prompts["attention_mask"], answering.max_new_tokens)
        edge.append(images.vision_macs + (images.projector_macs if merged.cut == "projector" else 0))
        total.append(record.macs)
    return SentVisualTokens(torch.cat(edge), torch.cat(total), merged, answering, parts, LINK_CHUNK)


def question_members(
    select: QuestionObjective, test: QuestionObjective, policies: dict[str, Policy], precision: str
) -> list[Member]:
    """Unmerged tokens as a whole and cut off, and one adaptive member per policy."""
    whole = [send_visual_tokens(one, None, precision) for one in (select, test)]
    members = [
        Member("unmerged", "unmerged", precision, whole[0], whole[1], "whole"),
        Member("cut off", "unmerged", precision, whole[0], whole[1]),
    ]
    for name, policy in policies.items():
        on_select, on_test = (send_visual_tokens(one, policy, precision) for one in (select, test))
        members.append(Member("adaptive", name, precision, on_select, on_test))
    return members
