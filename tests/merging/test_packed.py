import pytest
import reference
import torch
from tokmerge.merging import packed
from tokmerge.merging.packed import Layout

LENGTHS = [3, 7, 1, 5]


def tokens(d=12):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(sum(LENGTHS), 2, d, generator=generator) for _ in range(3))
    return q, k, v, torch.randint(1, 50, (sum(LENGTHS),), generator=generator).float()


def plain_attention(q, k, v, sizes):
    images = zip(*(part.split(LENGTHS) for part in (q, k, v, sizes)), strict=True)
    return torch.cat([reference.attend(*parts, own.tolist())[0] for *parts, own in images])


@pytest.mark.parametrize("attend", [packed.attend, packed.attend_padded, packed.attend_each])
@pytest.mark.parametrize("sized", [True, False])
def test_attention_stays_inside_each_image_and_weighs_sizes(attend, sized):
    q, k, v, sizes = tokens()
    out = attend(torch.stack([q, k, v], dim=1), Layout(torch.tensor(LENGTHS)), sizes if sized else None)
    torch.testing.assert_close(out, plain_attention(q, k, v, sizes if sized else torch.ones_like(sizes)))


@pytest.mark.parametrize("d", [7, 8, 12, 64])
def test_appended_coordinate_equals_the_masked_form_and_is_left_out_without_sizes(d):
    q, k, v, sizes = tokens(d)
    longer = packed.append_size_coordinate(q, k, v, sizes)
    assert longer[0].shape[-1] % 8 == 0
    images = zip(*(part.transpose(0, 1).split(LENGTHS, 1) for part in longer), strict=True)
    out = [torch.nn.functional.scaled_dot_product_attention(*heads, scale=d**-0.5) for heads in images]
    out = torch.cat(out, 1).transpose(0, 1)[..., :d].flatten(1)
    torch.testing.assert_close(out, plain_attention(q, k, v, sizes), atol=1e-5, rtol=1e-5)
    assert packed.append_size_coordinate(q, k, v, None) == (q, k, v)


@pytest.mark.parametrize("lengths", [LENGTHS, [4, 4, 4]])
def test_pad_puts_every_row_in_its_place_and_marks_padding(lengths):
    layout, rows = Layout(torch.tensor(lengths)), torch.randn(sum(lengths), 3)
    padded = layout.pad(rows)
    assert padded.shape == (len(lengths), max(lengths), 3)
    for i, (n, own, image) in enumerate(zip(lengths, rows.split(lengths), layout.image.split(lengths), strict=True)):
        assert torch.equal(padded[i, :n], own)
        assert layout.valid[i].tolist() == [True] * n + [False] * (max(lengths) - n)
        assert image.tolist() == [i] * n
        assert layout.offsets[i] == sum(lengths[:i])


def test_on_a_cpu_an_image_gets_the_same_bits_in_every_batch():
    q, k, v, sizes = tokens()
    qkv, layout = torch.stack([q, k, v], dim=1), Layout(torch.tensor(LENGTHS))
    alone = [
        packed.attend(part, Layout(torch.tensor([len(part)])), own)
        for part, own in zip(qkv.split(LENGTHS), sizes.split(LENGTHS), strict=True)
    ]
    assert torch.equal(packed.attend(qkv, layout, sizes), torch.cat(alone))
