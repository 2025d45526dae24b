import math

import pytest
import torch
from tokmerge.merging import packed
from tokmerge.merging.packed import Layout

LENGTHS = [3, 7, 1, 5]


def tokens(seed=0, heads=2, d=12):
    generator = torch.Generator().manual_seed(seed)
    total = sum(LENGTHS)
    q, k, v = (torch.randn(total, heads, d, generator=generator) for _ in range(3))
    return q, k, v, torch.randint(1, 50, (total,), generator=generator).float()


def plain_attention(q, k, v, sizes):
    """Image by image, head by head."""
    out, first = torch.empty_like(q), 0
    for n in LENGTHS:
        rows = slice(first, first + n)
        for h in range(q.shape[1]):
            scores = q[rows, h] @ k[rows, h].T / math.sqrt(q.shape[2])
            out[rows, h] = torch.softmax(scores + sizes[rows].log(), dim=1) @ v[rows, h]
        first += n
    return out


@pytest.mark.parametrize("attend", [packed.attend, packed.attend_padded, packed.attend_each])
@pytest.mark.parametrize("sized", [True, False])
def test_attention_stays_inside_each_image_and_weighs_sizes(attend, sized):
    q, k, v, sizes = tokens()
    out = attend(torch.stack([q, k, v], dim=1), Layout(torch.tensor(LENGTHS)), sizes if sized else None)
    expected = plain_attention(q, k, v, sizes if sized else torch.ones_like(sizes))
    torch.testing.assert_close(out, expected.flatten(1))


@pytest.mark.parametrize("d", [7, 8, 12, 64])
def test_appended_coordinate_equals_the_masked_form(d):
    q, k, v, sizes = tokens(d=d)
    q2, k2, v2 = packed.append_size_coordinate(q, k, v, sizes)
    assert q2.shape[-1] % 8 == 0
    out, first = torch.empty_like(q), 0
    for n in LENGTHS:
        rows = slice(first, first + n)
        heads = [part[rows].transpose(0, 1) for part in (q2, k2, v2)]
        attended = torch.nn.functional.scaled_dot_product_attention(*heads, scale=d**-0.5)
        out[rows] = attended.transpose(0, 1)[..., :d]
        first += n
    torch.testing.assert_close(out, plain_attention(q, k, v, sizes), atol=1e-5, rtol=1e-5)


def test_appended_coordinate_is_left_out_without_sizes():
    q, k, v, _ = tokens()
    assert packed.append_size_coordinate(q, k, v, None) == (q, k, v)


@pytest.mark.parametrize("lengths", [LENGTHS, [4, 4, 4]])
def test_pad_puts_every_row_in_its_place_and_marks_padding(lengths):
    layout = Layout(torch.tensor(lengths))
    rows = torch.randn(sum(lengths), 3)
    padded = layout.pad(rows)
    assert padded.shape == (len(lengths), max(lengths), 3)
    first = 0
    for i, n in enumerate(lengths):
        assert torch.equal(padded[i, :n], rows[first : first + n])
        assert layout.valid[i].tolist() == [True] * n + [False] * (max(lengths) - n)
        assert layout.image[first : first + n].tolist() == [i] * n
        assert layout.offsets[i] == first
        first += n


def test_large_images_take_the_fused_kernel_with_the_same_result(monkeypatch):
    q, k, v, sizes = tokens()
    qkv, layout = torch.stack([q, k, v], dim=1), Layout(torch.tensor(LENGTHS))
    small = packed.attend(qkv, layout, sizes)
    monkeypatch.setattr(packed, "PLAIN_PRODUCTS_MAX_TOKENS", 0)
    monkeypatch.setattr(torch, "bmm", None)
    torch.testing.assert_close(packed.attend(qkv, layout, sizes), small)
