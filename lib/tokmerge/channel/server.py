"""The server: payloads come in over HTTP, predictions go out.

    POST /answers   a payload of `tokmerge.wire`; header `IDENTITY`: what the device runs, see `identity`

    200   one little-endian float32 score per class
    408   the payload took too long to come
    409   device and server do not run the same: the text says what differs
    413   the payload is longer than any of this model
    422   the payload cannot be decoded or is not of this model, or its scores are not finite: the text says why
    500   the model failed on it: the text says how
    503   too many requests are under way

Requests of all connections that wait at the same time share one forward pass.
"""

import asyncio
import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch
from aiohttp import web
from torch import Tensor

from tokmerge import wire
from tokmerge.channel.segmentation import conceal, travel_order
from tokmerge.merging.packed import Layout, Packed, join
from tokmerge.models.classifier import MergedClassifier
from tokmerge.models.merged import digest_weights

IDENTITY = "Tokmerge-Identity"
MAX_BATCH = 32  # payloads per forward pass


def identity(merged: MergedClassifier) -> dict[str, Any]:
    """What device and server must agree on: wire version, split, and digests of weights and policy."""
    policy, weights = merged.policy, digest_weights(merged.model)
    merges = policy is not None and any(map(policy.active, range(merged.depth)))
    how = hashlib.sha256(repr(policy).encode()).hexdigest()[:12] if merges else None
    return {"wire": wire.VERSION, "weights": weights, "split": merged.split_layer, "policy": how}


@dataclass(frozen=True)
class Responder:
    """What the server does with payloads.

    Args:
        merged: the model with policy and split; only its part after the split runs here.
        prototype: (P, D) stands in for lost protected tokens, see `tokmerge.channel.segmentation.conceal`.
    """

    merged: MergedClassifier
    prototype: Tensor

    @property
    def most_tokens(self) -> int:
        """Tokens of an image in which nothing has merged."""
        return len(self.prototype) + self.merged.n_patches

    @property
    def longest(self) -> int:
        """Bytes that no payload exceeds: in float32, and for every token a size, a place in a map and a checksum."""
        n = self.most_tokens
        sizes, source = torch.full((n,), n), torch.full((1, n), -1)
        return int(wire.payload_bytes(torch.tensor([n]), self.merged.embed_dim, "float32", sizes, 1, source))

    def open(self, payload: bytes) -> tuple[Packed, Tensor]:
        """The tokens of a payload, in the device's order, and which arrived; a ValueError if not of this model."""
        got = wire.decode(payload, max_values=self.most_tokens * self.merged.embed_dim)
        (n, dim), protected = got.tokens.shape, len(self.prototype)
        if dim != self.merged.embed_dim or not protected < n <= self.most_tokens:
            raise ValueError(f"a payload of {n} x {dim} values: not of this model")
        layout, source = Layout(torch.tensor([n])), None
        order = travel_order(layout, protected)
        back = order.argsort()
        sizes = None if got.sizes is None else got.sizes[back].float().clamp(min=1)
        if self.merged.sends_source:
            source = got.source
            if source is None and self.merged.policy is None and n == self.most_tokens:
                source = back  # each its own
            if source is None or len(source) != self.most_tokens:
                raise ValueError("a payload without a source map of this model's patches")
            # The map names tokens as they travel; it says their sizes as well.
            source = torch.where(source < 0, -1, order[source.clamp(min=0)])
            if self.merged.policy is not None:
                sizes = torch.bincount(source[source >= 0], minlength=n).float().clamp(min=1)
            source = source[None]
        return Packed(got.tokens[back], layout, sizes, source), got.received[back]

    def classify(self, tokens: Packed, received: Tensor, how: str = "drop") -> Tensor:
        """(B, classes) scores or (B, H, W) maps of the tokens that (T,) arrived; ``how`` as of `conceal`."""
        return self.serve(conceal(tokens, received, self.prototype, self.merged.n_patches, how))

    def serve(self, tokens: Packed) -> Tensor:
        """(B, classes) scores or (B, H, W) maps, computed where the model lies, in its precision; of and to the CPU."""
        weights = next(self.merged.parameters())
        return self.merged.serve(tokens.with_x(tokens.x.to(weights.dtype)).to(weights.device)).cpu()

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
                finite = bool(scores.isfinite().all())
                results[index] = scores.float() if finite else ValueError("values too large: no finite scores")
        return results


class Server:
    """Answers requests over HTTP.

    Args:
        responder: what does the work.
        identity: what it runs, see `identity`.
        max_bytes, body_s: longest payload, in bytes and from its first to its last byte.
        max_waiting: most requests under way; further ones are turned away.
    """

    def __init__(
        self, responder: Responder, identity: dict[str, Any], max_bytes: int = 1 << 20, body_s: float = 10.0,
        max_waiting: int = 256,
    ) -> None:  # fmt: skip
        self.responder, self.identity, self.body_s, self.max_waiting = responder, identity, body_s, max_waiting
        self._waiting = 0
        app = web.Application(client_max_size=max_bytes)
        app.router.add_post("/answers", self._answer)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> tuple[str, int]:
        """Listen; returns the address, with the port that was free if 0 was asked for."""
        self._queue: asyncio.Queue[tuple[bytes, asyncio.Future[Any]]] = asyncio.Queue()
        self._worker = asyncio.create_task(self._work())
        await self._runner.setup()
        await web.TCPSite(self._runner, host, port).start()
        found, free, *_ = self._runner.addresses[0]
        return str(found), int(free)

    async def stop(self) -> None:
        """Close every connection and stop."""
        self._worker.cancel()
        await asyncio.gather(self._worker, return_exceptions=True)
        await self._runner.cleanup()

    async def _work(self) -> None:
        while True:
            waiting = [await self._queue.get()]
            while len(waiting) < MAX_BATCH and not self._queue.empty():
                waiting.append(self._queue.get_nowait())
            try:
                results = await asyncio.to_thread(self.responder.answer, [payload for payload, _ in waiting])
            except Exception as error:  # one batch's trouble must not end the service
                results = [error] * len(waiting)
            for (_, future), result in zip(waiting, results, strict=True):
                if not future.done():
                    future.set_result(result)

    async def _answer(self, request: web.Request) -> web.Response:
        if differing := _differences(request.headers.get(IDENTITY, ""), self.identity):
            return web.Response(status=409, text=f"device and server do not run the same: {differing}")
        if self._waiting >= self.max_waiting:
            return web.Response(status=503, text=f"{self._waiting} requests are under way")
        self._waiting += 1
        try:
            async with asyncio.timeout(self.body_s):
                payload = await request.read()
            future = asyncio.get_running_loop().create_future()
            self._queue.put_nowait((payload, future))
            result = await future
        except TimeoutError:
            return web.Response(status=408, text=f"a payload took longer than {self.body_s:g} s")
        finally:
            self._waiting -= 1
        if isinstance(result, Exception):
            return web.Response(status=422 if isinstance(result, ValueError) else 500, text=str(result))
        return web.Response(body=result.numpy().astype("<f4").tobytes())


def _differences(told: str, own: dict[str, Any]) -> str:
    """What is not the same in a device's header and the server's own identity; empty if all is."""
    try:
        other = dict(json.loads(told))
    except ValueError:
        return "the device does not say what it runs"
    return ", ".join(f"{key} {other.get(key)} there, {own[key]} here" for key in own if other.get(key) != own[key])
