"""The payload format: round trips, exact lengths, and damage of every kind."""

import os
import struct
import zlib
from contextlib import suppress
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokmerge.wire import CHUNK_TOKENS, PRECISIONS, WireError, decode, encode, payload_bytes, quantise
from torch import Tensor

fast = settings(max_examples=60, deadline=None, derandomize=True, database=None)
few = settings(fast, max_examples=25)
# `make fuzz` asks for many more, and for others each time.
fuzz = settings(few, max_examples=int(os.environ.get("FUZZ", "40")), derandomize="FUZZ" not in os.environ)
precisions = st.sampled_from(PRECISIONS)
floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
# The lengths of a varint change at powers of 128.
sizes_near_steps = st.one_of(
    st.integers(1, 130), st.integers(16382, 16386), st.integers(2**21 - 2, 2**21 + 2), st.just(2**62)
)


@st.composite
def images(draw: st.DrawFn) -> tuple[Tensor, Tensor | None]:
    """Tokens (N, D) of every magnitude and sizes (N,) or None."""
    n, dim = draw(st.integers(0, 40)), draw(st.integers(1, 9))
    some = draw(st.lists(floats, min_size=1, max_size=n * dim or 1))
    values = torch.tensor((some * (n * dim))[: n * dim], dtype=torch.float32)
    sizes = draw(st.none() | st.lists(sizes_near_steps, min_size=n, max_size=n))
    return values.view(n, dim), None if sizes is None else torch.tensor(sizes, dtype=torch.int64)


def sample(n: int, dim: int, sized: bool) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(n * 100 + dim)
    sizes = torch.randint(1, 300, (n,), generator=generator) if sized else None
    return torch.randn(n, dim, generator=generator), sizes


def assert_same_where_received(payload: bytes, tokens: Tensor, sizes: Tensor | None) -> Tensor:
    """Decode; what counts as received must be the original, the rest zeros. Returns the received mask."""
    got = decode(payload)
    assert got.tokens.shape == tokens.shape
    assert torch.equal(got.tokens, tokens * got.received[:, None])
    assert (got.sizes is None) == (sizes is None)
    if sizes is not None and got.sizes is not None:
        assert torch.equal(got.sizes, sizes * got.received)
    return got.received


def header(flags: int, *numbers: int, magic: bytes = b"TM", version: int = 1) -> bytes:
    """A header with a fitting CRC32, whatever the numbers."""
    body = magic + bytes([version, flags]) + b"".join(leb128(number) for number in numbers)
    return body + struct.pack("<I", zlib.crc32(body))


def leb128(number: int) -> bytes:
    groups = [number >> shift & 0x7F for shift in range(0, max(number.bit_length(), 1), 7)]
    return bytes([group | 0x80 for group in groups[:-1]] + groups[-1:])


@fast
@given(images(), st.sampled_from(["float32", "float16", "bfloat16"]), st.integers(1, 50))
def test_floats_and_sizes_come_back(image: tuple[Tensor, Tensor | None], precision: str, chunk: int) -> None:
    tokens, sizes = image
    dtype = getattr(torch, precision)
    largest = torch.finfo(dtype).max
    payload = encode(tokens, sizes, precision, chunk)
    assert_same_where_received(payload, tokens.clamp(-largest, largest).to(dtype).float(), sizes)
    assert decode(payload).received.all()


@fast
@given(images(), st.sampled_from([("int8", 127), ("int4", 7)]))
def test_quantised_values_are_within_half_a_step(
    image: tuple[Tensor, Tensor | None], quantiser: tuple[str, int]
) -> None:
    precision, levels = quantiser
    tokens = image[0].clamp(-65504 * levels, 65504 * levels)
    got = decode(encode(tokens, image[1], precision))
    # float16 holds the step to 11 bits, and to 2^-24 among its subnormals.
    step = tokens.double().abs().amax(1, keepdim=True) / levels * (1 + 2**-10) + 2**-24
    assert ((got.tokens - tokens.double()).abs() <= step * 0.5001).all()
    assert got.received.all()
    if image[1] is not None:
        assert got.sizes is not None
        assert torch.equal(got.sizes, image[1])


@fast
@given(images(), precisions)
def test_quantising_is_encoding_and_decoding(image: tuple[Tensor, Tensor | None], precision: str) -> None:
    assert torch.equal(quantise(image[0], precision), decode(encode(image[0], None, precision)).tokens)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_extreme_tokens(precision: str) -> None:
    top = torch.finfo(torch.float32).max
    got = decode(encode(torch.tensor([[0.0, 0, 0], [top, -top, top], [1e-40, 0, 0]]), None, precision)).tokens
    assert got.isfinite().all()
    assert got[0].tolist() == [0, 0, 0]
    assert got[1, 0] == -got[1, 1] == got[1, 2] > 6e4
    assert got[2].abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_float_inputs_and_memory_layouts(dtype: torch.dtype) -> None:
    tokens = torch.arange(12.0).view(3, 4).to(dtype).requires_grad_().T
    for precision in PRECISIONS[:3]:
        assert torch.equal(decode(encode(tokens, None, precision)).tokens, tokens.detach().float())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3),), "must be"),
        ((torch.zeros(3, 0),), "must be"),
        ((torch.zeros(2, 2), torch.ones(3)), "sizes of shape"),
        ((torch.zeros(2, 2), torch.tensor([1, 0])), "size of token 1"),
        ((torch.zeros(2, 2), torch.tensor([-4, 1])), "size of token 0"),
        ((torch.zeros(2, 2), torch.tensor([1, 1.5])), "size of token 1"),
        ((torch.zeros(2, 2), torch.tensor([1, torch.nan])), "size of token 1"),
        ((torch.tensor([[0, 0], [0, torch.nan], [torch.inf, 0]]),), "token 1"),
        ((torch.tensor([[0, -torch.inf]]),), "token 0"),
        ((torch.tensor([[0, 1e300]], dtype=torch.float64),), "token 0"),
        ((torch.zeros(2, 2), None, "float8"), "float8"),
        ((torch.zeros(2, 2), None, "int8", 0), "chunk_tokens"),
    ],
)
def test_encode_refuses(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode(*arguments)


@fast
@given(
    st.lists(st.integers(0, 150), min_size=1, max_size=5),
    st.integers(1, 300),
    precisions,
    st.booleans(),
    st.integers(1, 100),
    st.randoms(use_true_random=False),
)
def test_payload_bytes_is_exact(
    lengths: list[int], dim: int, precision: str, sized: bool, chunk: int, random: Random
) -> None:
    pool = (1, 5, 127, 128, 16383, 16384, 2**21 - 1, 2**21, 2**62)
    parts = [torch.tensor([random.choice(pool) for _ in range(n)], dtype=torch.int64) for n in lengths]
    expected = [
        len(encode(torch.zeros(n, dim), part if sized else None, precision, chunk))
        for n, part in zip(lengths, parts, strict=True)
    ]
    packed = torch.cat(parts) if sized else None
    got = payload_bytes(torch.tensor(lengths), dim, precision, packed, chunk)
    assert got.dtype == torch.int64
    assert got.tolist() == expected


def test_payload_bytes_defaults_and_refusals() -> None:
    tokens, sizes = sample(200, 64, True)
    assert sizes is not None
    # Engines hold sizes as floats.
    assert payload_bytes(torch.tensor([200]), 64, sizes=sizes.float()).item() == len(encode(tokens, sizes))
    assert payload_bytes(torch.tensor([], dtype=torch.int64), 64, sizes=torch.tensor([])).tolist() == []
    with pytest.raises(ValueError, match="3 sizes for 2 tokens"):
        payload_bytes(torch.tensor([1, 1]), 64, sizes=torch.ones(3))
    with pytest.raises(ValueError, match="float8"):
        payload_bytes(torch.tensor([1]), 64, "float8")


@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_flipped_bit_costs_one_chunk_or_is_refused(precision: str, sized: bool) -> None:
    tokens, sizes = sample(5, 3, sized)
    payload = encode(tokens, sizes, precision, chunk_tokens=2)
    whole = decode(payload).tokens
    header_end = 4 + 3 + 3 * sized + 4
    for bit in range(len(payload) * 8):
        damaged = bytearray(payload)
        damaged[bit // 8] ^= 1 << bit % 8
        if bit // 8 < header_end:
            with pytest.raises(WireError):
                decode(bytes(damaged))
        else:
            lost = (~assert_same_where_received(bytes(damaged), whole, sizes)).nonzero().flatten().tolist()
            assert lost in ([0, 1], [2, 3], [4])


@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_truncation_keeps_the_whole_chunks(precision: str, sized: bool) -> None:
    tokens, sizes = sample(7, 3, sized)
    payload = encode(tokens, sizes, precision, chunk_tokens=3)
    whole = decode(payload).tokens
    header_end, counts = 4 + 3 + 3 * sized + 4, set()
    for length in range(len(payload)):
        if length < header_end:
            with pytest.raises(WireError):
                decode(payload[:length])
        else:
            received = assert_same_where_received(payload[:length], whole, sizes)
            assert received.sum() == received.int().cumprod(0).sum()
            counts.add(int(received.sum()))
    assert counts == {0, 3, 6}
    for extra in (b"\0", payload):
        with pytest.raises(WireError, match="beyond the end"):
            decode(payload + extra)


def test_chunks_that_changed_places_are_noticed() -> None:
    tokens, _ = sample(4, 8, False)
    payload = encode(tokens, None, "float32", chunk_tokens=1)
    start, step = 11, 8 * 4 + 4
    head, (a, b, c, d) = payload[:start], (payload[i : i + step] for i in range(start, len(payload), step))
    swapped = assert_same_where_received(head + a + c + b + d, tokens, None)
    assert swapped.tolist() == [True, False, False, True]
    repeated = assert_same_where_received(head + a + a + c + d, tokens, None)
    assert repeated.tolist() == [True, False, True, True]


def test_layout_assembled_by_hand() -> None:
    # Two tokens in chunks of one, int4, D = 3, with sizes 5 and 300: flags 1 | 4 << 1.
    head = header(0b1001, 2, 3, 1, 1, 2)
    first = bytes([5]) + struct.pack("<e", 0.5) + bytes([(8 + 7) | (8 - 7) << 4, 8 + 2])
    second = bytes([0b10101100, 0b10]) + struct.pack("<e", 2.0) + bytes([8 | (8 - 1) << 4, 8 + 3])
    payload = head + first + struct.pack("<I", zlib.crc32(first, 0))
    payload += second + struct.pack("<I", zlib.crc32(second, 1))
    got = decode(payload)
    assert got.tokens.tolist() == [[3.5, -3.5, 1.0], [0.0, -2.0, 6.0]]
    assert got.sizes is not None
    assert got.sizes.tolist() == [5, 300]
    assert got.received.tolist() == [True, True]

    # float16 without sizes, D = 300, one chunk of K = 16: the same bytes from encode, exactly.
    values = [float(i % 50) for i in range(600)]
    body = struct.pack("<600e", *values)
    by_hand = header(1 << 1, 2, 300, 16) + body + struct.pack("<I", zlib.crc32(body))
    assert encode(torch.tensor(values).view(2, 300)) == by_hand
    assert CHUNK_TOKENS == 16

    # int8 and the other float codes.
    body = struct.pack("<e3b", 0.25, -127, 0, 4)
    by_hand = header(3 << 1, 1, 3, 2) + body + struct.pack("<I", zlib.crc32(body))
    assert decode(by_hand).tokens.tolist() == [[-31.75, 0, 1]]
    body = struct.pack("<2f", 1.5, -2.0)
    by_hand = header(0, 1, 2, 16) + body + struct.pack("<I", zlib.crc32(body))
    assert encode(torch.tensor([[1.5, -2.0]]), precision="float32") == by_hand
    body = struct.pack("<2H", 0x3F80, 0xC000)
    by_hand = header(2 << 1, 1, 2, 16) + body + struct.pack("<I", zlib.crc32(body))
    assert encode(torch.tensor([[1.0, -2.0]]), precision="bfloat16") == by_hand


@pytest.mark.parametrize(
    "payload",
    [
        header(0, 2**60, 64, 16),
        header(0, 2**60, 2**60, 2**60),
        header(0, 2**63 - 1, 1, 1),
        header(1, 2**60, 64, 2**60, 2**62),
        header(1, 2**60, 64, 1),
        header(8, 2**23, 1, 1),
        header(0, 1, 2**40, 1),
        header(0, 2**64, 1, 1),
        header(0, 1, 0, 16),
        header(0, 4, 4, 0),
        header(5 << 1, 1, 1, 1),
        header(0xFF, 1, 1, 1),
        header(0, 1, 1, 1, version=2),
        header(0, 1, 1, 1, magic=b"TX"),
        header(0),
        b"",
        b"TM",
        b"TM\x01",
    ],
)
def test_hostile_headers_are_refused(payload: bytes) -> None:
    with pytest.raises(WireError):
        decode(payload)


def test_a_cut_off_payload_may_announce_up_to_max_values() -> None:
    payload = header(2, 1000, 10, 16)
    assert not decode(payload).received.any()
    assert decode(payload, max_values=10_000).tokens.shape == (1000, 10)
    with pytest.raises(WireError, match="9999"):
        decode(payload, max_values=9999)
    # A section that reaches beyond the end is a cut-off payload, not an error.
    assert decode(header(3, 1, 2, 16, 2**62)).received.tolist() == [False]
    # A payload that is all there is decoded whatever its size.
    assert decode(encode(torch.ones(1000, 10)), max_values=0).received.all()


@pytest.mark.parametrize("size_bytes", [b"\x00", b"\x80\x00", b"\x80", b"\xff" * 9 + b"\x01", b"\x01\x01"])
def test_sizes_that_encode_cannot_write_count_as_damage(size_bytes: bytes) -> None:
    body = size_bytes + struct.pack("<f", 1.0)
    payload = header(1, 1, 1, 16, len(size_bytes)) + body + struct.pack("<I", zlib.crc32(body))
    assert decode(payload).received.tolist() == [False]


@pytest.mark.parametrize(
    ("code", "body"),
    [
        (0, struct.pack("<f", float("nan"))),
        (1, struct.pack("<e", float("inf"))),
        (2, struct.pack("<H", 0x7F80)),
        (3, struct.pack("<eb", float("inf"), 0)),
        (4, struct.pack("<eB", float("nan"), 8)),
    ],
)
def test_values_that_are_not_finite_count_as_damage(code: int, body: bytes) -> None:
    got = decode(header(code << 1, 1, 1, 16) + body + struct.pack("<I", zlib.crc32(body)))
    assert got.received.tolist() == [False]
    assert got.tokens.tolist() == [[0]]


@fuzz
@given(st.binary(max_size=300))
def test_random_bytes_are_refused(noise: bytes) -> None:
    for payload in (noise, b"TM\x01" + noise):
        with pytest.raises(WireError):
            decode(payload)


@fuzz
@given(st.lists(st.integers(0, 40), min_size=3, max_size=8), st.integers(0, 11), st.binary(max_size=300))
def test_random_bytes_after_a_fitting_header_never_count_as_received(
    numbers: list[int], flags: int, noise: bytes
) -> None:
    try:
        got = decode(header(flags, *numbers) + noise)
    except WireError:
        return
    assert not got.received.any()
    assert not got.tokens.any()


@fuzz
@given(images(), precisions, st.data())
def test_mutations_never_deliver_a_changed_token(
    image: tuple[Tensor, Tensor | None], precision: str, data: st.DataObject
) -> None:
    tokens, sizes = image
    payload = encode(tokens, sizes, precision, data.draw(st.integers(1, 9)))
    whole = decode(payload).tokens
    start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(payload))] * 2)))
    mutated = payload[:start] + data.draw(st.binary(max_size=8)) + payload[end:]
    with suppress(WireError):
        assert_same_where_received(mutated, whole, sizes)
