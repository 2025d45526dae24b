"""The payload: one image's tokens as bytes, in chunks that do not share each other's damage.

| part   | field    | bytes                  | content                                                     |
|--------|----------|------------------------|-------------------------------------------------------------|
| header | magic    | 2                      | ``TM``                                                      |
|        | version  | 1                      | 1                                                           |
|        | flags    | 1                      | bit 0: sizes are sent; bits 1-5: precision code; bit 6: a   |
|        |          |                        | source map is sent; bit 7: some of its patches have no token|
|        | N, D, K  | varint each            | tokens; values per token; tokens per chunk                  |
|        | sections | varint per chunk       | bytes of the chunk's sizes (only if sizes are sent)         |
|        | P        | varint                 | patches of the source map (only if it is sent)              |
|        | map      | P b bits, rounded up   | each patch's token, from 0, low bit first; N: of none.      |
|        |          |                        | b = ceil(log2 N), or of N + 1 with bit 7; at least 1        |
|        | check    | 4                      | CRC32 of the header up to here                              |
| chunk  | sizes    | varint per token       | patches it stands for, at least 1 (only if sizes are sent)  |
|        | steps    | 2 per token            | float16 quantisation step (int8 and int4 only)              |
|        | values   | D bits / 8, rounded up | per token                                                   |
|        | check    | 4                      | CRC32 of the chunk up to here, started from its index       |

ceil(N / K) chunks follow the header; the last holds what is left. Codes: 0 float32, 1 float16, 2 bfloat16,
3 int8 (value = step * q, q in -127..127), 4 int4 (value = step * (q - 8), q in 1..15, two in a byte, low half
first; an odd D leaves the last half 0). All little-endian; varints are unsigned LEB128 of at most 63 bits.

*Damage.* The header alone says where each chunk lies: damage costs the tokens of the chunks it touches, and a
cut-off payload still gives its whole chunks. A damaged header costs the payload. CRC32 notices every burst of
up to 32 bits and misses other damage once in 2^32; started from the index, it notices swapped chunks as well.
A chunk that `encode` cannot have written (a size of 0, a NaN) counts as damaged.

*Memory.* Decoding takes memory in proportion to the payload. Only a cut-off payload announces more than it
holds; since its missing tokens come back as zeros, N x D may then be at most the ``max_values`` of `decode`.
"""

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

MAGIC, VERSION = b"TM", 1
CHUNK_TOKENS = 16
# Bits per value; the precision codes count them in this order.
_BITS = {"float32": 32, "float16": 16, "bfloat16": 16, "int8": 8, "int4": 4}
PRECISIONS = tuple(_BITS)
_LEVELS = {"int8": 127, "int4": 7}  # largest q


class WireError(ValueError):
    """The payload cannot be decoded."""


class Payload(NamedTuple):
    """A decoded payload."""

    tokens: Tensor  #: (N, D) float32; zeros where not received
    sizes: Tensor | None  #: (N,) int64, 0 where not received; None if they were not sent
    received: Tensor  #: (N,) bool, False for the tokens of damaged and missing chunks
    source: Tensor | None = None  #: (P,) int64, token that each patch is part of, -1 for none; None if it was not sent


def payload_bytes(lengths: Tensor, embed_dim: int, precision: str = "float16", sizes: Tensor | None = None,
                  chunk_tokens: int = CHUNK_TOKENS, source: Tensor | None = None) -> Tensor:  # fmt: skip
    """Exact length of what `encode` gives for each image, without encoding: (B,) int64, on the device of ``lengths``.

    Args:
        lengths: (B,) tokens of each image.
        embed_dim: values per token D.
        sizes: (T,) sizes of all images' tokens, image after image; None if they are not sent.
        precision, chunk_tokens: as of `encode`.
        source: (B, P) source maps; None if they are not sent.

    Raises:
        ValueError: unknown precision, bad chunk length, or T is not the sum of the lengths.

    >>> payload_bytes(torch.tensor([197, 0]), 64)
    tensor([25280,    11])
    """
    header, image, chunk = part_bytes(lengths, embed_dim, precision, sizes, chunk_tokens, source)
    return header.index_add_(0, image, chunk)


def part_bytes(
    lengths: Tensor, embed_dim: int, precision: str = "float16", sizes: Tensor | None = None,
    chunk_tokens: int = CHUNK_TOKENS, source: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What `payload_bytes` adds up, and refuses: (B,) bytes of the headers, (C,) image and bytes of every chunk.

    >>> part_bytes(torch.tensor([17]), 64, "int8")
    (tensor([11]), tensor([0, 0]), tensor([1060,   70]))
    """
    _check(precision, chunk_tokens)
    lengths = lengths.long()
    counts = -(-lengths // chunk_tokens)
    images = torch.arange(len(lengths), device=lengths.device)
    image, chunk_image = images.repeat_interleave(lengths), images.repeat_interleave(counts)
    position = torch.arange(len(image), device=lengths.device) - (lengths.cumsum(0) - lengths)[image]
    of_token = (counts.cumsum(0) - counts)[image] + position // chunk_tokens
    held = torch.bincount(of_token, minlength=len(chunk_image))
    header = len(MAGIC) + 2 + _varint_bytes(lengths) + len(_varints([embed_dim, chunk_tokens])) + 4
    chunk = held * _token_bytes(embed_dim, precision) + 4
    if source is not None:
        patches = source.shape[1]
        alphabets = lengths + (source < 0).any(1)
        bits = lengths.new_tensor([_map_bits(alphabet) for alphabet in alphabets.tolist()])
        header = header + len(_varints([patches])) + -(-patches * bits // 8)
    if sizes is None:
        return header, chunk_image, chunk
    if len(image) != len(sizes):
        raise ValueError(f"{len(sizes)} sizes for {len(image)} tokens")
    section = torch.zeros_like(chunk).index_add_(0, of_token, _varint_bytes(sizes.long()))
    return header.index_add_(0, chunk_image, _varint_bytes(section)), chunk_image, chunk + section


def encode(
    tokens: Tensor, sizes: Tensor | None = None, precision: str = "float16", chunk_tokens: int = CHUNK_TOKENS,
    source: Tensor | None = None,
) -> bytes:  # fmt: skip
    """One image's tokens as bytes.

    Args:
        tokens: (N, D) finite floats. They saturate at the largest finite value of a 16-bit precision, and
            at 65504 times the largest q of int8 and int4.
        sizes: (N,) whole numbers, at least 1; None to leave them out.
        precision: one of `PRECISIONS`.
        chunk_tokens: tokens that are lost together. A chunk costs 4 bytes, with sizes at least 5.
        source: (P,) which token each patch is part of, -1 for none; None to leave the map out.

    Raises:
        ValueError: wrong shape, a value that is not finite, a bad size, precision, chunk length or source map.

    >>> payload = encode(torch.tensor([[1.0, -2.5], [0.0, 4.0]]), torch.tensor([1, 300]))
    >>> len(payload), decode(payload).sizes
    (27, tensor([  1, 300]))
    """
    _check(precision, chunk_tokens)
    if tokens.ndim != 2 or (len(tokens) and not tokens.shape[1]):
        raise ValueError(f"tokens must be (N, D), got shape {tuple(tokens.shape)}")
    n, dim = tokens.shape
    values = tokens.detach().to("cpu", torch.float32).contiguous()
    if len(bad := (~values.isfinite()).any(1).nonzero()):
        raise ValueError(f"token {bad[0].item()} holds a value that is not finite")
    counts: list[int] = []
    if sizes is not None:
        whole = sizes.long()
        if sizes.shape != (n,):
            raise ValueError(f"sizes of shape {tuple(sizes.shape)} for {n} tokens")
        if len(bad := ((whole < 1) | (whole != sizes)).nonzero()):
            raise ValueError(f"the size of token {bad[0].item()} is not a whole number of at least 1")
        counts = whole.tolist()

    gaps = source is not None and bool((source < 0).any())
    flags = (sizes is not None) | PRECISIONS.index(precision) << 1 | (source is not None) << 6 | gaps << 7
    header = MAGIC + bytes([VERSION, flags]) + _varints([n, dim, chunk_tokens])
    sections = [_varints(counts[start : start + chunk_tokens]) for start in range(0, n, chunk_tokens)]
    header += _varints([len(section) for section in sections]) if sizes is not None else b""
    header += b"" if source is None else _pack_map(source, n, gaps)
    parts = [header, _crc(header)]
    for index, (section, chunk) in enumerate(zip(sections, values.split(chunk_tokens), strict=False)):
        body = section + _pack(chunk, precision)
        parts += [body, _crc(body, index)]
    return b"".join(parts)


def encode_images(
    tokens: Tensor, counts: Sequence[int], sizes: Tensor | None = None, precision: str = "float16",
    chunk_tokens: int = CHUNK_TOKENS, order: Tensor | None = None, source: Tensor | None = None,
) -> list[bytes]:  # fmt: skip
    """Many images' tokens as bytes, a payload each.

    Tokens are (T, D), sizes (T,), image after image, counts (B,) tokens of each; ``order`` is the (T,) order of travel,
    within each image, None for the order they are in; source maps (B, P) name tokens as they are in. The rest as of
    `encode`.
    """
    if order is not None:
        tokens, sizes = tokens[order], None if sizes is None else sizes[order]
    if order is not None and source is not None:
        first = torch.tensor([0, *counts[:-1]], device=order.device).cumsum(0)[: len(counts), None]
        source = torch.where(source < 0, -1, order.argsort()[source.clamp(min=0) + first] - first)
    rows = tokens.split(list(counts))
    parts = [None] * len(rows) if sizes is None else sizes.split(list(counts))
    maps = [None] * len(rows) if source is None else source
    return [encode(x, own, precision, chunk_tokens, which) for x, own, which in zip(rows, parts, maps, strict=True)]


def decode(payload: bytes, max_values: int = 2**22) -> Payload:
    """Bytes back to tokens, whatever the bytes are.

    Args:
        payload: what `encode` gave, possibly damaged or cut off.
        max_values: largest N x D of a cut-off payload (4 bytes of memory per value and 9 per token).

    Raises:
        WireError: damaged header, bytes beyond the end, or more than ``max_values`` announced but not there.

    >>> payload = bytearray(encode(torch.ones(3, 2), chunk_tokens=2))
    >>> payload[-1] ^= 1
    >>> decode(bytes(payload)).received
    tensor([ True,  True, False])
    """
    n, dim, chunk_tokens, precision, sections, source, at = _read_header(payload)
    chunks, token_bytes = -(-n // chunk_tokens), _token_bytes(dim, precision)
    total = at + n * token_bytes + chunks * 4 + sum(sections or ())
    if len(payload) > total:
        raise WireError(f"{len(payload) - total} bytes beyond the end of the payload")
    if len(payload) < total and n * dim > max_values:
        raise WireError(f"{len(payload)} bytes cannot hold {n} x {dim} values, more than {max_values}")

    tokens, received = torch.zeros(n, dim), torch.zeros(n, dtype=torch.bool)
    sizes = None if sections is None else torch.zeros(n, dtype=torch.int64)
    for index in range(chunks):
        first, last = index * chunk_tokens, min(n, (index + 1) * chunk_tokens)
        section = 0 if sections is None else sections[index]
        end = at + section + (last - first) * token_bytes
        if end + 4 > len(payload):
            break
        body, at = payload[at:end], end + 4
        if payload[end:at] != _crc(body, index):
            continue
        values = _unpack(body[section:], last - first, dim, precision)
        try:
            counts, used = _read_varints(body[:section], 0, 0 if sizes is None else last - first)
        except WireError:
            continue
        if used != section or 0 in counts or not values.isfinite().all():
            continue
        tokens[first:last], received[first:last] = values, True
        if sizes is not None:
            sizes[first:last] = torch.tensor(counts)
    return Payload(tokens, sizes, received, source)


def quantise(values: Tensor, precision: str) -> Tensor:
    """What finite float32 values (T, D) are after `encode` and `decode`, on their device, without making the bytes.

    >>> quantise(torch.tensor([[1.0, 0.3]]), "int4")
    tensor([[1.0006, 0.2859]])
    """
    _check(precision)
    step, q = _rounded(values, precision)
    return q.float() if step is None else q * step.float()


def _read_header(payload: bytes) -> tuple[int, int, int, str, list[int] | None, Tensor | None, int]:
    """N, D, K, precision, sections (None: no sizes), source map (or None) and the header's end."""
    if len(payload) < 4 or payload[:3] != MAGIC + bytes([VERSION]):
        raise WireError(f"not a token payload of version {VERSION}")
    (n, dim, chunk_tokens), at = _read_varints(payload, 4, 3)
    code, sections, source = (payload[3] & 0x3F) >> 1, None, None
    if (n and not dim) or not chunk_tokens or code >= len(PRECISIONS):
        raise WireError("damaged header: a field has a value it cannot have")
    if payload[3] & 1:
        sections, at = _read_varints(payload, at, -(-n // chunk_tokens))
    if payload[3] & 0x40:
        (patches,), at = _read_varints(payload, at, 1)
        bits = _map_bits(n + (payload[3] >> 7))
        packed = payload[at : (end := at + -(-patches * bits // 8))]
        if end > len(payload):
            raise WireError("cut off in its source map")
        at = end
    if payload[at : at + 4] != _crc(payload[:at]):
        raise WireError("damaged header: its checksum does not fit")
    if payload[3] & 0x40:
        source = _unpack_map(packed, patches, bits)
        source[source == n] = -1
        if (source > n).any() or ((source < 0).any() and not payload[3] & 0x80):
            raise WireError("damaged header: a patch is of a token that is not there")
    return n, dim, chunk_tokens, PRECISIONS[code], sections, source, at + 4


def _map_bits(alphabet: int) -> int:
    """Bits of an entry of a source map with so many values: ceil(log2), at least 1."""
    return max(1, (alphabet - 1).bit_length())


def _pack_map(source: Tensor, n: int, gaps: bool) -> bytes:
    if source.ndim != 1 or (len(source) and not -1 <= int(source.min()) <= int(source.max()) < n):
        raise ValueError(f"a source map of shape {tuple(source.shape)} names tokens that are none of {n}")
    bits = _map_bits(n + gaps)
    codes = torch.where(source < 0, n, source).cpu().numpy()
    digits = (codes[:, None] >> np.arange(bits)) & 1
    return _varints([len(codes)]) + np.packbits(digits.astype(np.uint8), bitorder="little").tobytes()


def _unpack_map(packed: bytes, patches: int, bits: int) -> Tensor:
    digits = np.unpackbits(np.frombuffer(packed, np.uint8), count=patches * bits, bitorder="little")
    return torch.from_numpy(digits.reshape(patches, bits).astype(np.int64) @ (1 << np.arange(bits)))


def _read_varints(data: bytes, at: int, count: int) -> tuple[list[int], int]:
    """``count`` numbers from position ``at`` on, and the position after them."""
    values: list[int] = []
    value = shift = 0
    while len(values) < count:
        if at >= len(data) or shift > 56:
            raise WireError("cut off, or a number of more than 63 bits")
        value |= (data[at] & 0x7F) << shift
        shift += 7
        if data[at] < 0x80:
            values.append(value)
            value = shift = 0
        at += 1
    return values, at


def _varints(values: list[int]) -> bytes:
    out = bytearray()
    for value in values:
        while value >= 0x80:
            out.append(value & 0x7F | 0x80)
            value >>= 7
        out.append(value)
    return bytes(out)


def _varint_bytes(values: Tensor) -> Tensor:
    limits = torch.tensor([1 << bits for bits in range(7, 63, 7)], device=values.device)
    return 1 + (values[:, None] >= limits).sum(1)


def _check(precision: str, chunk_tokens: int = CHUNK_TOKENS) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}: use one of {', '.join(PRECISIONS)}")
    if not 1 <= chunk_tokens < 2**63:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")


def _token_bytes(dim: int, precision: str) -> int:
    return -(-dim * _BITS[precision] // 8) + (2 if precision in _LEVELS else 0)


def _crc(data: bytes, start: int = 0) -> bytes:
    return zlib.crc32(data, start).to_bytes(4, "little")


def _rounded(values: Tensor, precision: str) -> tuple[Tensor | None, Tensor]:
    """Each token's (T, 1) float16 step and its (T, D) int8 multiples of it; without steps, values of 16 or 32 bits."""
    if precision not in _LEVELS:
        dtype: torch.dtype = getattr(torch, precision)
        return None, values.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype)
    levels = _LEVELS[precision]
    exact = (values.abs().amax(1, keepdim=True) / levels).clamp(max=torch.finfo(torch.float16).max)
    step = exact.half()
    # Rounded up, to the next bit pattern: a step rounded down clips, badly so among float16's subnormals.
    step = torch.where(step < exact, (step.view(torch.int16) + 1).view(torch.float16), step)
    return step, (values / torch.where(step > 0, step.float(), 1.0)).round().clamp(-levels, levels).to(torch.int8)


def _pack(values: Tensor, precision: str) -> bytes:
    """Steps and values of a chunk (n, D) float32; n and D are at least 1."""
    step, q = _rounded(values, precision)
    if step is None:
        return q.view(torch.uint8).numpy().tobytes()
    if precision == "int4":
        halves = torch.nn.functional.pad((q + 8).to(torch.uint8), (0, q.shape[1] % 2))
        q = halves[:, 0::2] | halves[:, 1::2] << 4
    return step.numpy().tobytes() + q.numpy().tobytes()


def _unpack(data: bytes, n: int, dim: int, precision: str) -> Tensor:
    """What `_pack` packed."""
    raw = bytearray(data)
    if precision not in _LEVELS:
        return torch.frombuffer(raw, dtype=getattr(torch, precision)).view(n, dim).float()
    step = torch.frombuffer(raw, dtype=torch.float16, count=n).float()[:, None]
    q = torch.frombuffer(raw, dtype=torch.int8, offset=2 * n).view(n, -1)
    if precision == "int4":
        halves = q.view(torch.uint8)
        q = torch.stack([halves & 15, halves >> 4], dim=2).flatten(1)[:, :dim].to(torch.int8) - 8
    return q * step
