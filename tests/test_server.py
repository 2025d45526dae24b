"""The server on the wire: bad payloads, broken messages, many clients, every request answered once."""

import asyncio
import struct
import threading

import numpy as np
import pytest
import tokmerge
import torch
from conftest import build
from tokmerge import wire
from tokmerge.edge import payloads
from tokmerge.fragments import average
from tokmerge.server import ANSWER, FAILURE, REQUEST, Desk, Message, MessageError, Server, read_message


@pytest.fixture
def merged():
    return tokmerge.patch(build(), tokmerge.Threshold(0.6), precision="int8", split_layer=2)


@pytest.fixture
def desk(merged, images):
    return Desk(merged, average(merged.edge(images), 1))


def talking(desk, scene, **limits):
    """Run ``scene(server, connect)`` against a server; connect gives a reader and a writer."""

    async def run():
        server = Server(desk, **limits)
        host, port = await server.start()
        try:
            async with asyncio.timeout(20):
                return await scene(server, lambda: asyncio.open_connection(host, port))
        finally:
            await server.stop()

    return asyncio.run(run())


async def answers(reader, n):
    return [await read_message(reader, 1 << 20, 5.0) for _ in range(n)]


def scores(message):
    assert message.kind == ANSWER, message.body
    return torch.from_numpy(np.frombuffer(message.body, ">f4").astype(np.float32))


def test_answers_are_those_of_the_model_whatever_shares_the_batch(desk, merged, images):
    sent = payloads(merged, images)
    logits, _ = merged(images, through=lambda tokens: tokens.with_x(wire.quantise(tokens.x, "int8")))
    for got, expected in zip(desk.answer([b"nonsense", *sent])[1:], logits, strict=True):
        assert torch.allclose(got, expected, atol=1e-4)


def test_lost_chunks_are_concealed_and_other_models_payloads_refused(desk, merged, images):
    payload = bytearray(payloads(merged, images[4:], chunk_tokens=2)[0])
    whole = desk.answer([bytes(payload)])[0]
    payload[-1] ^= 1
    tokens, received = desk.open(bytes(payload))
    assert 0 < int((~received).sum()) <= 2
    damaged = desk.answer([bytes(payload)])[0]
    assert damaged.shape == whole.shape
    assert not torch.equal(damaged, whole)
    assert (tokens.sizes >= 1).all()
    for strange in (torch.ones(5, 7), torch.ones(300, 48), torch.ones(1, 48)):
        (error,) = desk.answer([wire.encode(strange)])
        assert "not of this model" in str(error)


def test_bad_payloads_are_answered_and_the_connection_goes_on(desk, merged, images):
    good = payloads(merged, images[:1])[0]

    async def scene(server, connect):
        reader, writer = await connect()
        bodies = [b"", b"TM\x01", np.random.default_rng(0).bytes(500), good[:8], good]
        for request, body in enumerate(bodies):
            writer.write(bytes(Message(request, REQUEST, body)))
        got = {message.request: message for message in await answers(reader, len(bodies))}
        assert [got[i].kind for i in range(5)] == [FAILURE] * 4 + [ANSWER]
        assert b"payload" in got[1].body
        assert (server.answered, server.failed) == (1, 4)

    talking(desk, scene)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (struct.pack(">IQB", 10_000 + 9, 5, REQUEST), b"a message of 10000 bytes: at most 4096"),
        (struct.pack(">IQB", 3, 5, REQUEST), b"a message of -6 bytes"),
        (bytes(Message(5, ANSWER, b"x")), b"of kind 2: only requests"),
    ],
)
def test_what_is_no_request_is_answered_and_the_connection_closed(desk, data, why):
    async def scene(server, connect):
        reader, writer = await connect()
        writer.write(data)
        (message,) = await answers(reader, 1)
        assert (message.request, message.kind) == (5, FAILURE)
        assert why in message.body
        assert await reader.read() == b""

    talking(desk, scene, max_bytes=4096)


def test_slow_silent_and_dropped_connections_end_and_the_server_serves_on(desk, merged, images):
    good = payloads(merged, images[:1])[0]

    async def scene(server, connect):
        slow_reader, slow = await connect()
        slow.write(bytes(Message(1, REQUEST, good))[:30])
        silent_reader, _ = await connect()
        _, dropped = await connect()
        dropped.write(bytes(Message(2, REQUEST, good)) + b"\0\0")
        dropped.transport.abort()
        (message,) = await answers(slow_reader, 1)
        assert b"longer than" in message.body
        assert await silent_reader.read() == b""
        reader, writer = await connect()
        writer.write(bytes(Message(3, REQUEST, good)))
        writer.write_eof()
        (message,) = await answers(reader, 1)
        assert (message.request, message.kind) == (3, ANSWER)
        assert await reader.read() == b"", "after the last answer the server closes as well"

    talking(desk, scene, idle_s=0.6, message_s=0.3)


def test_sixty_four_clients_at_once_get_every_answer_once(desk, merged, images):
    sent = payloads(merged, images)
    expected = desk.answer(sent)

    async def scene(server, connect):
        async def client(number):
            reader, writer = await connect()
            for i in range(5):
                writer.write(bytes(Message(10 * number + i, REQUEST, sent[(number + i) % 5])))
            writer.write_eof()
            got = await answers(reader, 5)
            assert await reader.read() == b""
            assert sorted(message.request for message in got) == [10 * number + i for i in range(5)]
            for message in got:
                right = expected[(number + message.request - 10 * number) % 5]
                assert torch.allclose(scores(message), right, atol=1e-4)

        await asyncio.gather(*(client(number) for number in range(64)))
        assert server.answered == 320

    talking(desk, scene)


def test_connections_beyond_the_limit_are_turned_away(desk):
    async def scene(server, connect):
        first, _first = await connect()
        await asyncio.sleep(0.05)
        second, _second = await connect()
        assert await second.read() == b""
        assert server.refused == 1
        assert not first.at_eof()

    talking(desk, scene, max_clients=1)


def test_one_connection_cannot_take_the_server_for_itself(desk, merged, images):
    good, batches = payloads(merged, images[:1])[0], []

    class Watched(Desk):
        def answer(self, payloads):
            batches.append(len(payloads))
            return super().answer(payloads)

    async def scene(server, connect):
        reader, writer = await connect()
        for request in range(20):
            writer.write(bytes(Message(request, REQUEST, good)))
        got = await answers(reader, 20)
        assert [message.request for message in got] == list(range(20))
        assert max(batches) <= 2

    talking(Watched(desk.merged, desk.prototype), scene, window=2)


def test_a_bad_message_behind_an_unanswered_one_does_not_keep_the_connection(desk):
    answering, done = threading.Event(), threading.Event()

    class Slow(Desk):
        def answer(self, payloads):
            answering.set()
            done.wait(10)
            return super().answer(payloads)

    async def scene(server, connect):
        reader, writer = await connect()
        writer.write(bytes(Message(1, REQUEST, b"x")) + bytes(Message(2, ANSWER, b"x")))
        try:
            assert await asyncio.wait_for(reader.read(), 5) == b"", "closed, though no answer is there"
            assert answering.is_set()
            assert server.failed == 1
        finally:
            done.set()

    talking(Slow(desk.merged, desk.prototype), scene, window=1, idle_s=0.2)


def test_trouble_in_the_model_is_answered(desk, merged, images):
    class Broken(Desk):
        def answer(self, payloads):
            raise RuntimeError("out of memory")

    async def scene(server, connect):
        reader, writer = await connect()
        writer.write(bytes(Message(9, REQUEST, b"x")))
        (message,) = await answers(reader, 1)
        assert (message.request, message.kind, message.body) == (9, FAILURE, b"out of memory")

    talking(Broken(desk.merged, desk.prototype), scene)


def test_a_message_is_its_body_and_thirteen_bytes():
    assert len(bytes(Message(1, REQUEST, b"abc"))) == 3 + 13

    async def cut_off():
        reader = asyncio.StreamReader()
        reader.feed_data(bytes(Message(77, REQUEST, b"abc"))[:-1])
        reader.feed_eof()
        with pytest.raises(MessageError, match="ended within a message") as caught:
            await read_message(reader, 100, 1.0)
        assert caught.value.request == 77

    asyncio.run(cut_off())
