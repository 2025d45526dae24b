"""Image codecs: against other decoders, bounds of loss, and damage."""

import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tokmerge.evaluation.image_codecs import CodecError, compress, decompress, scan_bytes
from torchvision.io import ImageReadMode, decode_image


def photo(mode: str, side: int = 64) -> Image.Image:
    """A smooth image with some texture."""
    y, x = np.mgrid[:side, :side] / side
    channels = [np.sin(6 * x + k) + np.cos(5 * y * (k + 1)) + 0.2 * np.sin(40 * x * y) for k in range(3)]
    pixels = np.stack([(c - c.min()) / np.ptp(c) * 255 for c in channels], axis=-1).round().astype(np.uint8)
    return Image.fromarray(pixels if mode == "RGB" else pixels[..., 0])


def psnr(a: Image.Image, b: Image.Image) -> float:
    error = np.asarray(a, float) - np.asarray(b, float)
    return 10 * np.log10(255**2 / np.mean(error**2))


@pytest.mark.parametrize("format", ["jpeg", "webp"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_more_quality_takes_more_bytes_and_looks_better(format: str, mode: str) -> None:
    image = photo(mode)
    payloads = [compress(image, format, quality) for quality in (5, 30, 60, 95)]
    assert [len(p) for p in payloads] == sorted({len(p) for p in payloads})
    likeness = [psnr(image, decompress(p, mode)) for p in payloads]
    assert likeness == sorted(likeness)
    assert likeness[-1] > 35


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_another_decoder_reads_the_same_image(format: str) -> None:
    payload = compress(photo("RGB"), format, 80)
    raw = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    other = decode_image(raw, mode=ImageReadMode.RGB).permute(1, 2, 0).numpy()
    difference = np.abs(other.astype(int) - np.asarray(decompress(payload), int))
    assert difference.max() <= 3  # libraries round differently


def test_same_image_same_bytes_in_another_process() -> None:
    code = (
        "from PIL import Image; from tokmerge.evaluation.image_codecs import compress; "
        "print(compress(Image.linear_gradient('L'), 'jpeg', 40).hex())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == compress(Image.linear_gradient("L"), "jpeg", 40).hex()


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_scan_is_what_follows_the_tables(mode: str) -> None:
    payload = compress(photo(mode), "jpeg", 70)
    # By hand: entropy-coded data holds FF only before a stuffed 00, so the last FF DA starts the scan.
    assert scan_bytes(payload) == len(payload) - payload.rindex(b"\xff\xda")
    assert 0 < scan_bytes(payload) < len(payload)


def test_scan_needs_a_jpeg() -> None:
    for payload in (compress(photo("L"), "webp", 50), b"", b"\xff\xd8\xff"):
        with pytest.raises(CodecError, match="without a JPEG scan"):
            scan_bytes(payload)


def test_bad_requests_are_named() -> None:
    with pytest.raises(ValueError, match="'avif': use one of jpeg, webp"):
        compress(photo("L"), "avif", 50)
    for quality in (0, 101):
        with pytest.raises(ValueError, match=f"quality is {quality}"):
            compress(photo("L"), "jpeg", quality)


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_damaged_images_are_refused(format: str) -> None:
    payload = compress(photo("RGB"), format, 50)
    for damaged in (b"", payload[: len(payload) // 2], b"\0" * 30 + payload[30:]):
        with pytest.raises(CodecError, match="not a whole JPEG or WebP image"):
            decompress(damaged)


def test_other_formats_are_refused() -> None:
    buffer = io.BytesIO()
    photo("L").save(buffer, "PNG")
    with pytest.raises(CodecError):
        decompress(buffer.getvalue())
