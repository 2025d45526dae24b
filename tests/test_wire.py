import math
import os
import struct
import zlib
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokmerge.wire import PRECISIONS, WireError, decode, encode, encode_images, payload_bytes, quantise

fast = settings(max_examples=60, deadline=None, derandomize=True, database=None)
# `make fuzz` asks for many more, and for others each time.
fuzz = settings(fast, max_examples=int(os.environ.get("FUZZ", "40")), derandomize="FUZZ" not in os.environ)
precisions = st.sampled_from(PRECISIONS)
floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
# The lengths of a varint change at powers of 128.
steps = [(1, 130), (16382, 16386), (2**21 - 2, 2**21 + 2), (2**62, 2**62)]
sizes_near_steps = st.one_of(st.integers(*ends) for ends in steps)


@st.composite
def images(draw):
    """Tokens (N, D) of every magnitude and sizes (N,) or None."""
    n, dim = draw(st.integers(0, 40)), draw(st.integers(1, 9))
    some = draw(st.lists(floats, min_size=1, max_size=n * dim or 1))
    values = torch.tensor((some * (n * dim))[: n * dim], dtype=torch.float32)
    sizes = draw(st.none() | st.lists(sizes_near_steps, min_size=n, max_size=n))
    return values.view(n, dim), None if sizes is None else torch.tensor(sizes, dtype=torch.int64)


def sample(n, dim, sized):
    generator = torch.Generator().manual_seed(n * 100 + dim)
    sizes = torch.randint(1, 300, (n,), generator=generator) if sized else None
    return torch.randn(n, dim, generator=generator), sizes


def assert_same_where_received(payload, tokens, sizes):
    """Decode; what counts as received must be the original, the rest zeros. Returns the received mask."""
    got = decode(payload)
    assert got.tokens.shape == tokens.shape
    assert torch.equal(got.tokens, tokens * got.received[:, None])
    assert (got.sizes is None) == (sizes is None)
    if sizes is not None:
        assert torch.equal(got.sizes, sizes * got.received)
    return got.received


def header(flags, *numbers, magic=b"TM", version=1):
    """A header with a fitting CRC32, whatever the numbers."""
    return sealed(magic + bytes([version, flags]) + b"".join(leb128(number) for number in numbers))


def sealed(body, index=0):
    return body + struct.pack("<I", zlib.crc32(body, index))


def leb128(number):
    groups = [number >> shift & 0x7F for shift in range(0, max(number.bit_length(), 1), 7)]
    return bytes([group | 0x80 for group in groups[:-1]] + groups[-1:])


@fast
@given(images(), precisions, st.integers(1, 50))
def test_what_is_quantised_and_sizes_come_back(image, precision, chunk):
    tokens, sizes = image
    assert assert_same_where_received(encode(*image, precision, chunk), quantise(tokens, precision), sizes).all()


@fast
@given(images(), precisions)
def test_floats_are_rounded_and_other_values_are_within_half_a_step(image, precision):
    tokens, levels = image[0], {"int8": 127, "int4": 7}.get(precision)
    if levels is None:
        dtype = getattr(torch, precision)
        largest = torch.finfo(dtype).max
        assert torch.equal(quantise(tokens, precision), tokens.clamp(-largest, largest).to(dtype).float())
        return
    tokens = tokens.clamp(-65504 * levels, 65504 * levels)
    # float16 holds the step to 11 bits, and to 2^-24 among its subnormals.
    step = tokens.double().abs().amax(1, keepdim=True) / levels * (1 + 2**-10) + 2**-24
    assert ((quantise(tokens, precision) - tokens.double()).abs() <= step * 0.5001).all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_extreme_tokens(precision):
    top = torch.finfo(torch.float32).max
    got = decode(encode(torch.tensor([[0.0, 0, 0], [top, -top, top], [1e-40, 0, 0]]), None, precision)).tokens
    assert got.isfinite().all()
    assert got[0].tolist() == [0, 0, 0]
    assert got[1, 0] == -got[1, 1] == got[1, 2] > 6e4
    assert got[2].abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_float_inputs_and_memory_layouts(dtype):
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
        ((torch.zeros(2, 2), torch.tensor([1, 1.5])), "size of token 1"),
        ((torch.zeros(2, 2), torch.tensor([1, torch.nan])), "size of token 1"),
        ((torch.tensor([[0, 0], [0, torch.nan], [torch.inf, 0]]),), "token 1"),
        ((torch.tensor([[0, 1e300]], dtype=torch.float64),), "token 0"),
        ((torch.zeros(2, 2), None, "float8"), "float8"),
        ((torch.zeros(2, 2), None, "int8", 0), "chunk_tokens"),
    ],
)
def test_encode_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        encode(*arguments)


@fast
@given(st.lists(st.integers(0, 150), min_size=1, max_size=5), st.integers(1, 300), precisions, st.booleans(),
       st.integers(1, 100), st.randoms(use_true_random=False))  # fmt: skip
def test_payload_bytes_is_exact(lengths, dim, precision, sized, chunk, random):
    pool = (1, 5, 127, 128, 16383, 16384, 2**21 - 1, 2**21, 2**62)
    sizes = torch.tensor([random.choice(pool) for _ in range(sum(lengths))], dtype=torch.int64) if sized else None
    payloads = encode_images(torch.zeros(sum(lengths), dim), lengths, sizes, precision, chunk)
    got = payload_bytes(torch.tensor(lengths), dim, precision, sizes, chunk)
    assert got.dtype == torch.int64
    assert got.tolist() == [len(payload) for payload in payloads]


def test_payload_bytes_defaults_and_refusals():
    tokens, sizes = sample(200, 64, True)
    # Engines hold sizes as floats.
    assert payload_bytes(torch.tensor([200]), 64, sizes=sizes.float()).item() == len(encode(tokens, sizes))
    assert payload_bytes(torch.tensor([], dtype=torch.int64), 64, sizes=torch.tensor([])).tolist() == []
    with pytest.raises(ValueError, match="3 sizes for 2 tokens"):
        payload_bytes(torch.tensor([1, 1]), 64, sizes=torch.ones(3))
    with pytest.raises(ValueError, match="float8"):
        payload_bytes(torch.tensor([1]), 64, "float8")


@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_flipped_bit_costs_one_chunk_and_every_cut_leaves_the_whole_chunks(precision, sized):
    tokens, sizes = sample(7, 3, sized)
    payload = encode(tokens, sizes, precision, chunk_tokens=3)
    whole, header_end = decode(payload).tokens, 4 + 3 + 3 * sized + 4

    def lost(damaged):
        return (~assert_same_where_received(damaged, whole, sizes)).nonzero().flatten().tolist()

    number, bits = int.from_bytes(payload, "little"), range(8 * len(payload))
    flipped = [(number ^ 1 << bit).to_bytes(len(payload), "little") for bit in bits]
    cut_off = [payload[:length] for length in range(len(payload))]
    for damaged in flipped[: 8 * header_end] + cut_off[:header_end]:
        with pytest.raises(WireError):
            decode(damaged)
    chunks = [[0, 1, 2], [3, 4, 5], [6]]
    assert all(lost(damaged) in chunks for damaged in flipped[8 * header_end :])
    left = [lost(damaged) for damaged in cut_off[header_end:]]
    assert left == sorted(left, reverse=True, key=len)
    assert {*map(tuple, left)} == {tuple(range(first, 7)) for first in (0, 3, 6)}
    for extra in (b"\0", payload):
        with pytest.raises(WireError, match="beyond the end"):
            decode(payload + extra)


def test_chunks_that_changed_places_are_noticed():
    tokens, _ = sample(4, 8, False)
    payload = encode(tokens, None, "float32", chunk_tokens=1)
    start, step = 11, 8 * 4 + 4
    head, (a, b, c, d) = payload[:start], (payload[i : i + step] for i in range(start, len(payload), step))
    swapped = assert_same_where_received(head + a + c + b + d, tokens, None)
    assert swapped.tolist() == [True, False, False, True]
    repeated = assert_same_where_received(head + a + a + c + d, tokens, None)
    assert repeated.tolist() == [True, False, True, True]


def test_layout_assembled_by_hand():
    # Two tokens in chunks of one, int4, D = 3, with sizes 5 and 300: flags 1 | 4 << 1.
    first = bytes([5]) + struct.pack("<e", 0.5) + bytes([(8 + 7) | (8 - 7) << 4, 8 + 2])
    second = bytes([0b10101100, 0b10]) + struct.pack("<e", 2.0) + bytes([8 | (8 - 1) << 4, 8 + 3])
    got = decode(header(0b1001, 2, 3, 1, 1, 2) + sealed(first) + sealed(second, 1))
    assert got.tokens.tolist() == [[3.5, -3.5, 1.0], [0.0, -2.0, 6.0]]
    assert got.sizes.tolist() == [5, 300]
    assert got.received.tolist() == [True, True]
    # int8.
    got = decode(header(3 << 1, 1, 3, 2) + sealed(struct.pack("<e3b", 0.25, -127, 0, 4)))
    assert got.tokens.tolist() == [[-31.75, 0, 1]]


@pytest.mark.parametrize(
    ("precision", "code", "values", "body"),
    [
        ("float32", 0, [1.5, -2.0], struct.pack("<2f", 1.5, -2.0)),
        ("float16", 1, [i % 50 for i in range(300)], struct.pack("<300e", *(i % 50 for i in range(300)))),
        ("bfloat16", 2, [1.0, -2.0], struct.pack("<2H", 0x3F80, 0xC000)),
    ],
)
def test_floats_are_encoded_as_by_hand(precision, code, values, body):
    by_hand = header(code << 1, 2, len(values), 16) + sealed(2 * body)
    assert encode(torch.tensor([values, values]), None, precision) == by_hand


@pytest.mark.parametrize(
    "payload",
    [
        header(0, 2**60, 64, 16),
        header(0, 2**60, 2**60, 2**60),
        header(1, 2**60, 64, 2**60, 2**62),
        header(1, 2**60, 64, 1),
        header(8, 2**23, 1, 1),
        header(0, 1, 2**40, 1),
        header(0, 2**64, 1, 1),
        header(0, 1, 0, 16),
        header(0, 4, 4, 0),
        header(5 << 1, 1, 1, 1),
        header(0, 1, 1, 1, version=2),
        header(0, 1, 1, 1, magic=b"TX"),
        header(0),
        # Of source maps: of the most tokens there can be, with too few bytes, with a value that only a flag allows.
        header(0xC0, 2**63 - 1, 1, 1, 1),
        *(sealed(header(flags, 3, 1, 16, 200)[:-4] + b"\0") for flags in (0x40, 0xC0)),
        sealed(header(0x40, 3, 1, 16, 2)[:-4] + bytes([0b1111])),
    ],
)
def test_hostile_headers_are_refused(payload):
    with pytest.raises(WireError):
        decode(payload)


def test_a_cut_off_payload_may_announce_up_to_max_values():
    payload = header(2, 1000, 10, 16)
    assert not decode(payload).received.any()
    assert decode(payload, max_values=10_000).tokens.shape == (1000, 10)
    with pytest.raises(WireError, match="9999"):
        decode(payload, max_values=9999)
    # A section that reaches beyond the end is a cut-off payload, not an error.
    assert decode(header(3, 1, 2, 16, 2**62)).received.tolist() == [False]
    # A payload that is all there is decoded whatever its size.
    assert decode(encode(torch.ones(1000, 10)), max_values=0).received.all()


ONE = struct.pack("<f", 1.0)


@pytest.mark.parametrize(
    ("flags", "section", "body"),
    [
        # Sizes that encode cannot write: 0, a number of two bytes that needs one, one cut off, one too large, two.
        *((1, size, ONE) for size in (b"\x00", b"\x80\x00", b"\x80", b"\xff" * 9 + b"\x01", b"\x01\x01")),
        # Values that are not finite, in every precision.
        (0 << 1, b"", struct.pack("<f", float("nan"))),
        (1 << 1, b"", struct.pack("<e", float("inf"))),
        (2 << 1, b"", struct.pack("<H", 0x7F80)),
        (3 << 1, b"", struct.pack("<eb", float("inf"), 0)),
        (4 << 1, b"", struct.pack("<eB", float("nan"), 8)),
    ],
)
def test_what_encode_cannot_write_counts_as_damage(flags, section, body):
    got = decode(header(flags, 1, 1, 16, *([len(section)] if section else [])) + sealed(section + body))
    assert got.received.tolist() == [False]
    assert got.tokens.tolist() == [[0]]


@fuzz
@given(st.binary(max_size=300))
def test_random_bytes_are_refused(noise):
    for payload in (noise, b"TM\x01" + noise):
        with pytest.raises(WireError):
            decode(payload)


@fuzz
@given(st.lists(st.integers(0, 40), min_size=3, max_size=8), st.integers(0, 11), st.binary(max_size=300))
def test_random_bytes_after_a_fitting_header_never_count(numbers, flags, noise):
    with suppress(WireError):
        got = decode(header(flags, *numbers) + noise)
        assert not got.received.any()
        assert not got.tokens.any()


@fuzz
@given(images(), precisions, st.data())
def test_mutations_never_deliver_a_changed_token(image, precision, data):
    payload = encode(*image, precision, data.draw(st.integers(1, 9)))
    whole = decode(payload).tokens
    start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(payload))] * 2)))
    mutated = payload[:start] + data.draw(st.binary(max_size=8)) + payload[end:]
    with suppress(WireError):
        assert_same_where_received(mutated, whole, image[1])


MAPS = st.integers(1, 40).flatmap(
    lambda n: st.tuples(st.just(n), st.lists(st.integers(-1, n - 1), min_size=1, max_size=70), st.booleans())
)


@fast
@given(MAPS, precisions)
def test_a_source_map_comes_back_and_its_bytes_are_counted(given, precision):
    n, entries, sized = given
    source, tokens = torch.tensor(entries), torch.ones(n, 3)
    sizes = torch.ones(n) if sized else None
    payload = encode(tokens, sizes, precision, 4, source)
    assert torch.equal(decode(payload).source, source)
    assert decode(payload).received.all()
    counted = payload_bytes(torch.tensor([n]), 3, precision, sizes, 4, source[None])
    assert counted.tolist() == [len(payload)]
    bits = max(1, math.ceil(math.log2(n + (-1 in entries))))
    assert len(payload) - len(encode(tokens, sizes, precision, 4)) == 1 + math.ceil(len(entries) * bits / 8)


def test_a_source_map_by_hand():
    # Three tokens take two bits a patch: 2, 0, 1, 2 are 10, 00, 01, 10, the first in the lowest bits.
    payload = encode(torch.zeros(3, 1), source=torch.tensor([2, 0, 1, 2]))
    assert payload.startswith(header(0x40 | 1 << 1, 3, 1, 16)[:-4] + bytes([4, 0b10010010]))
    # With a patch of no token there are four values, and 3 stands for it.
    payload = encode(torch.zeros(3, 1), source=torch.tensor([-1, 0]))
    assert payload.startswith(header(0xC0 | 1 << 1, 3, 1, 16)[:-4] + bytes([2, 0b0011]))


def test_source_maps_follow_the_order_of_travel():
    tokens, source = torch.arange(5.0)[:, None], torch.tensor([[0, 2, 1, 2], [1, 0, -1, 1]])
    order = torch.tensor([2, 0, 1, 4, 3])
    found = [decode(one) for one in encode_images(tokens, [3, 2], order=order, source=source)]
    for first, got, own in zip((0, 3), found, source, strict=True):
        named = torch.where(got.source < 0, -1.0, got.tokens[got.source.clamp(min=0), 0])
        assert named.tolist() == torch.where(own < 0, -1, own + first).float().tolist()


@pytest.mark.parametrize("source", [torch.tensor([3]), torch.tensor([-2]), torch.tensor([[0]])])
def test_a_source_map_names_tokens_that_are_there(source):
    with pytest.raises(ValueError, match="names tokens that are none of 3"):
        encode(torch.zeros(3, 1), source=source)
