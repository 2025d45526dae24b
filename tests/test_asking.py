"""Questions over the air, against the questions asked without it."""

import pytest
import torch
from tokmerge import answering, embedded, vqa
from tokmerge.answering import Answering
from tokmerge.asking import ask, question_members, thin
from tokmerge.channel import Channel
from tokmerge.delivery import Air
from tokmerge.fragments import travel_order
from tokmerge.link import shipped
from tokmerge.policies import Threshold


@pytest.fixture(scope="module")
def few():
    model, processor = embedded.load("easy-vqa-llava")
    search, _ = answering.splits("easy-vqa-llava", 2, 2)
    return Answering(model, processor, search, embedded.TEMPLATE, batch_size=12)


@pytest.fixture(scope="module")
def asked(few):
    calibration = few.calibrate(12)
    return ask(few, Threshold(calibration.thresholds([0.9] * few.depth)), "int8")


def test_nothing_lost_is_the_model_asked_directly(few, asked):
    everything = torch.ones(int(asked.layout.lengths.sum()), dtype=torch.bool)
    right = asked.right(everything)
    table, _ = few.run(asked.merged)
    assert right.float().mean() > 0.5
    # int8 values may turn an answer or two.
    assert int((right != torch.tensor(table.accuracy.to_numpy() >= 0.5).long()).sum()) <= 2
    assert torch.equal(asked.macs, torch.tensor(table.macs.to_numpy()))
    air = Air(Channel(), shipped())
    assert torch.equal(asked.deliver(air, 60.0, 10**7, 11, torch.Generator().manual_seed(0)), right)


def test_lost_tokens_are_those_of_their_own_question(few, asked):
    layout = asked.layout
    lost = layout.image == 1
    received = ~lost
    right = asked.right(received[travel_order(layout, 0)])
    whole = asked.right(torch.ones_like(received))
    others = torch.arange(len(right)) != 1
    assert torch.equal(right[others], whole[others])
    # Question 1 by itself, without an image.
    question, _, _, prompts = few.batches[0]
    seen = asked.seen[0].pick(torch.tensor([1]))
    blind = thin(seen, torch.zeros(len(seen.tokens.x), dtype=torch.bool))
    assert blind.tokens.lengths.tolist() == [0]
    one = {name: prompts[name][1:2] for name in ("input_ids", "attention_mask")}
    new, record = asked.merged.generate(one["input_ids"], blind, one["attention_mask"], 4)
    table = vqa.tabulate(few.processor, question[1:2], new, record)
    assert right[1] == int(table.accuracy[0] >= 0.5)


def test_payload_lengths_are_those_of_the_wire(asked):
    dim = asked.seen[0].tokens.x.shape[1]
    first = asked.seen[0].tokens.split()[0]
    from tokmerge import wire

    assert first.shape[1] == dim
    assert asked.fragments(480).n_bytes[0] == len(wire.encode(first, None, "int8", asked.chunk_tokens))


def test_members_are_unmerged_cut_off_and_adaptive(few):
    tiny = Answering(few.model, few.processor, few.questions, embedded.TEMPLATE, batch_size=64)
    members = question_members(tiny, tiny, {"all": Threshold([0.5] * few.depth)}, "int4")
    assert [(one.family, one.sending) for one in members] == [
        ("unmerged", "whole"), ("cut off", "cut off"), ("adaptive", "cut off")]  # fmt: skip
    assert members[2].search.layout.lengths.sum() < members[0].search.layout.lengths.sum()
    assert (members[2].search.edge_macs < members[0].search.edge_macs).all()
