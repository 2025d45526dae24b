"""The payload: one image's tokens as bytes, in chunks that do not share each other's damage.

| part   | field    | bytes              | content                                                            |
|--------|----------|--------------------|--------------------------------------------------------------------|
| header | magic    | 2                  | ``TM``                                                             |
|        | version  | 1                  | 1                                                                  |
|        | flags    | 1                  | bit 0: sizes are sent; bits 1-7: precision code (see below)        |
|        | N        | varint             | tokens                                                             |
|        | D        | varint             | values per token                                                   |
|        | K        | varint             | tokens per chunk; the last chunk holds what is left                |
|        | sections | varint per chunk   | bytes of the chunk's sizes (only if sizes are sent)                |
|        | check    | 4                  | CRC32 of the header up to here                                     |
| chunk  | sizes    | varint per token   | patches the token stands for, at least 1 (only if sizes are sent)  |
|        | steps    | 2 per token        | float16 quantisation step (int8 and int4 only)                     |
|        | values   | ceil(D bits / 8)   | per token                                                          |
|        |          | per token          |                                                                    |
|        | check    | 4                  | CRC32 of the chunk up to here, started from the chunk's index      |

There are ceil(N / K) chunks. Codes: 0 float32, 1 float16, 2 bfloat16, 3 int8 (value = step * q, q in -127..127),
4 int4 (value = step * (q - 8), q in 1..15, two in a byte, low half first; an odd D leaves the last half 0).
Numbers are little-endian, varints unsigned LEB128 of at most 9 bytes (63 bits).

*Damage.* Every chunk's place follows from the header alone, so damage costs the tokens of the chunks it touches,
and a cut-off payload gives the chunks that are whole. A damaged header costs the payload. CRC32 notices every
burst of up to 32 bits and misses other damage once in 2^32; the index it starts from tells chunks that changed
places. A chunk holding what `encode` never writes (size 0, a value that is not finite) counts as damaged.

*Memory.* Decoding takes memory in proportion to the payload. Only a cut-off payload can announce more than it
holds: its missing tokens come back as zeros, so N x D may then be at most the ``max_values`` of `decode`.
"""

import zlib
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

MAGIC = b"TM"
VERSION = 1
CHUNK_TOKENS = 16
_CODES = {"float32": 0, "float16": 1, "bfloat16": 2, "int8": 3, "int4": 4}
_BITS = {"float32": 32, "float16": 16, "bfloat16": 16, "int8": 8, "int4": 4}
_LEVELS = {"int8": 127, "int4": 7}
_CRC_BYTES, _STEP_BYTES, _VARINT_BYTES = 4, 2, 9
PRECISIONS = tuple(_CODES)


class WireError(ValueError):
    """The payload cannot be decoded."""


class Payload(NamedTuple):
    """A decoded payload.

    Attributes:
        tokens: (N, D) float32; zeros where not received.
        sizes: (N,) int64, 0 where not received; None if they were not sent.
        received: (N,) bool, False for the tokens of damaged and missing chunks.
    """

    tokens: Tensor
    sizes: Tensor | None
    received: Tensor


def payload_bytes(
    lengths: Tensor,
    embed_dim: int,
    precision: str = "float16",
    sizes: Tensor | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Tensor:
    """Exact length of what `encode` gives for each image, without encoding.

    Args:
        lengths: (B,) tokens of each image.
        embed_dim: values per token D.
        precision: one of `PRECISIONS`.
        sizes: (T,) sizes of all images' tokens, image after image; None if they are not sent.
        chunk_tokens: tokens per chunk.

    Returns:
        (B,) int64 bytes, on the device of ``lengths``.

    Raises:
        ValueError: unknown precision, or T is not the sum of the lengths.

    >>> payload_bytes(torch.tensor([197, 0]), 64)
    tensor([25280,    11])
    """
    lengths = lengths.long()
    chunks = -(-lengths // chunk_tokens)
    fixed = len(MAGIC) + 2 + len(_varint(embed_dim)) + len(_varint(chunk_tokens)) + _CRC_BYTES
    total = fixed + _varint_bytes(lengths) + lengths * _token_bytes(embed_dim, precision) + chunks * _CRC_BYTES
    if sizes is None:
        return total
    images = torch.arange(len(lengths), device=lengths.device)
    image, chunk_image = images.repeat_interleave(lengths), images.repeat_interleave(chunks)
    if len(image) != len(sizes):
        raise ValueError(f"{len(sizes)} sizes for {len(image)} tokens")
    position = torch.arange(len(image), device=lengths.device) - (lengths.cumsum(0) - lengths)[image]
    chunk = (chunks.cumsum(0) - chunks)[image] + position // chunk_tokens
    section = torch.zeros_like(chunk_image).index_add_(0, chunk, _varint_bytes(sizes.long()))
    return total.index_add_(0, chunk_image, section + _varint_bytes(section))


def encode(
    tokens: Tensor, sizes: Tensor | None = None, precision: str = "float16", chunk_tokens: int = CHUNK_TOKENS
) -> bytes:
    """One image's tokens as bytes.

    Args:
        tokens: (N, D) finite floats. Beyond the range of the precision they saturate: float16 at 65504,
            int8 at 127 and int4 at 7 times that.
        sizes: (N,) whole numbers, at least 1; None to leave them out.
        precision: one of `PRECISIONS`.
        chunk_tokens: tokens lost together when one of their bytes is damaged; each chunk costs 4 bytes, and
            1 or 2 more with sizes.

    Raises:
        ValueError: wrong shape, a value that is not finite, a bad size, precision or chunk length.

    >>> payload = encode(torch.tensor([[1.0, -2.5], [0.0, 4.0]]), torch.tensor([1, 300]))
    >>> len(payload), decode(payload).sizes
    (27, tensor([  1, 300]))
    """
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}: use one of {', '.join(PRECISIONS)}")
    if tokens.ndim != 2 or (len(tokens) and not tokens.shape[1]):
        raise ValueError(f"tokens must be (N, D), got shape {tuple(tokens.shape)}")
    if not 1 <= chunk_tokens < 2**63:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    n, dim = tokens.shape
    values = tokens.detach().to("cpu", torch.float32)
    bad = (~values.isfinite()).any(1)
    if bad.any():
        raise ValueError(f"token {int(bad.nonzero()[0])} holds a value that is not finite")
    counts = [] if sizes is None else _whole_sizes(sizes, n)

    starts = range(0, n, chunk_tokens)
    sections = [_varints(counts[i : i + chunk_tokens]) for i in starts]
    header = MAGIC + bytes([VERSION, (sizes is not None) | _CODES[precision] << 1])
    header += _varints([n, dim, chunk_tokens])
    if sizes is not None:
        header += _varints([len(section) for section in sections])
    parts = [header, _crc(header)]
    for index, start in enumerate(starts):
        body = sections[index] + _pack(values[start : start + chunk_tokens], precision)
        parts += [body, _crc(body, index)]
    return b"".join(parts)


def decode(payload: bytes, max_values: int = 2**22) -> Payload:
    """Bytes back to tokens, whatever the bytes are.

    Args:
        payload: what `encode` gave, possibly damaged or cut off.
        max_values: largest N x D of a cut-off payload (4 bytes of memory each).

    Raises:
        WireError: damaged header, bytes beyond the end, or more than ``max_values`` announced but not there.

    >>> payload = bytearray(encode(torch.ones(3, 2), chunk_tokens=2))
    >>> payload[-1] ^= 1
    >>> decode(bytes(payload)).received
    tensor([ True,  True, False])
    """
    header = _read_header(payload)
    n, dim, step, sections = header.n, header.dim, header.chunk_tokens, header.sections
    chunks, token_bytes = -(-n // step), _token_bytes(dim, header.precision)
    total = header.end + n * token_bytes + chunks * _CRC_BYTES + sum(sections or ())
    if len(payload) > total:
        raise WireError(f"{len(payload) - total} bytes beyond the end of the payload")
    if len(payload) < total and n * dim > max_values:
        raise WireError(f"{len(payload)} bytes cannot hold {n} x {dim} values, more than {max_values}")

    tokens, received = torch.zeros(n, dim), torch.zeros(n, dtype=torch.bool)
    sizes = None if sections is None else torch.zeros(n, dtype=torch.int64)
    at = header.end
    for index in range(chunks):
        first, last = index * step, min(n, (index + 1) * step)
        section = 0 if sections is None else sections[index]
        end = at + section + (last - first) * token_bytes
        if end + _CRC_BYTES > len(payload):
            break
        body, at = payload[at:end], end + _CRC_BYTES
        if payload[end:at] != _crc(body, index):
            continue
        values = _unpack(body[section:], last - first, dim, header.precision)
        counts = _read_sizes(body[:section], last - first) if sizes is not None else []
        if counts is None or not values.isfinite().all():
            continue
        tokens[first:last], received[first:last] = values, True
        if sizes is not None:
            sizes[first:last] = torch.tensor(counts)
    return Payload(tokens, sizes, received)


class _Header(NamedTuple):
    n: int
    dim: int
    chunk_tokens: int
    precision: str
    sections: list[int] | None
    end: int


def _read_header(payload: bytes) -> _Header:
    if payload[:2] != MAGIC or len(payload) < 4:
        raise WireError("not a token payload: it does not begin with TM")
    if payload[2] != VERSION:
        raise WireError(f"payload version {payload[2]}: only version {VERSION} can be read")
    flags = payload[3]
    (n, dim, chunk_tokens), at = _read_varints(payload, 4, 3)
    if (n and not dim) or not chunk_tokens:
        raise WireError("damaged header: tokens without values, or chunks without tokens")
    sections = None
    if flags & 1:
        sections, at = _read_varints(payload, at, -(-n // chunk_tokens))
    end = at + _CRC_BYTES
    if payload[at:end] != _crc(payload[:at]):
        raise WireError("damaged header: its checksum does not fit")
    if flags >> 1 >= len(PRECISIONS):
        raise WireError(f"unknown precision code {flags >> 1}")
    return _Header(n, dim, chunk_tokens, PRECISIONS[flags >> 1], sections, end)


def _read_varints(data: bytes, at: int, count: int) -> tuple[list[int], int]:
    """``count`` varints from position ``at`` on, and the position after them."""
    values: list[int] = []
    while len(values) < count:
        value = 0
        for place in range(_VARINT_BYTES + 1):
            if place == _VARINT_BYTES or at + place >= len(data):
                raise WireError("cut off, or a number of more than 63 bits")
            byte = data[at + place]
            value |= (byte & 0x7F) << 7 * place
            if byte < 0x80:
                break
        values.append(value)
        at += place + 1
    return values, at


def _read_sizes(section: bytes, count: int) -> list[int] | None:
    try:
        sizes, end = _read_varints(section, 0, count)
    except WireError:
        return None
    return sizes if end == len(section) and min(sizes) >= 1 else None


def _whole_sizes(sizes: Tensor, n: int) -> list[int]:
    if sizes.shape != (n,):
        raise ValueError(f"sizes of shape {tuple(sizes.shape)} for {n} tokens")
    whole = sizes.long()
    bad = (whole < 1) | (whole != sizes)
    if bad.any():
        index = int(bad.nonzero()[0])
        raise ValueError(f"sizes[{index}] is {sizes[index].item()}, not a whole number of at least 1")
    return whole.tolist()


def _token_bytes(dim: int, precision: str) -> int:
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}: use one of {', '.join(PRECISIONS)}")
    return -(-dim * _BITS[precision] // 8) + (_STEP_BYTES if precision in _LEVELS else 0)


def _varints(values: list[int]) -> bytes:
    return b"".join(map(_varint, values))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _varint_bytes(values: Tensor) -> Tensor:
    limits = torch.tensor([1 << bits for bits in range(7, 63, 7)], device=values.device)
    return 1 + torch.bucketize(values, limits, right=True)


def _crc(data: bytes, start: int = 0) -> bytes:
    return zlib.crc32(data, start).to_bytes(_CRC_BYTES, "little")


def _pack(values: Tensor, precision: str) -> bytes:
    """Steps and values of one chunk's tokens (n, D) float32, n and D at least 1."""
    if precision not in _LEVELS:
        dtype, bits = getattr(torch, precision), _BITS[precision]
        largest = torch.finfo(dtype).max
        raw = values.clamp(-largest, largest).to(dtype).view(getattr(torch, f"int{bits}"))
        return raw.numpy().astype(f"<i{bits // 8}").tobytes()
    levels, x = _LEVELS[precision], values.numpy()
    exact = np.minimum(np.abs(x).max(1, keepdims=True) / levels, np.finfo(np.float16).max)
    step = exact.astype("<f2")
    # Rounded up: a step rounded down, above all among float16's subnormals, would clip the largest values.
    step = np.where(step < exact, np.nextafter(step, np.float16(np.inf)), step).astype("<f2")
    q = np.rint(x / np.where(step > 0, step, np.float16(1))).clip(-levels, levels).astype(np.int8)
    if precision == "int4":
        halves = np.pad((q + 8).astype(np.uint8), ((0, 0), (0, q.shape[1] % 2)))
        return step.tobytes() + (halves[:, 0::2] | halves[:, 1::2] << 4).tobytes()
    return step.tobytes() + q.tobytes()


def _unpack(data: bytes, n: int, dim: int, precision: str) -> Tensor:
    if precision not in _LEVELS:
        size = _BITS[precision] // 8
        raw = np.frombuffer(data, f"<i{size}").astype(f"=i{size}").reshape(n, dim)
        return torch.from_numpy(raw).view(getattr(torch, precision)).float()
    step = np.frombuffer(data[: n * _STEP_BYTES], "<f2").astype(np.float32)[:, None]
    q = np.frombuffer(data[n * _STEP_BYTES :], np.int8).reshape(n, -1)
    if precision == "int4":
        halves = q.view(np.uint8)
        q = np.stack([halves & 15, halves >> 4], axis=2).reshape(n, -1)[:, :dim].astype(np.int8) - 8
    return torch.from_numpy(q * step)
