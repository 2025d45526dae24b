import io

import numpy as np
import pytest
import tokmerge
import torch
from conftest import build
from PIL import Image
from tokmerge import explorer, plots, spaces

SPACE = spaces.threshold_space("cosine", depth=4, knots=2)


@pytest.fixture
def pixels(images):
    return [((image + 3) / 6).clamp(0, 1).permute(1, 2, 0).numpy() for image in images]


def decode(png):
    return np.asarray(Image.open(io.BytesIO(png)))


def test_a_move_shows_what_the_engine_does(images, pixels):
    model = build()
    box = explorer.build(model, images, pixels, SPACE, [1.0, 1.0])
    first, second, line, picture = box.children
    before = picture.value
    assert line.value == "65, 65, 65, 65, 65 of 65 tokens left: 100% of the MACs, 100% of the bytes"
    first.value, second.value = 0.9, 0.6
    _, record = tokmerge.patch(model, tokmerge.Threshold([0.9, 0.8, 0.7, 0.6]))(images)
    _, whole = tokmerge.patch(model, None)(images)
    left = ", ".join(str(n) for n in record.tokens[:, -1].tolist())
    macs, sent = (record.macs / whole.macs).mean(), (record.payload_bytes / whole.payload_bytes).mean()
    assert line.value == f"{left} of 65 tokens left: {macs:.0%} of the MACs, {sent:.0%} of the bytes"
    assert macs < 0.95
    assert picture.value != before
    assert decode(picture.value).shape == (8 * 14, 5 * 8 * 14 + 4 * 14, 3)


def test_strip_holds_each_image_s_own_map(images, pixels):
    model, policy = build(), tokmerge.Threshold(0.6)
    with torch.inference_mode():
        _, whole = tokmerge.patch(model, None)(images)
        png, _ = explorer.show(model, images, pixels, spaces.Configuration(policy), whole, cell=4)
        _, record = tokmerge.patch(model, policy)(images[3:4], source=True)
    alone = plots.paint_merge_map(pixels[3], plots.merge_map(record.source[0].numpy(), 1), cell=4)
    assert np.array_equal(decode(png)[:, 3 * 36 : 3 * 36 + 32], alone)


def test_sliders_name_the_blocks_and_keep_the_bounds(images, pixels):
    box = explorer.build(build(), images, pixels, SPACE, [0.9, 0.8])
    sliders = box.children[:2]
    assert [slider.description for slider in sliders] == ["block 1", "block 4"]
    assert [(slider.min, slider.max, slider.value) for slider in sliders] == [(0.5, 1.0, 0.9), (0.5, 1.0, 0.8)]


def test_one_start_value_per_parameter(images, pixels):
    with pytest.raises(ValueError, match="3 start values for 2 parameters"):
        explorer.build(build(), images, pixels, SPACE, [0.9] * 3)
