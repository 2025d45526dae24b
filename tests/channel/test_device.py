"""The device: payloads, and a server that may drop the line."""

import asyncio
import socket

import numpy as np
import pytest
from aiohttp import web
from tokmerge import wire
from tokmerge.channel.device import payloads, request_answers
from tokmerge.channel.server import Server, identity


def test_payloads_have_the_length_that_the_record_says(merged, images):
    _, record = merged(images)
    sent = payloads(merged, images, chunk_tokens=wire.CHUNK_TOKENS)
    assert [len(payload) for payload in sent] == record.payload_bytes.tolist()


def test_every_request_gets_its_answer_in_order_and_another_model_none(merged, responder, sent):
    async def run():
        server = Server(responder, identity(merged))
        host, port = await server.start()
        try:
            replies = await request_answers([*sent, b"bad"], host, port, identity(merged), window=2)
            with pytest.raises(ConnectionError, match="split 3 there, 2 here"):
                await request_answers(sent, host, port, identity(merged) | {"split": 3})
        finally:
            await server.stop()
        return replies

    replies = asyncio.run(run())
    for reply, expected in zip(replies, responder.answer(sent), strict=False):
        assert np.allclose(reply.scores, expected, atol=1e-4)
        assert reply.seconds > 0
    assert replies[-1].scores is None
    assert "not a token payload" in replies[-1].failure


def test_after_a_broken_line_only_the_unanswered_are_sent_again():
    asked = []

    async def answer(request):
        asked.append(body := await request.read())
        if len(asked) == 3:
            request.transport.abort()
        if len(asked) == 4:
            return web.Response(status=503, text="busy")
        return web.Response(body=np.full(3, body[0], "<f4").tobytes())

    async def run():
        app = web.Application()
        app.router.add_post("/answers", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        replies = await request_answers([b"a", b"b", b"c", b"d"], *runner.addresses[0], {}, window=1, timeout_s=5)
        await runner.cleanup()
        assert [int(reply.scores[0]) for reply in replies] == [*b"abcd"]
        assert sorted(asked[:2]) == [b"a", b"b"]
        assert sorted(asked) in ([b"a", b"b", *[b"c"] * 2, *[b"d"] * 2], [b"a", b"b", *[b"c"] * 3, b"d"])

    asyncio.run(run())


def test_nobody_there_and_nobody_answering_are_said_plainly():
    async def run():
        with socket.create_server(("127.0.0.1", 0)) as silent:
            address = silent.getsockname()
            with pytest.raises(ConnectionError, match=r"1 of 1 payloads unanswered .* no answer within"):
                await request_answers([b"a"], *address, {}, timeout_s=0.1, attempts=2)
        with pytest.raises(ConnectionError, match="after 1 attempts"):
            await request_answers([b"a"], *address, {}, attempts=1)

    asyncio.run(run())
