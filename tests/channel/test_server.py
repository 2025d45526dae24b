"""The server over HTTP: bad payloads, other models, many clients, every request answered once."""

import asyncio
import copy
import json
from types import SimpleNamespace

import aiohttp
import numpy as np
import pytest
import tokmerge
import torch
from conftest import build
from tokmerge import wire
from tokmerge.channel.device import payloads
from tokmerge.channel.segmentation import protected_means
from tokmerge.channel.server import IDENTITY, Responder, Server, identity

SAME = {"wire": 1, "split": 2}


def talking(responder, scene, **limits):
    """Run ``scene(post)`` against a server; ``post`` sends a body and gives status and answer."""

    async def run():
        server = Server(responder, SAME, **limits)
        host, port = await server.start()
        async with aiohttp.ClientSession(f"http://{host}:{port}", headers={IDENTITY: json.dumps(SAME)}) as session:

            async def post(body, **options):
                async with session.post("/answers", data=body, **options) as response:
                    return response.status, await response.read()

            try:
                async with asyncio.timeout(20):
                    await scene(post)
            finally:
                await server.stop()

    return asyncio.run(run())


def test_answers_are_those_of_the_model_whatever_shares_the_batch(responder, merged, images, sent):
    logits, _ = merged(images, through=lambda tokens: tokens.with_x(wire.quantise(tokens.x, "int8")))
    for got, expected in zip(responder.answer([b"nonsense", *sent])[1:], logits, strict=True):
        assert torch.allclose(got, expected, atol=1e-4)


def test_a_server_in_sixteen_bits_answers_in_them(responder, merged, images, sent):
    half = tokmerge.patch(copy.deepcopy(merged.model).bfloat16(), merged.policy, split_layer=merged.split_layer)
    for got, expected in zip(Responder(half, responder.prototype).answer(sent), responder.answer(sent), strict=True):
        assert torch.allclose(got, expected, atol=0.05 * expected.abs().max().item())


def test_the_longest_payload_of_a_model_is_not_too_long(responder, merged, images):
    whole = tokmerge.patch(merged.model, None, precision="float32", split_layer=merged.split_layer)
    longest = payloads(whole, images[:1], chunk_tokens=1)[0]

    async def scene(post):
        assert (await post(longest))[0] == 200
        assert (await post(longest + bytes(len(longest))))[0] == 413

    served = Responder(whole, responder.prototype)
    talking(served, scene, max_bytes=served.longest)


def test_lost_chunks_are_concealed_and_other_models_payloads_refused(responder, merged, images):
    payload = bytearray(payloads(merged, images[4:], chunk_tokens=2)[0])
    whole = responder.answer([bytes(payload)])[0]
    payload[-1] ^= 1
    tokens, received = responder.open(bytes(payload))
    assert 0 < int((~received).sum()) <= 2
    damaged = responder.answer([bytes(payload)])[0]
    assert damaged.shape == whole.shape
    assert not torch.equal(damaged, whole)
    assert (tokens.sizes >= 1).all()
    for strange in (torch.ones(5, 7), torch.ones(300, 48), torch.ones(1, 48)):
        (error,) = responder.answer([wire.encode(strange)])
        assert "not of this model" in str(error)


def test_bad_payloads_are_answered_and_the_service_goes_on(responder, sent):
    async def scene(post):
        for body in (b"", b"TM\x01", np.random.default_rng(0).bytes(500), sent[0][:8]):
            status, text = await post(body)
            assert status == 422
            assert text
        assert (await post(sent[0]))[0] == 200

    talking(responder, scene)


def test_devices_that_run_something_else_are_told_what(responder, sent):
    async def scene(post):
        for told, why in (
            ({"wire": 1, "split": 3}, "split 3 there, 2 here"),
            ({"split": 2}, "wire None there, 1 here"),
            (None, "does not say"),
        ):
            status, text = await post(sent[0], headers={IDENTITY: "" if told is None else json.dumps(told)})
            assert (status, why in text.decode()) == (409, True), text

    talking(responder, scene)


def test_identities_tell_weights_splits_and_policies_apart(merged):
    own = identity(merged)
    assert identity(tokmerge.patch(merged.model, merged.policy, precision="int4", split_layer=2)) == own
    others = [(merged.model, merged.policy, 1), (merged.model, tokmerge.Threshold(0.7), 2), (build(), merged.policy, 2)]
    for (model, policy, split), part in zip(others, ("split", "policy", "weights"), strict=True):
        if part == "weights":
            model.head.bias.data += 1
        other = identity(tokmerge.patch(model, policy, split_layer=split))
        assert {key for key in own if own[key] != other[key]} == {part}
    off = [identity(tokmerge.patch(merged.model, policy)) for policy in (None, tokmerge.Threshold(1.0))]
    assert off[0] == off[1], "nothing merges in either"


def test_too_long_too_slow_and_too_many_are_turned_away(responder, sent):
    async def slowly():
        yield sent[0][:30]
        await asyncio.sleep(5)

    async def scene(post):
        assert (await post(bytes(5000)))[0] == 413
        slow = asyncio.create_task(post(slowly()))
        await asyncio.sleep(0.1)
        assert (await post(sent[0]))[0] == 503
        status, text = await slow
        assert (status, b"longer than 0.3 s" in text) == (408, True)
        assert (await post(sent[0]))[0] == 200

    talking(responder, scene, max_bytes=4096, body_s=0.3, max_waiting=1)


def test_sixty_four_clients_at_once_get_every_answer(responder, sent):
    expected, sizes = responder.answer(sent), []

    def watched(bodies):
        sizes.append(len(bodies))
        return responder.answer(bodies)

    async def scene(post):
        async def client(number):
            for turn in range(5):
                which = (number + turn) % 5
                status, body = await post(sent[which])
                assert status == 200, body
                assert np.allclose(np.frombuffer(body, "<f4"), expected[which], atol=1e-4)

        await asyncio.gather(*(client(number) for number in range(64)))
        assert sum(sizes) == 320
        assert max(sizes) > 1, "they share forward passes"

    talking(SimpleNamespace(answer=watched), scene)


def test_trouble_in_the_model_is_answered():
    def broken(bodies):
        raise RuntimeError("out of memory")

    async def scene(post):
        assert await post(b"x") == (500, b"out of memory")

    talking(SimpleNamespace(answer=broken), scene)


HOSTILE = [torch.full((5, 48), 3e38), torch.full((5, 48), -3e38), torch.eye(5, 48) * 3e38, torch.full((2, 48), 1e30)]


@pytest.mark.parametrize(
    "policy",
    [
        tokmerge.Threshold(0.6),
        tokmerge.StaticRates(3, 3),
        tokmerge.AttentionPruning(4),
        tokmerge.PiToMe(3),
        tokmerge.TopR(3),
    ],
    ids=lambda policy: type(policy).__name__,
)
def test_hostile_values_are_refused_and_reach_no_other_client(policy, images):
    merged = tokmerge.patch(build(), policy, precision="int8", split_layer=2)
    responder, sent = Responder(merged, protected_means(merged.edge(images), 1)), payloads(merged, images)
    alone = [responder.answer([payload])[0] for payload in sent]
    rng = np.random.default_rng(0)
    hostile = [wire.encode(values, torch.ones(len(values)), "float32") for values in HOSTILE]
    noise = [bytearray(payload) for payload in sent]
    for payload in noise:
        payload[rng.integers(len(payload))] ^= 1 << rng.integers(8)
    answers = responder.answer([*hostile, *sent, *map(bytes, noise)])
    for answer in answers[: len(hostile)]:
        assert isinstance(answer, ValueError) or answer.isfinite().all()
    for answer, own in zip(answers[len(hostile) :], alone, strict=False):
        torch.testing.assert_close(answer, own, atol=1e-4, rtol=0)
    assert str(answers[0]) == "values too large: no finite scores"
