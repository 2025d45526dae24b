"""The device: payloads, the emulated radio, and a server that may drop the line."""

import asyncio

import numpy as np
import pytest
import tokmerge
import torch
from conftest import build
from tokmerge import wire
from tokmerge.channel import LADDER, Channel
from tokmerge.edge import Radio, ask, payloads
from tokmerge.fragments import average
from tokmerge.server import ANSWER, Desk, Message, Server, read_message


@pytest.fixture
def merged():
    return tokmerge.patch(build(), tokmerge.Threshold(0.6), precision="int8", split_layer=2)


def test_payloads_have_the_length_that_the_record_says(merged, images):
    _, record = merged(images)
    sent = payloads(merged, images, chunk_tokens=wire.CHUNK_TOKENS)
    assert [len(payload) for payload in sent] == record.payload_bytes.tolist()


def test_radio_counts_blocks_and_pilots_and_damages_only_what_it_loses():
    generator = torch.Generator().manual_seed(0)
    good = Radio(LADDER[4], Channel("rician", k_factor=1e9, pilots=4), 12.0, generator)
    assert good.uses(100) == 2 * (480 + 4)
    assert good(bytes(100)) == bytes(100)
    bad = Radio(LADDER[4], Channel(), -5.0, generator)
    assert bad(bytes(100)) != bytes(100)


def test_ask_gets_every_answer_in_order(merged, images):
    async def run():
        desk = Desk(merged, average(merged.edge(images), 1))
        server = Server(desk)
        host, port = await server.start()
        try:
            sent = payloads(merged, images)
            replies = await ask([*sent, b"bad"], host, port, window=2)
            lost = await ask(sent[:1], host, port, air=lambda payload: b"\0" + payload[1:])
        finally:
            await server.stop()
        for reply, expected in zip(replies, desk.answer(sent), strict=False):
            assert np.allclose(reply.scores, expected, atol=1e-4)
            assert reply.seconds > 0
        assert replies[-1].scores is None
        assert "not a token payload" in replies[-1].failure
        assert lost[0].scores is None

    asyncio.run(run())


def lines(behaviours):
    """A server that treats one connection after the other as told; returns what it was asked."""
    asked = []

    async def connected(reader, writer):
        behaviour = behaviours.pop(0) if behaviours else "answer"
        seen = []
        while message := await read_message(reader, 1000, 5.0):
            asked.append(message.request)
            seen.append(message)
            if behaviour == "drop after two" and len(seen) == 3:
                break
            if behaviour == "twice" and len(seen) > 1:
                message = seen[0]
            writer.write(bytes(Message(message.request, ANSWER, np.zeros(3, ">f4").tobytes())))
            await writer.drain()
        writer.close()

    return connected, asked


@pytest.mark.parametrize(("behaviour", "again"), [("drop after two", 102), ("twice", 101)])
def test_after_a_broken_line_only_the_unanswered_are_sent_again(behaviour, again):
    async def run():
        connected, asked = lines([behaviour])
        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        replies = await ask([b"a", b"b", b"c", b"d"], "127.0.0.1", port, window=1, first_request=100)
        server.close()
        assert len(replies) == 4
        assert all(reply.scores is not None for reply in replies)
        assert asked == sorted([100, 101, 102, 103, again])

    asyncio.run(run())


def test_nobody_there_and_nobody_answering_are_said_plainly():
    async def run():
        server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(ConnectionError, match="1 of 1 payloads unanswered"):
            await ask([b"a"], "127.0.0.1", port, timeout_s=0.1, attempts=2)
        server.close()
        with pytest.raises(ConnectionError, match="after 1 connections"):
            await ask([b"a"], "127.0.0.1", port, attempts=1)

    asyncio.run(run())
