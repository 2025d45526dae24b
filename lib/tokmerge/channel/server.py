"""The server: payloads come in over TCP, predictions go out.

A message is its length (4 bytes, of what follows), a request id (8 bytes), a kind (1 byte) and a body, all big-endian:

    REQUEST  a payload of `tokmerge.wire`         device to server
    ANSWER   one float32 score per class          server to device
    FAILURE  what was wrong, UTF-8                server to device

Every request is answered once, in any order. A payload that cannot be decoded is answered with a FAILURE and the
connection goes on; after a message that is no request or too long nothing on that connection can be trusted, so it is
closed. Requests of all connections that wait at the same time share one forward pass.
"""

import asyncio
import contextlib
import struct
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokmerge import wire
from tokmerge.channel.segmentation import conceal, travel_order
from tokmerge.merging.packed import Layout, Packed, join
from tokmerge.models.vit import MergedViT

REQUEST, ANSWER, FAILURE = 1, 2, 3
MAX_BATCH = 32  # payloads per forward pass
_HEAD = struct.Struct(">IQB")


class MessageError(ValueError):
    """What came is no message, or none that is accepted."""

    def __init__(self, request: int, why: str) -> None:
        super().__init__(why)
        self.request = request


@dataclass(frozen=True)
class Message:
    """One message: request id, kind, body."""

    request: int
    kind: int
    body: bytes

    def __bytes__(self) -> bytes:
        return _HEAD.pack(_HEAD.size - 4 + len(self.body), self.request, self.kind) + self.body


async def read_message(reader: asyncio.StreamReader, max_bytes: int, timeout_s: float) -> Message | None:
    """The next message, of at most so many bytes and seconds once begun; None where the connection ends between two."""
    first = await reader.read(1)
    if not first:
        return None
    request = 0
    try:
        async with asyncio.timeout(timeout_s):
            length, request, kind = _HEAD.unpack(first + await reader.readexactly(_HEAD.size - 1))
            size = length - (_HEAD.size - 4)
            if not 0 <= size <= max_bytes:
                raise MessageError(request, f"a message of {size} bytes: at most {max_bytes} are accepted")
            return Message(request, kind, await reader.readexactly(size))
    except asyncio.IncompleteReadError as error:
        raise MessageError(request, "the connection ended within a message") from error
    except TimeoutError as error:
        raise MessageError(request, f"a message took longer than {timeout_s:g} s") from error


@dataclass(frozen=True)
class Responder:
    """What the server does with payloads.

    Args:
        merged: the model with policy and split; only its part after the split runs here.
        prototype: (P, D) stands in for lost protected tokens, see `tokmerge.channel.segmentation.conceal`.
    """

    merged: MergedViT
    prototype: Tensor

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return int(self.merged.model.patch_embed.num_patches)

    def open(self, payload: bytes) -> tuple[Packed, Tensor]:
        """The tokens of a payload, in the device's order, and which arrived; a ValueError if not of this model."""
        got = wire.decode(payload, max_values=2**20)
        (n, dim), protected = got.tokens.shape, len(self.prototype)
        if dim != self.merged.model.embed_dim or not protected < n <= protected + self.patches:
            raise ValueError(f"a payload of {n} x {dim} values: not of this model")
        layout = Layout(torch.tensor([n]))
        back = travel_order(layout, protected).argsort()
        sizes = None if got.sizes is None else got.sizes[back].float().clamp(min=1)
        return Packed(got.tokens[back], layout, sizes), got.received[back]

    def classify(self, tokens: Packed, received: Tensor, how: str = "drop") -> Tensor:
        """(B, classes) scores from those of the tokens that (T,) arrived; ``how`` as of `conceal`."""
        return self.merged.serve(conceal(tokens, received, self.prototype, self.patches, how))

    @torch.inference_mode()
    def answer(self, payloads: list[bytes]) -> list[Tensor | Exception]:
        """Class scores of each payload, or what is wrong with it; what else is in the batch makes no difference."""
        results: list[Any] = []
        for payload in payloads:
            try:
                results.append(self.open(payload))
            except ValueError as error:
                results.append(error)
        opened = [index for index, result in enumerate(results) if not isinstance(result, Exception)]
        if opened:
            tokens, received = zip(*(results[index] for index in opened), strict=True)
            for index, scores in zip(opened, self.classify(join(tokens), torch.cat(received)), strict=True):
                results[index] = scores.float()
        return results


class Server:
    """Answers requests over TCP.

    Args:
        responder: what does the work.
        max_bytes, message_s: longest message, in bytes and from its first to its last byte.
        max_clients: connections at once; further ones are closed at once.
        idle_s: a connection on which nothing comes for so long is closed.
        window: most requests of one connection under way; further ones wait.

    Attributes:
        answered, failed, refused: requests answered, requests answered with a FAILURE, connections turned away.
    """

    def __init__(
        self, responder: Responder, max_bytes: int = 1 << 20, max_clients: int = 256, idle_s: float = 60.0,
        message_s: float = 10.0, window: int = 64,
    ) -> None:  # fmt: skip
        self.responder, self.max_bytes, self.max_clients = responder, max_bytes, max_clients
        self.idle_s, self.message_s, self.window = idle_s, message_s, window
        self.answered = self.failed = self.refused = 0
        self._clients: set[asyncio.Task[None]] = set()

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> tuple[str, int]:
        """Listen; returns the address, with the port that was free if 0 was asked for."""
        # A full queue makes connections wait, and TCP makes their devices wait.
        self._queue: asyncio.Queue[tuple[Message, asyncio.Queue[Message]]] = asyncio.Queue(4 * MAX_BATCH)
        self._worker = asyncio.create_task(self._work())
        self._server = await asyncio.start_server(self._connected, host, port)
        found, free, *_ = self._server.sockets[0].getsockname()
        return str(found), int(free)

    async def stop(self) -> None:
        """Close every connection and stop."""
        self._server.close()
        for task in (*self._clients, self._worker):
            task.cancel()
        await asyncio.gather(*self._clients, self._worker, return_exceptions=True)

    async def _work(self) -> None:
        while True:
            waiting = [await self._queue.get()]
            while len(waiting) < MAX_BATCH and not self._queue.empty():
                waiting.append(self._queue.get_nowait())
            try:
                results = await asyncio.to_thread(self.responder.answer, [message.body for message, _ in waiting])
            except Exception as error:  # one batch's trouble must not end the service
                results = [error] * len(waiting)
            for (message, out), result in zip(waiting, results, strict=True):
                out.put_nowait(self._reply(message.request, result))

    def _reply(self, request: int, result: Tensor | Exception) -> Message:
        """What goes back, and is counted."""
        if isinstance(result, Exception):
            self.failed += 1
            return Message(request, FAILURE, str(result).encode())
        self.answered += 1
        return Message(request, ANSWER, result.numpy().astype(">f4").tobytes())

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._clients) >= self.max_clients:
            self.refused += 1
            writer.close()
            return
        task = asyncio.current_task()
        assert task is not None
        self._clients.add(task)
        out: asyncio.Queue[Message] = asyncio.Queue()
        # One permit per request under way: who does not read answers cannot go on asking.
        permits = asyncio.Semaphore(self.window)
        sender = asyncio.create_task(_send(out, writer, permits))
        try:
            await self._listen(reader, out, permits)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.idle_s):
                    for _ in range(self.window):  # until everything taken is answered
                        await permits.acquire()
        except asyncio.CancelledError:
            pass  # the server stops; a task that ends cancelled is logged as an error by asyncio's streams
        finally:
            self._clients.discard(task)
            sender.cancel()
            writer.close()

    async def _listen(
        self, reader: asyncio.StreamReader, out: asyncio.Queue[Message], permits: asyncio.Semaphore
    ) -> None:
        """Take requests until the connection ends, one way or another."""
        try:
            while message := await asyncio.wait_for(read_message(reader, self.max_bytes, self.message_s), self.idle_s):
                if message.kind != REQUEST:
                    raise MessageError(message.request, f"a message of kind {message.kind}: only requests are accepted")
                await asyncio.wait_for(permits.acquire(), self.idle_s)
                await self._queue.put((message, out))
        except MessageError as error:
            reply = self._reply(error.request, error)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(permits.acquire(), self.idle_s)
                out.put_nowait(reply)
        except (TimeoutError, ConnectionError):
            pass


async def _send(out: asyncio.Queue[Message], writer: asyncio.StreamWriter, permits: asyncio.Semaphore) -> None:
    """Write messages as they come; after the other side has gone, let them pass."""
    while True:
        message = await out.get()
        with contextlib.suppress(ConnectionError):
            writer.write(bytes(message))
            await writer.drain()
        permits.release()
