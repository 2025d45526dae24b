"""The server on the wire: bad payloads, broken messages, many clients, every request answered once."""

import asyncio
import struct
import threading
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokmerge import wire
from tokmerge.channel.device import payloads
from tokmerge.channel.segmentation import protected_means
from tokmerge.channel.server import ANSWER, FAILURE, REQUEST, Message, MessageError, Responder, Server, read_message


@pytest.fixture
def responder(merged, images):
    return Responder(merged, protected_means(merged.edge(images), 1))


@pytest.fixture
def sent(merged, images):
    return payloads(merged, images)


def talking(responder, scene, **limits):
    """Run ``scene(server, connect, reader, writer)`` against a server: a connection, and what makes further ones."""

    async def run():
        server = Server(responder, **limits)
        connect = partial(asyncio.open_connection, *await server.start())
        try:
            async with asyncio.timeout(20):
                await scene(server, connect, *await connect())
        finally:
            await server.stop()

    return asyncio.run(run())


def request(number, body, kind=REQUEST):
    return bytes(Message(number, kind, body))


async def answers(reader, n):
    return [await read_message(reader, 1 << 20, 5.0) for _ in range(n)]


def test_answers_are_those_of_the_model_whatever_shares_the_batch(responder, merged, images, sent):
    logits, _ = merged(images, through=lambda tokens: tokens.with_x(wire.quantise(tokens.x, "int8")))
    for got, expected in zip(responder.answer([b"nonsense", *sent])[1:], logits, strict=True):
        assert torch.allclose(got, expected, atol=1e-4)


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


def test_bad_payloads_are_answered_and_the_connection_goes_on(responder, sent):
    async def scene(server, connect, reader, writer):
        bodies = [b"", b"TM\x01", np.random.default_rng(0).bytes(500), sent[0][:8], sent[0]]
        writer.writelines(request(number, body) for number, body in enumerate(bodies))
        got = {message.request: message for message in await answers(reader, len(bodies))}
        assert [got[i].kind for i in range(5)] == [FAILURE] * 4 + [ANSWER]
        assert b"payload" in got[1].body
        assert (server.answered, server.failed) == (1, 4)

    talking(responder, scene)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (struct.pack(">IQB", 10_000 + 9, 5, REQUEST), b"a message of 10000 bytes: at most 4096"),
        (struct.pack(">IQB", 3, 5, REQUEST), b"a message of -6 bytes"),
        (request(5, b"x", ANSWER), b"of kind 2: only requests"),
    ],
)
def test_what_is_no_request_is_answered_and_the_connection_closed(responder, data, why):
    async def scene(server, connect, reader, writer):
        writer.write(data)
        (message,) = await answers(reader, 1)
        assert (message.request, message.kind) == (5, FAILURE)
        assert why in message.body
        assert await reader.read() == b""

    talking(responder, scene, max_bytes=4096)


def test_slow_silent_and_dropped_connections_end_and_the_server_serves_on(responder, sent):
    async def scene(server, connect, slow_reader, slow):
        slow.write(request(1, sent[0])[:30])
        silent_reader, _ = await connect()
        _, dropped = await connect()
        dropped.write(request(2, sent[0]) + b"\0\0")
        dropped.transport.abort()
        (message,) = await answers(slow_reader, 1)
        assert b"longer than" in message.body
        assert await silent_reader.read() == b""
        reader, writer = await connect()
        writer.write(request(3, sent[0]))
        writer.write_eof()
        (message,) = await answers(reader, 1)
        assert (message.request, message.kind) == (3, ANSWER)
        assert await reader.read() == b"", "after the last answer the server closes as well"

    talking(responder, scene, idle_s=0.6, message_s=0.3)


def test_sixty_four_clients_at_once_get_every_answer_once(responder, sent):
    expected = responder.answer(sent)

    async def scene(server, connect, *_):
        async def client(number):
            reader, writer = await connect()
            writer.writelines(request(10 * number + i, sent[(number + i) % 5]) for i in range(5))
            writer.write_eof()
            got = await answers(reader, 5)
            assert await reader.read() == b""
            assert sorted(message.request for message in got) == [10 * number + i for i in range(5)]
            for message in got:
                assert message.kind == ANSWER, message.body
                scores = torch.from_numpy(np.frombuffer(message.body, ">f4").astype(np.float32))
                assert torch.allclose(scores, expected[(message.request - 9 * number) % 5], atol=1e-4)

        await asyncio.gather(*(client(number) for number in range(64)))
        assert server.answered == 320

    talking(responder, scene)


def test_connections_beyond_the_limit_are_turned_away(responder):
    async def scene(server, connect, first, _first):
        await asyncio.sleep(0.05)
        second, _second = await connect()
        assert await second.read() == b""
        assert server.refused == 1
        assert not first.at_eof()

    talking(responder, scene, max_clients=1)


def test_one_connection_cannot_take_the_server_for_itself(responder, sent):
    batches = []

    def watched(bodies):
        batches.append(len(bodies))
        return responder.answer(bodies)

    async def scene(server, connect, reader, writer):
        writer.writelines(request(number, sent[0]) for number in range(20))
        assert [message.request for message in await answers(reader, 20)] == list(range(20))
        assert max(batches) <= 2

    talking(SimpleNamespace(answer=watched), scene, window=2)


def test_a_bad_message_behind_an_unanswered_one_does_not_keep_the_connection(responder):
    begun, done = threading.Event(), threading.Event()

    def slow(bodies):
        begun.set()
        done.wait(10)
        return responder.answer(bodies)

    async def scene(server, connect, reader, writer):
        writer.write(request(1, b"x") + request(2, b"x", ANSWER))
        try:
            assert await asyncio.wait_for(reader.read(), 5) == b"", "closed, though no answer is there"
            assert begun.is_set()
            assert server.failed == 1
        finally:
            done.set()

    talking(SimpleNamespace(answer=slow), scene, window=1, idle_s=0.2)


def test_trouble_in_the_model_is_answered():
    def broken(bodies):
        raise RuntimeError("out of memory")

    async def scene(server, connect, reader, writer):
        writer.write(request(9, b"x"))
        assert await answers(reader, 1) == [Message(9, FAILURE, b"out of memory")]

    talking(SimpleNamespace(answer=broken), scene)


def test_a_message_is_its_body_and_thirteen_bytes():
    assert len(request(1, b"abc")) == 3 + 13

    async def cut_off():
        reader = asyncio.StreamReader()
        reader.feed_data(request(77, b"abc")[:-1])
        reader.feed_eof()
        with pytest.raises(MessageError, match="ended within a message") as caught:
            await read_message(reader, 100, 1.0)
        assert caught.value.request == 77

    asyncio.run(cut_off())
