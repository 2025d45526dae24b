"""The device: images become payloads, which go over TCP to the server."""

import asyncio
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tokmerge.channel.segmentation import LINK_CHUNK, encode_payloads
from tokmerge.channel.server import ANSWER, REQUEST, Message, MessageError, read_message
from tokmerge.models.vit import MergedViT


class Reply(NamedTuple):
    """What came back for a payload: scores, or None and what the server said was wrong; seconds from sending to it."""

    scores: np.ndarray | None
    failure: str
    seconds: float


@torch.inference_mode()
def payloads(merged: MergedViT, images: Tensor, chunk_tokens: int = LINK_CHUNK) -> list[bytes]:
    """What the device sends for (B, C, H, W) images: the first blocks run, and their tokens become bytes."""
    return encode_payloads(merged, merged.edge(images), chunk_tokens)


async def request_answers(
    payloads: Sequence[bytes], host: str, port: int, window: int = 16, timeout_s: float = 30.0, attempts: int = 3
) -> list[Reply]:
    """Send payloads and wait for every answer.

    After a dropped connection those not yet answered are sent again; an answer that comes twice counts once.

    Args:
        payloads, host, port: what arrives of each image, and where.
        window, timeout_s: most requests under way; longest wait for the next answer.
        attempts: connections to try, each after the one before has broken down.

    Raises:
        ConnectionError: unanswered payloads are left after the last attempt; the message says how many and why.
    """
    replies: dict[int, Reply] = {}
    why: Exception | None = None
    for _ in range(attempts):
        try:
            await _exchange(payloads, replies, host, port, window, timeout_s)
        except (OSError, MessageError, TimeoutError) as error:
            why = error
        if len(replies) == len(payloads):
            return [replies[request] for request in range(len(payloads))]
    raise ConnectionError(
        f"{len(payloads) - len(replies)} of {len(payloads)} payloads unanswered by {host}:{port} after {attempts} "
        f"connections: {why or 'the server closed the connection'}"
    )


async def _exchange(
    payloads: Sequence[bytes], replies: dict[int, Reply], host: str, port: int, window: int, timeout_s: float
) -> None:
    """One connection: send what has no reply yet, take replies until all are there or the connection ends."""
    reader, writer = await asyncio.wait_for(asyncio.open_connection(host, port), timeout_s)
    permits, started = asyncio.Semaphore(window), dict[int, float]()

    async def send() -> None:
        for request in [one for one in range(len(payloads)) if one not in replies]:
            await permits.acquire()
            started[request] = time.monotonic()
            writer.write(bytes(Message(request, REQUEST, payloads[request])))
            await writer.drain()

    sender = asyncio.create_task(send())
    try:
        while len(replies) < len(payloads):
            message = await asyncio.wait_for(read_message(reader, 1 << 20, timeout_s), timeout_s)
            if message is None:
                return
            if message.request not in started or message.request in replies:
                raise MessageError(message.request, f"an answer to request {message.request}, which is not open")
            seconds = time.monotonic() - started[message.request]
            if message.kind == ANSWER:
                scores = np.frombuffer(message.body, ">f4").astype(np.float32)
                replies[message.request] = Reply(scores, "", seconds)
            else:
                replies[message.request] = Reply(None, message.body.decode(errors="replace"), seconds)
            permits.release()
    finally:
        sender.cancel()
        writer.close()
