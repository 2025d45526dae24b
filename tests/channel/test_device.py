"""The device: payloads, and a server that may drop the line."""

import asyncio

import numpy as np
import pytest
from tokmerge import wire
from tokmerge.channel.device import payloads, request_answers
from tokmerge.channel.segmentation import protected_means
from tokmerge.channel.server import ANSWER, Message, Responder, Server, read_message


def test_payloads_have_the_length_that_the_record_says(merged, images):
    _, record = merged(images)
    sent = payloads(merged, images, chunk_tokens=wire.CHUNK_TOKENS)
    assert [len(payload) for payload in sent] == record.payload_bytes.tolist()


def test_every_request_gets_its_answer_in_order(merged, images):
    sent, responder = payloads(merged, images), Responder(merged, protected_means(merged.edge(images), 1))

    async def run():
        server = Server(responder)
        host, port = await server.start()
        try:
            return await request_answers([*sent, b"bad"], host, port, window=2)
        finally:
            await server.stop()

    replies = asyncio.run(run())
    for reply, expected in zip(replies, responder.answer(sent), strict=False):
        assert np.allclose(reply.scores, expected, atol=1e-4)
        assert reply.seconds > 0
    assert replies[-1].scores is None
    assert "not a token payload" in replies[-1].failure


@pytest.mark.parametrize(("behaviour", "again"), [("drop after two", 2), ("twice", 1)])
def test_after_a_broken_line_only_the_unanswered_are_sent_again(behaviour, again):
    behaviours, asked = [behaviour], []

    async def connected(reader, writer):
        behaves, seen = behaviours.pop() if behaviours else "well", []
        while message := await read_message(reader, 1000, 5.0):
            asked.append(message.request)
            seen.append(message)
            if behaves == "drop after two" and len(seen) == 3:
                break
            answered = seen[0] if behaves == "twice" else message
            writer.write(bytes(Message(answered.request, ANSWER, np.zeros(3, ">f4").tobytes())))
            await writer.drain()
        writer.close()

    async def run():
        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        replies = await request_answers([b"a", b"b", b"c", b"d"], *server.sockets[0].getsockname(), window=1)
        server.close()
        assert len(replies) == 4
        assert all(reply.scores is not None for reply in replies)
        assert asked == sorted([0, 1, 2, 3, again])

    asyncio.run(run())


def test_nobody_there_and_nobody_answering_are_said_plainly():
    async def run():
        server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
        address = server.sockets[0].getsockname()
        with pytest.raises(ConnectionError, match="1 of 1 payloads unanswered"):
            await request_answers([b"a"], *address, timeout_s=0.1, attempts=2)
        server.close()
        with pytest.raises(ConnectionError, match="after 1 connections"):
            await request_answers([b"a"], *address, attempts=1)

    asyncio.run(run())
