"""The device: images become payloads, go through an emulated channel and over TCP to the server."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tokmerge import channel, wire
from tokmerge.channel import Channel, Mcs
from tokmerge.fragments import AIR_CHUNK_TOKENS, travel_order
from tokmerge.server import ANSWER, REQUEST, Message, MessageError, read_message
from tokmerge.vit import MergedViT


class Air(Protocol):
    """What happens to a payload between device and server."""

    def __call__(self, payload: bytes) -> bytes:
        """The bytes that arrive."""
        ...


@dataclass(frozen=True)
class Radio:
    """A channel for the bytes of payloads: LDPC blocks on symbols, decoded at the other end.

    Args:
        scheme: modulation and coding.
        channel: the air.
        snr_db: average SNR.
        generator: of everything random.
    """

    scheme: Mcs
    channel: Channel
    snr_db: float
    generator: torch.Generator

    def __call__(self, payload: bytes) -> bytes:
        """The bytes that arrive, wrong ones among them."""
        return channel.send_bytes(payload, self.scheme, self.channel, self.snr_db, self.generator)[0]

    def uses(self, n_bytes: int) -> int:
        """Channel uses of so many bytes."""
        blocks = self.scheme.blocks(n_bytes)
        return int(self.channel.uses(blocks * self.scheme.uses, blocks))


@dataclass(frozen=True)
class Reply:
    """What came back for one payload.

    Attributes:
        scores: one per class; None if the server could not use the payload.
        failure: the server's word on that; empty if there is none.
        seconds: from sending to the answer.
    """

    scores: np.ndarray | None
    failure: str
    seconds: float


@torch.inference_mode()
def payloads(merged: MergedViT, images: Tensor, chunk_tokens: int = AIR_CHUNK_TOKENS) -> list[bytes]:
    """What the device sends for (B, C, H, W) images: tokens in the order of travel, see `tokmerge.fragments`."""
    tokens = merged.edge(images)
    order = travel_order(tokens.layout, merged.model.num_prefix_tokens)
    sizes, counts = merged.sent_sizes(tokens), tokens.layout.counts
    parts = [None] * len(counts) if sizes is None else sizes[order].split(counts)
    return [
        wire.encode(x, size, merged.precision, chunk_tokens)
        for x, size in zip(tokens.x[order].split(counts), parts, strict=True)
    ]


async def ask(
    payloads: Sequence[bytes], host: str, port: int, air: Air | None = None, window: int = 16, timeout_s: float = 30.0,
    attempts: int = 3, first_request: int = 0,
) -> list[Reply]:  # fmt: skip
    """Send payloads and wait for every answer.

    After a dropped connection those not yet answered are sent again; an answer that comes twice counts once.

    Args:
        payloads: one per image.
        host, port: of the server.
        air: what happens to them on the way; None for nothing.
        window: most requests under way.
        timeout_s: longest wait for the next answer.
        attempts: connections to try, each after the one before has broken down.
        first_request: id of the first payload; the others count on.

    Returns:
        One reply per payload, in order.

    Raises:
        ConnectionError: unanswered payloads are left after the last attempt; the message says how many and why.
    """
    arriving = {first_request + i: payload if air is None else air(payload) for i, payload in enumerate(payloads)}
    replies: dict[int, Reply] = {}
    why: Exception | None = None
    for _ in range(attempts):
        try:
            await _exchange(arriving, replies, host, port, window, timeout_s)
        except (OSError, MessageError, TimeoutError) as error:
            why = error
        if len(replies) == len(arriving):
            return [replies[request] for request in arriving]
    raise ConnectionError(
        f"{len(arriving) - len(replies)} of {len(arriving)} payloads unanswered by {host}:{port} after {attempts} "
        f"connections: {why or 'the server closed the connection'}"
    )


async def _exchange(
    arriving: dict[int, bytes], replies: dict[int, Reply], host: str, port: int, window: int, timeout_s: float
) -> None:
    """One connection: send what has no reply yet, take replies until all are there or the connection ends."""
    reader, writer = await asyncio.wait_for(asyncio.open_connection(host, port), timeout_s)
    permits, started = asyncio.Semaphore(window), dict[int, float]()

    async def send() -> None:
        for request in [one for one in arriving if one not in replies]:
            await permits.acquire()
            started[request] = time.monotonic()
            writer.write(bytes(Message(request, REQUEST, arriving[request])))
            await writer.drain()

    sender = asyncio.create_task(send())
    try:
        while len(replies) < len(arriving):
            message = await asyncio.wait_for(read_message(reader, 1 << 20, timeout_s), timeout_s)
            if message is None:
                return
            if message.request not in started or message.request in replies:
                raise MessageError(message.request, f"an answer to request {message.request}, which is not open")
            seconds = time.monotonic() - started[message.request]
            if message.kind == ANSWER:
                reply = Reply(np.frombuffer(message.body, ">f4").astype(np.float32), "", seconds)
            else:
                reply = Reply(None, message.body.decode(errors="replace"), seconds)
            replies[message.request] = reply
            permits.release()
    finally:
        sender.cancel()
        writer.close()
