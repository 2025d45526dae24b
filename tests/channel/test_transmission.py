import pytest
import torch
from members import measured_link
from tokmerge import wire
from tokmerge.channel.phy import LADDER, Channel
from tokmerge.channel.segmentation import conceal
from tokmerge.channel.transmission import send_image_tokens


def test_nothing_lost_is_the_model_with_quantised_tokens(merged, images):
    for precision, one in send_image_tokens(merged, images, ["int8", "int4"]).items():
        logits, record = merged(images, through=lambda t, p=precision: t.with_x(wire.quantise(t.x, p)))
        assert torch.equal(one.answers, logits.argmax(1))
        assert torch.equal(one.answer(torch.ones(len(one.order), dtype=torch.bool)), one.answers)
        generator = torch.Generator().manual_seed(0)
        assert torch.equal(one.deliver(measured_link(), 60.0, 10**8, 11, generator), one.answers)
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
    received = torch.rand(len(one.order), generator=torch.Generator().manual_seed(1)) < 0.6
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
    one, link, generator = send_image_tokens(merged, images, ["int4"])["int4"], measured_link(), torch.Generator()
    for snr_db, uses in ((-30.0, 10**6), (60.0, 10)):
        assert one.deliver(link, snr_db, uses, 11, generator).tolist() == [one.blind_answer] * len(images)
    for uses in (500, 3000, 20_000):
        used, most = link.used(one.n_bytes, uses, 6), LADDER[6].blocks(one.n_bytes) * LADDER[6].uses
        assert (used <= uses).all()
        assert (used >= most.clamp(max=uses - LADDER[0].uses)).all()


def test_fading_of_payloads_loses_more_images_whole_than_fading_of_blocks(merged, images):
    one, whole = send_image_tokens(merged, images.repeat(12, 1, 1, 1), ["int8"])["int8"], {}
    for fading in ("payload", "block"):
        link = measured_link(Channel("rayleigh"), fading)
        info_bits, lost = link.lose_blocks(one.n_bytes, 4.0, 10**5, 4, torch.Generator().manual_seed(0))
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
