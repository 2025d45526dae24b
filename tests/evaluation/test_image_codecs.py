import numpy as np
import pytest
import torch
from PIL import Image
from tokmerge.evaluation.image_codecs import CodecError, compress, decompress, scan_bytes
from torchvision.io import ImageReadMode, decode_image, encode_png

PNG = encode_png(torch.zeros(1, 8, 8, dtype=torch.uint8)).numpy().tobytes()


def photo(mode, side=64):
    """A smooth image with some texture."""
    y, x = np.mgrid[:side, :side] / side
    channels = [np.sin(6 * x + k) + np.cos(5 * y * (k + 1)) + 0.2 * np.sin(40 * x * y) for k in range(3)]
    pixels = np.stack([(c - c.min()) / np.ptp(c) * 255 for c in channels], axis=-1).round().astype(np.uint8)
    return Image.fromarray(pixels if mode == "RGB" else pixels[..., 0])


@pytest.mark.parametrize("format", ["jpeg", "webp"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_more_quality_takes_more_bytes_and_looks_better(format, mode):
    image = photo(mode)
    payloads = [compress(image, format, quality) for quality in (5, 30, 60, 95)]
    assert [len(p) for p in payloads] == sorted({len(p) for p in payloads})
    errors = [np.square(np.subtract(image, decompress(p, mode), dtype=float)).mean() for p in payloads]
    assert errors == sorted(errors, reverse=True)
    assert 10 * np.log10(255**2 / errors[-1]) > 35, "the last one's PSNR"


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_another_decoder_reads_the_same_image(format):
    payload = compress(photo("RGB"), format, 80)
    raw = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    other = decode_image(raw, mode=ImageReadMode.RGB).permute(1, 2, 0).numpy()
    difference = np.abs(other.astype(int) - np.asarray(decompress(payload), int))
    assert difference.max() <= 3  # libraries round differently


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_scan_is_what_follows_the_tables(mode):
    payload = compress(photo(mode), "jpeg", 70)
    # By hand: entropy-coded data holds FF only before a stuffed 00, so the last FF DA starts the scan.
    assert scan_bytes(payload) == len(payload) - payload.rindex(b"\xff\xda")
    assert 0 < scan_bytes(payload) < len(payload)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda image: compress(image, "avif", 50), "'avif': use one of jpeg, webp"),
        (lambda image: compress(image, "jpeg", 101), "quality is 101"),
        (lambda image: scan_bytes(compress(image, "webp", 50)), "without a JPEG scan"),
        (lambda _: scan_bytes(b"\xff\xd8\xff"), "without a JPEG scan"),
        (lambda _: decompress(b""), "not a whole JPEG or WebP image"),
        (lambda _: decompress(PNG), "not a whole JPEG or WebP image"),
    ],
)
def test_bad_requests_and_other_formats_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(photo("L"))


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_damaged_images_are_refused(format):
    payload = compress(photo("RGB"), format, 50)
    for damaged in (payload[: len(payload) // 2], b"\0" * 30 + payload[30:]):
        with pytest.raises(CodecError, match="not a whole JPEG or WebP image"):
            decompress(damaged)
