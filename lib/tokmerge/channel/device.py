"""The device: images become payloads, which go over HTTP to the server."""

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import aiohttp
import numpy as np
import torch
from torch import Tensor

from tokmerge.channel.segmentation import LINK_CHUNK, encode_payloads
from tokmerge.channel.server import IDENTITY
from tokmerge.models.classifier import MergedClassifier


class Reply(NamedTuple):
    """What came back for a payload: scores, or None and what the server said was wrong; seconds from sending to it."""

    scores: np.ndarray | None
    failure: str
    seconds: float


@torch.inference_mode()
def payloads(merged: MergedClassifier, images: Tensor, chunk_tokens: int = LINK_CHUNK) -> list[bytes]:
    """What the device sends for (B, C, H, W) images: the first blocks run, and their tokens become bytes."""
    sent = merged.edge(images.to(next(merged.parameters()).device))
    return encode_payloads(merged, sent.to("cpu"), chunk_tokens)


async def request_answers(
    payloads: Sequence[bytes], host: str, port: int, identity: Mapping[str, Any], window: int = 16,
    timeout_s: float = 30.0, attempts: int = 3,
) -> list[Reply]:  # fmt: skip
    """Send payloads and wait for every answer, in order; what was not answered is sent again.

    Args:
        payloads, host, port: what arrives of each image, and where.
        identity: of the device's model, see `tokmerge.channel.server.identity`.
        window, timeout_s, attempts: most requests under way; longest wait for an answer; how often a payload is sent.

    Raises:
        ConnectionError: the server runs something else, or payloads are unanswered after the last attempt.
    """
    permits, timeout = asyncio.Semaphore(window), aiohttp.ClientTimeout(total=timeout_s)
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    headers = {IDENTITY: json.dumps(dict(identity))}

    async def ask(session: aiohttp.ClientSession, payload: bytes) -> Reply | str:
        why = ""
        for _ in range(attempts):
            async with permits:
                start = time.monotonic()
                try:
                    async with session.post("/answers", data=payload) as response:
                        body = await response.read()
                except (aiohttp.ClientError, TimeoutError) as error:
                    why = str(error) or f"no answer within {timeout_s:g} s"
                    continue
            seconds = time.monotonic() - start
            if response.status == 200:
                return Reply(np.frombuffer(body, "<f4").astype(np.float32), "", seconds)
            why = body.decode(errors="replace")
            if response.status == 409:
                raise ConnectionError(why)
            if response.status != 503:
                return Reply(None, why, seconds)
            await asyncio.sleep(0.1)
        return why

    async with aiohttp.ClientSession(url, headers=headers, timeout=timeout) as session:
        answers = await asyncio.gather(*(ask(session, payload) for payload in payloads))
    replies = [answer for answer in answers if isinstance(answer, Reply)]
    if lost := [answer for answer in answers if isinstance(answer, str)]:
        raise ConnectionError(
            f"{len(lost)} of {len(payloads)} payloads unanswered by {host}:{port} after {attempts} attempts: {lost[0]}"
        )
    return replies
