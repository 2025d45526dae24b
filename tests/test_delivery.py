"""What arrives at the server and what it answers, against one image at a time."""

import pytest
import tokmerge
import torch
from conftest import build
from tokmerge import wire
from tokmerge.channel import LADDER, Channel
from tokmerge.delivery import Air, send, take
from tokmerge.fragments import conceal
from tokmerge.link import shipped


@pytest.fixture
def merged():
    return tokmerge.patch(build(), tokmerge.Threshold(0.6), split_layer=2)


@pytest.fixture
def air():
    return Air(Channel(), shipped())


def test_nothing_lost_is_the_model_with_quantised_tokens(merged, images, air):
    sent = send(merged, images, ["int8", "int4"], batch_size=2)
    for precision, one in sent.items():
        logits, record = merged(images, through=lambda t, p=precision: t.with_x(wire.quantise(t.x, p)))
        assert torch.equal(one.answers, logits.argmax(1))
        everything = torch.ones(len(one.order), dtype=torch.bool)
        assert torch.equal(one.predict(everything), one.answers)
        assert torch.equal(one.deliver(air, 60.0, 10**8, 11, torch.Generator().manual_seed(0)), one.answers)
        assert torch.equal(one.edge_macs, merged(images)[1].edge_macs)
    assert torch.equal(record.edge_macs, one.edge_macs)


def test_payloads_are_what_the_layout_says(merged, images):
    one = send(merged, images, ["int4"], chunk_tokens=3)["int4"]
    n_bytes = one.fragments(480).n_bytes
    for i in range(len(images)):
        payload = one.payload(i)
        assert len(payload) == n_bytes[i]
        got, rows = wire.decode(payload), one.order[one.tokens.layout.image == i]
        assert torch.equal(got.tokens, one.tokens.x[rows])
        assert torch.equal(got.sizes.float(), one.tokens.sizes[rows])


@pytest.mark.parametrize("how", ["drop", "mean", "zero"])
def test_answers_with_losses_are_those_of_each_image_alone(merged, images, how):
    one = send(merged, images, ["int8"])["int8"]
    received = torch.rand(len(one.order), generator=torch.Generator().manual_seed(1)) < 0.6
    received[one.tokens.layout.image == 2] = False
    got = one.predict(received, how)
    arrived = torch.empty_like(received)
    arrived[one.order] = received
    for i in range(len(images)):
        tokens, rows = take(one.tokens, torch.tensor([i]))
        if arrived[rows].any():
            served = conceal(tokens, arrived[rows], one.prototype, one.patches, how)
            assert got[i] == merged.serve(served).argmax()
        else:
            assert got[i] == one.nothing


def test_too_little_snr_or_room_leaves_the_same_answer_for_all(merged, images, air):
    one = send(merged, images, ["int4"])["int4"]
    generator = torch.Generator().manual_seed(0)
    assert one.deliver(air, -30.0, 10**6, 11, generator).tolist() == [one.nothing] * len(images)
    assert one.deliver(air, 60.0, 10, 11, generator).tolist() == [one.nothing] * len(images)


def test_taken_uses_are_within_the_slot(merged, images, air):
    one = send(merged, images, ["int4"])["int4"]
    n_bytes = one.fragments(1).n_bytes
    for uses in (500, 3000, 20_000):
        taken = one.taken(air, uses, 6)
        assert (taken <= uses).all()
        most = LADDER[6].blocks(n_bytes) * LADDER[6].uses
        assert (taken >= torch.minimum(most, torch.full_like(most, uses - LADDER[0].uses))).all()


def test_fading_of_payloads_loses_more_images_whole_than_fading_of_blocks(merged, images):
    one = send(merged, images.repeat(12, 1, 1, 1), ["int8"])["int8"]
    whole = {}
    for fading in ("payload", "block"):
        air = Air(Channel("rayleigh"), shipped(), fading)
        arrived = one.arrivals(air, 4.0, 10**5, 4, torch.Generator().manual_seed(0))
        per_image = torch.zeros(60).index_add_(0, one.tokens.layout.image, arrived.float()) / one.tokens.lengths
        whole[fading] = int((per_image == 1).sum())
    assert whole["payload"] > whole["block"]
