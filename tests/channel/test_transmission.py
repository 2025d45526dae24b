from dataclasses import replace

import pytest
import tokmerge
import torch
from conftest import build_dense
from members import generator, measured_link
from tokmerge import wire
from tokmerge.channel.comparison import contest, hits
from tokmerge.channel.phy import LADDER, Channel
from tokmerge.channel.schemes import Member, Slot, token_members
from tokmerge.channel.segmentation import conceal, encode_payloads
from tokmerge.channel.server import Responder
from tokmerge.channel.transmission import send_image_tokens
from tokmerge.data.image_sets import Batch
from tokmerge.evaluation import maps
from tokmerge.merging.merge import unmerge_tokens
from tokmerge.merging.packed import Layout

PATCHES = 64


def test_nothing_lost_is_the_model_with_quantised_tokens(merged, images):
    for precision, one in send_image_tokens(merged, images, ["int8", "int4"]).items():
        logits, record = merged(images, through=lambda t, p=precision: t.with_x(wire.quantise(t.x, p)))
        assert torch.equal(one.answers, logits.argmax(1))
        assert torch.equal(one.answer(torch.ones(len(one.order), dtype=torch.bool)), one.answers)
        assert torch.equal(one.deliver(measured_link(), 60.0, 10**8, 11, generator()), one.answers)
        assert torch.equal(one.edge_macs, record.edge_macs)


def test_payloads_are_what_the_layout_says(merged, images):
    one = send_image_tokens(merged, images, ["int4"], chunk_tokens=3)["int4"]
    for i in range(len(images)):
        payload, rows = one.payload(i), one.order[one.tokens.layout.image == i]
        assert len(payload) == one.n_bytes[i]
        got = wire.decode(payload)
        assert torch.equal(got.tokens, one.tokens.x[rows])
        assert torch.equal(got.sizes.float(), one.tokens.sizes[rows])


@pytest.mark.parametrize("how", ["drop", "mean", "zero"])
def test_answers_with_losses_are_those_of_each_image_alone(merged, images, how):
    one = send_image_tokens(merged, images, ["int8"])["int8"]
    received = torch.rand(len(one.order), generator=generator(1)) < 0.6
    received[one.tokens.layout.image == 2] = False
    got, arrived = one.answer(received, how), torch.empty_like(received)
    arrived[one.order] = received
    for i in range(len(images)):
        tokens, some = one.tokens.images(torch.tensor([i])), arrived[one.tokens.layout.image == i]
        if some.any():
            served = conceal(tokens, some, one.server.prototype, 64, how)
            assert got[i] == merged.serve(served).argmax()
        else:
            assert got[i] == one.blind_answer


def test_slots_are_kept_to_and_too_little_room_or_snr_leaves_the_same_answer_for_all(merged, images):
    one, link = send_image_tokens(merged, images, ["int4"])["int4"], measured_link()
    for snr_db, uses in ((-30.0, 10**6), (60.0, 10)):
        assert one.deliver(link, snr_db, uses, 11, generator()).tolist() == [int(one.blind_answer)] * len(images)
    for uses in (500, 3000, 20_000):
        used, most = link.used(one.n_bytes, uses, 6), LADDER[6].blocks(one.n_bytes) * LADDER[6].uses
        assert (used <= uses).all()
        assert (used >= most.clamp(max=uses - LADDER[0].uses)).all()


def test_fading_of_payloads_loses_more_images_whole_than_fading_of_blocks(merged, images):
    one, whole = send_image_tokens(merged, images.repeat(12, 1, 1, 1), ["int8"])["int8"], {}
    for fading in ("payload", "block"):
        link = measured_link(Channel("rayleigh"), fading)
        info_bits, lost = link.lose_blocks(one.n_bytes, 4.0, 10**5, 4, generator())
        arrived = one.segmentation(info_bits).received(lost).split(one.tokens.layout.counts)
        whole[fading] = sum(bool(image.all()) for image in arrived)
    assert whole["payload"] > whole["block"]


@pytest.mark.parametrize("pilots", [None, 4])
@pytest.mark.parametrize("cap", [3, 8])
def test_the_most_robust_scheme_that_carries_the_payload_is_selected(pilots, cap):
    link, n_bytes = measured_link(Channel(pilots=pilots)), torch.tensor([10, 100, 300, 1000, 5000])
    per_block = [one.uses + (pilots or 0) for one in LADDER]
    selected = link.select_schemes(n_bytes, 2000, cap)
    for n, (scheme, blocks, limit) in zip(n_bytes.tolist(), torch.stack(selected, 1).tolist(), strict=True):
        fitting = [i for i in range(cap) if LADDER[i].blocks(n) * per_block[i] <= 2000]
        assert scheme == (fitting[0] if fitting else cap)
        assert (blocks, limit) == (LADDER[scheme].blocks(n), 2000 // per_block[scheme])
    assert torch.equal(link.select_schemes(n_bytes, torch.full((5,), 2000), cap)[0], selected[0])


@pytest.fixture(params=[tokmerge.Threshold(0.6), tokmerge.RandomPruning(7), None], ids=["merged", "pruned", "whole"])
def dense(request):
    return tokmerge.patch(build_dense(), request.param, precision="int8", split_layer=2)


def test_a_server_draws_the_map_that_the_payload_says(dense, images):
    sent = dense.edge(images)
    sent = sent.with_x(wire.quantise(sent.x, "int8"))
    responder = Responder(dense, sent.x[sent.layout.offsets[:, None]].mean(0))
    answers = responder.answer(encode_payloads(dense, sent))
    for answer, expected in zip(answers, dense.serve(sent), strict=True):
        torch.testing.assert_close(answer, expected, atol=1e-4, rtol=1e-4)


def test_a_payload_of_another_grid_or_without_a_map_is_refused(images):
    merged = tokmerge.patch(build_dense(), tokmerge.TopR(9), split_layer=2)
    responder, sent = Responder(merged, torch.zeros(1, 48)), merged.edge(images[:1])
    bare = wire.encode(sent.x)
    short = wire.encode(sent.x, source=sent.source[0, :40])
    for payload in (bare, short):
        (refused,) = responder.answer([payload])
        assert str(refused) == "a payload without a source map of this model's patches"


@pytest.mark.parametrize("how", ["drop", "mean", "zero"])
def test_patches_of_lost_tokens_are_what_their_concealment_says(dense, images, how):
    one = send_image_tokens(dense, images, ["float32"])["float32"]
    received = torch.rand(len(one.order), generator=generator(3)) < 0.6
    got, arrived = one.answer(received, how), torch.empty_like(received)
    arrived[one.order] = received
    model, last = dense.model, range(2, 4)
    for i in range(len(images)):
        tokens, some = one.tokens.images(torch.tensor([i])), arrived[one.tokens.layout.image == i]
        alone = tokens.full_sizes.clone()
        x, source = tokens.x.clone(), tokens.source[0]
        if not some[0]:
            x[0] = one.server.prototype[0]
        there = some.clone()
        there[0] = True
        known = torch.where(source < 0, False, there[source.clamp(min=0)])
        if how == "zero":
            x[~there], alone[~there] = 0, 1
            rows, named = torch.arange(len(x)), source
        else:
            rows = there.nonzero()[:, 0]
            named = torch.where(known, (there.long().cumsum(0) - 1)[source.clamp(min=0)], -1)
        x, alone = x[rows], alone[rows]
        if how == "mean" and alone[1:].sum() < PATCHES and len(alone) > 1:
            mean = (x[1:] * alone[1:, None]).sum(0) / alone[1:].sum()
            x, alone = torch.cat([x, mean[None]]), torch.cat([alone, (PATCHES - alone[1:].sum())[None]])
            named = torch.where(named < 0, len(x) - 1, named)
        left = replace(tokens, x=x, layout=Layout(torch.tensor([len(x)])), sizes=alone, source=named[None])
        if dense.policy is not None and any(map(dense.policy.active, last)):
            expected = dense.serve(left)[0]
        else:
            left, _ = dense.run_layers(replace(left, source=None), last)
            grid = unmerge_tokens(replace(left, x=model.norm(left.x)), named[None])
            expected = model.decoder(grid[:, 1:].transpose(1, 2).unflatten(2, (8, 8)))[0]
        assert torch.equal(got[i], expected > 0)


def test_families_are_compared_by_the_overlap_of_their_maps(images):
    model, masks = build_dense(), torch.rand(5, 32, 32, generator=generator()) < 0.5
    batch = Batch(list("abcde"), images, torch.zeros(5, dtype=torch.long), masks)
    whole = token_members("unmerged", "unmerged", model, None, 2, batch, batch, ["int8"])[0]
    whole = Member("unmerged", "unmerged", "int8", whole.select, whole.test, "whole")
    few = token_members("adaptive", "few", model, tokmerge.TopR(12), 2, batch, batch, ["int8"])
    link, slot = measured_link(), Slot(uses=200_000)
    table = contest([whole, *few], link, [-30.0, 40.0], slot, whole.select.answers, masks, draws=1)
    at = table.set_index(["snr_db", "family"]).score
    plain = maps.overlap(model(images) > 0, masks).mean()
    assert at[40.0, "unmerged"] == pytest.approx(plain.item(), abs=0.02)
    assert hits(whole.select, whole.select.answers, link, 40.0, 200_000, 3, 1, 0).tolist() == [1.0] * 5
    # Nothing arrives: the same map for all.
    blind = whole.test.blind_answer.expand(5, -1, -1)
    assert at[-30.0, "unmerged"] == pytest.approx(maps.overlap(blind, masks).mean().item())
    assert whole.test.n_bytes.min() > few[0].test.n_bytes.max()
