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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokmerge import wire
from tokmerge.fragments import conceal, travel_order
from tokmerge.packed import Layout, Packed
from tokmerge.vit import MergedViT

REQUEST, ANSWER, FAILURE = 1, 2, 3
_HEAD = struct.Struct(">IQB")


class MessageError(ValueError):
    """What came is not a message, or one that is not accepted."""

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
    """The next message; None where the connection ends between two of them.

    Args:
        reader: of the connection.
        max_bytes: longest body.
        timeout_s: for the whole message, once it has begun.

    Raises:
        MessageError: too long, of an impossible length, cut off, or too slow.
    """
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
class Desk:
    """What the server knows and does with payloads.

    Args:
        merged: the model with policy and split; only its part after the split runs here.
        prototype: (P, D) stands in for lost protected tokens, see `tokmerge.fragments.conceal`.
    """

    merged: MergedViT
    prototype: Tensor

    def open(self, payload: bytes) -> tuple[Packed, Tensor]:
        """The tokens of one payload, in the order they had on the device, and which of them arrived.

        Raises:
            WireError: the payload cannot be decoded.
            ValueError: it is not of this model.
        """
        got = wire.decode(payload, max_values=2**20)
        n, dim = got.tokens.shape
        protected, grid = len(self.prototype), self.merged.model.patch_embed.num_patches
        if dim != self.merged.model.embed_dim or not protected < n <= protected + grid:
            raise ValueError(f"a payload of {n} x {dim} values: not of this model")
        order = travel_order(Layout(torch.tensor([n])), protected)
        back = order.argsort()
        sizes = None if got.sizes is None else got.sizes[back].float().clamp(min=1)
        return Packed(got.tokens[back], Layout(torch.tensor([n])), sizes), got.received[back]

    @torch.inference_mode()
    def answer(self, payloads: list[bytes]) -> list[Tensor | Exception]:
        """Class scores of each payload, or what is wrong with it; what else is in the batch makes no difference."""
        results: list[Any] = [None] * len(payloads)
        opened = {}
        for index, payload in enumerate(payloads):
            try:
                opened[index] = self.open(payload)
            except ValueError as error:
                results[index] = error
        if opened:
            packed = [tokens for tokens, _ in opened.values()]
            sized = any(tokens.sizes is not None for tokens in packed)
            sizes = [torch.ones(len(t.x)) if t.sizes is None else t.sizes for t in packed] if sized else None
            lengths = torch.cat([tokens.lengths for tokens in packed])
            batch = Packed(
                torch.cat([tokens.x for tokens in packed]), Layout(lengths), None if sizes is None else torch.cat(sizes)
            )
            received = torch.cat([received for _, received in opened.values()])
            if not received.all():
                patches = self.merged.model.patch_embed.num_patches
                batch = conceal(batch, received, self.prototype, patches)
            for index, scores in zip(opened, self.merged.serve(batch), strict=True):
                results[index] = scores.float()
        return results


class Server:
    """Answers requests over TCP.

    Args:
        desk: what does the work.
        max_bytes: longest payload.
        max_clients: connections at once; further ones are closed at once.
        idle_s: a connection on which nothing comes for so long is closed.
        message_s: longest time from the first to the last byte of a message.
        batch: most payloads per forward pass.
        window: most requests of one connection under way; further ones wait.

    Attributes:
        answered, failed, refused: requests answered, requests answered with a FAILURE, connections turned away.
    """

    def __init__(
        self, desk: Desk, max_bytes: int = 1 << 20, max_clients: int = 256, idle_s: float = 60.0,
        message_s: float = 10.0, batch: int = 32, window: int = 64,
    ) -> None:  # fmt: skip
        self.desk = desk
        self.max_bytes, self.max_clients = max_bytes, max_clients
        self.idle_s, self.message_s, self.batch, self.window = idle_s, message_s, batch, window
        self.answered = self.failed = self.refused = 0
        self._clients: set[asyncio.Task[None]] = set()

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> tuple[str, int]:
        """Listen; returns the address, with the port that was free if 0 was asked for."""
        # A full queue makes connections wait, and TCP makes their devices wait.
        self._queue: asyncio.Queue[tuple[Message, asyncio.Queue[Message]]] = asyncio.Queue(4 * self.batch)
        self._executor = ThreadPoolExecutor(1)
        self._worker = asyncio.create_task(self._work())
        self._server = await asyncio.start_server(self._connected, host, port)
        address = self._server.sockets[0].getsockname()
        return str(address[0]), int(address[1])

    async def stop(self) -> None:
        """Close every connection and stop."""
        self._server.close()
        for task in (*self._clients, self._worker):
            task.cancel()
        await asyncio.gather(*self._clients, self._worker, return_exceptions=True)
        self._executor.shutdown()

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            waiting = [await self._queue.get()]
            while len(waiting) < self.batch and not self._queue.empty():
                waiting.append(self._queue.get_nowait())
            payloads = [message.body for message, _ in waiting]
            try:
                results = await loop.run_in_executor(self._executor, self.desk.answer, payloads)
            except Exception as error:  # one batch's trouble must not end the service
                results = [error] * len(waiting)
            for (message, out), result in zip(waiting, results, strict=True):
                if isinstance(result, Exception):
                    self.failed += 1
                    out.put_nowait(Message(message.request, FAILURE, str(result).encode()))
                else:
                    self.answered += 1
                    out.put_nowait(Message(message.request, ANSWER, result.numpy().astype(">f4").tobytes()))

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
            self.failed += 1
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(permits.acquire(), self.idle_s)
                out.put_nowait(Message(error.request, FAILURE, str(error).encode()))
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
