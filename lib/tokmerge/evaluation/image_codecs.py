"""What sending tokens competes with: the image itself as JPEG or WebP."""

import io
from typing import Any

from PIL import Image, features

# Pillow's options of each format, which spend time rather than bytes.
FORMATS: dict[str, dict[str, Any]] = {"jpeg": {"optimize": True}, "webp": {"method": 6}}


class CodecError(ValueError):
    """Bytes that are not what the codec makes."""


def compress(image: Image.Image, format: str, quality: int) -> bytes:
    """An image of mode L or RGB as the bytes of a file of a format in `FORMATS`, at quality 1 (fewest bytes) to 100.

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
    if format == "webp" and not features.check("webp"):
        raise ValueError("this Pillow cannot write WebP: pip install --force-reinstall pillow")
    buffer = io.BytesIO()
    image.save(buffer, format, quality=quality, **FORMATS[format])
    return buffer.getvalue()


def decompress(payload: bytes, mode: str = "RGB") -> Image.Image:
    """The image, in Pillow's ``mode``, that `compress` made bytes of.

    Raises:
        CodecError: the bytes are damaged, cut off, or of another format.
    """
    try:
        with Image.open(io.BytesIO(payload), formats=list(FORMATS)) as image:
            return image.convert(mode)
    # On damaged files decoders raise nearly anything: OSError, SyntaxError, ValueError, DecompressionBombError.
    except Exception as error:
        raise CodecError(f"not a whole JPEG or WebP image of {len(payload)} bytes: {error}") from error


def scan_bytes(payload: bytes) -> int:
    """Bytes of a JPEG without its headers and tables: what has to travel where both ends agree on those beforehand.

    From the start-of-scan marker on (ITU-T T.81, B.2.3), as the abbreviated format and the RTP payload (RFC 2435) send
    it. That is favourable to JPEG: tables that fit the image, most of a small file, would not be known beforehand.

    Raises:
        CodecError: there is no scan.
    """
    at = 2
    while payload[:2] == b"\xff\xd8" and at + 4 <= len(payload):
        if payload[at : at + 2] == b"\xff\xda":
            return len(payload) - at
        at += 2 + int.from_bytes(payload[at + 2 : at + 4], "big")
    raise CodecError(f"{len(payload)} bytes without a JPEG scan")
