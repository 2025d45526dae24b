"""What sending tokens competes with: the image itself as JPEG or WebP, and a lossless coder behind any payload."""

import io
from typing import Any

import zstandard
from PIL import Image, features

# Pillow's name and options of each format. Both spend time rather than bytes.
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "jpeg": ("JPEG", {"optimize": True}),
    "webp": ("WEBP", {"method": 6}),
}
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
# Past this level nothing is gained on payloads of a few kilobytes.
ZSTD_LEVEL = 19


class CodecError(ValueError):
    """Bytes that are not what the codec makes."""


def compress(image: Image.Image, format: str, quality: int) -> bytes:
    """An image as the bytes of a JPEG or WebP file.

    Args:
        image: of mode L (greyscale; a JPEG keeps one channel then, WebP always has three) or RGB.
        format: one of `FORMATS`.
        quality: 1 (fewest bytes) to 100.

    Raises:
        ValueError: unknown format, or a quality outside its range.

    >>> payload = compress(Image.new("L", (28, 28), 128), "webp", 50)
    >>> len(payload) < 100, decompress(payload).size
    (True, (28, 28))
    """
    if format not in FORMATS:
        raise ValueError(f"unknown image format {format!r}: use one of {', '.join(FORMATS)}")
    if not 1 <= quality <= 100:
        raise ValueError(f"quality is {quality}: use 1 to 100")
    name, options = FORMATS[format]
    if format == "webp" and not features.check("webp"):
        raise ValueError("this Pillow cannot write WebP: pip install --force-reinstall pillow")
    buffer = io.BytesIO()
    image.save(buffer, name, quality=quality, **options)
    return buffer.getvalue()


def decompress(payload: bytes, mode: str = "RGB") -> Image.Image:
    """The image that `compress` made bytes of.

    Args:
        payload: a whole JPEG or WebP file.
        mode: Pillow's mode of the result.

    Raises:
        CodecError: the bytes are damaged, cut off, or of another format.
    """
    try:
        with Image.open(io.BytesIO(payload), formats=[name for name, _ in FORMATS.values()]) as image:
            return image.convert(mode)
    # On damaged files decoders raise nearly anything: OSError, SyntaxError, ValueError, DecompressionBombError.
    except Exception as error:
        raise CodecError(f"not a whole JPEG or WebP image of {len(payload)} bytes: {error}") from error


def scan_bytes(payload: bytes) -> int:
    """Bytes of a JPEG without its headers and tables: what has to travel where both ends agree on those beforehand.

    On small images the tables are most of the file. From the start-of-scan marker on (ITU-T T.81, B.2.3), as the
    abbreviated format and the RTP payload (RFC 2435) send it; it is favourable to JPEG, because tables that fit the
    image would not be known beforehand.

    Raises:
        CodecError: there is no scan.
    """
    at = 2
    while payload[:2] == b"\xff\xd8" and at + 4 <= len(payload):
        if payload[at : at + 2] == b"\xff\xda":
            return len(payload) - at
        at += 2 + int.from_bytes(payload[at + 2 : at + 4], "big")
    raise CodecError(f"{len(payload)} bytes without a JPEG scan")


def shrink(payload: bytes) -> bytes:
    """A payload behind a lossless coder (zstandard), or as it is where that would be longer.

    Args:
        payload: of `tokmerge.wire.encode`, or any bytes that do not begin like a zstandard frame.

    >>> len(shrink(bytes(1000))) < 25, shrink(b"TM")
    (True, b'TM')
    """
    if payload.startswith(ZSTD_MAGIC):
        raise ValueError("the payload already is a zstandard frame")
    coded = zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(payload)
    return min(coded, payload, key=len)


def expand(payload: bytes, max_bytes: int = 2**24) -> bytes:
    """What `shrink` was given.

    Args:
        payload: what `shrink` gave.
        max_bytes: longest result that is accepted; a few damaged bytes can announce any length.

    Raises:
        CodecError: damaged, or longer than ``max_bytes``.

    >>> expand(shrink(b"token" * 9)) == b"token" * 9
    True
    """
    if not payload.startswith(ZSTD_MAGIC):
        return payload
    try:
        size = zstandard.get_frame_parameters(payload).content_size
        if size > max_bytes:
            raise CodecError(f"{len(payload)} bytes announce {size}, more than {max_bytes}")
        return zstandard.ZstdDecompressor().decompress(payload)
    except zstandard.ZstdError as error:
        raise CodecError(f"not a whole zstandard frame of {len(payload)} bytes: {error}") from error
