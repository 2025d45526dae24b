import pytest
import torch
from members import measured_link
from tokmerge import wire
from tokmerge.channel.segmentation import travel_order
from tokmerge.channel.vqa_transmission import keep_visual_tokens, question_members, send_visual_tokens
from tokmerge.evaluation import vqa, vqa_objective
from tokmerge.evaluation.vqa_objective import QuestionObjective
from tokmerge.merging.policies import Threshold
from tokmerge.models import tiny_llava
from tokmerge.models.configuration import LlavaConfiguration


@pytest.fixture(scope="module")
def few():
    model, processor = tiny_llava.load_tiny_llava("easy-vqa-llava")
    search, *_ = vqa_objective.task_splits("easy-vqa-llava", 2, 1, 2)
    return QuestionObjective(model, processor, search, tiny_llava.TINY_TEMPLATE, batch_size=12)


@pytest.fixture(scope="module")
def sent(few):
    return send_visual_tokens(few, Threshold(few.calibrate(12).thresholds([0.9] * few.depth)), "int8")


def test_nothing_lost_is_the_model_asked_directly(few, sent):
    right = sent.answer(torch.ones(int(sent.layout.lengths.sum()), dtype=torch.bool))
    table = few.compare(LlavaConfiguration(sent.merged.tower.policy, precision="int8"))
    assert right.float().mean() > 0.5
    # int8 values may turn an answer or two.
    assert int((right != torch.tensor(table.accuracy.to_numpy() >= 0.5).long()).sum()) <= 2
    assert torch.equal(sent.macs, torch.tensor(table.macs.to_numpy()))
    assert torch.equal(sent.deliver(measured_link(), 60.0, 10**7, 11, torch.Generator().manual_seed(0)), right)


def test_lost_tokens_are_those_of_their_own_question(few, sent):
    received = sent.layout.image != 1
    right, whole = sent.answer(received[travel_order(sent.layout, 0)]), sent.answer(torch.ones_like(received))
    others = torch.arange(len(right)) != 1
    assert torch.equal(right[others], whole[others])
    # Question 1 by itself, without an image.
    question, _, _, prompts = few.batches[0]
    images = sent.images[0].pick(torch.tensor([1]))
    blind = keep_visual_tokens(images, torch.zeros(len(images.tokens.x), dtype=torch.bool))
    assert blind.tokens.lengths.tolist() == [0]
    new, record = sent.merged.generate(prompts["input_ids"][1:2], blind, prompts["attention_mask"][1:2], 4)
    assert right[1] == int(vqa.tabulate(few.processor, question[1:2], new, record).accuracy[0] >= 0.5)


def test_payload_lengths_are_those_of_the_wire(sent):
    first = sent.images[0].tokens.split()[0]
    assert sent.n_bytes[0] == len(wire.encode(first, None, "int8", sent.chunk_tokens))


def test_members_are_unmerged_cut_off_and_adaptive(few):
    members = question_members(few, few, {"all": Threshold([0.5] * few.depth)}, "int4")
    assert [(one.family, one.sending) for one in members] == [
        ("unmerged", "whole"), ("cut off", "cut off"), ("adaptive", "cut off")]  # fmt: skip
    assert members[2].select.layout.lengths.sum() < members[0].select.layout.lengths.sum()
    assert (members[2].select.edge_macs < members[0].select.edge_macs).all()
