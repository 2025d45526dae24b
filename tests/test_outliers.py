import numpy as np
import pytest
import tiny
import torch
from tokmerge import clip
from tokmerge.outliers import OutlierMerging


def plain(tower, image, spread):
    """One image, token by token: features of the last hidden state but one."""
    layers = tower.encoder.layers[:-1]
    x = tower.pre_layrnorm(tower.embeddings(image[None]))[0]
    for index, layer in enumerate(layers):
        normed, attn = layer.layer_norm1(x), layer.self_attn
        q, k = (part(normed).view(len(x), attn.num_heads, -1) for part in (attn.q_proj, attn.k_proj))
        x = x + attn(normed[None])[0][0]
        if index == len(layers) - 1:
            scores = torch.einsum("hd,nhd->hn", q[0], k) * attn.head_dim**-0.5
            weight = scores.softmax(1).mean(0)
            keys = k.mean(1)
            low, high = np.quantile(weight[1:].numpy(), [0.25, 0.75])
            stay = [i for i in range(1, len(x)) if weight[i] > high + spread * (high - low)]
            stay = stay or [1 + int(weight[1:].argmax())]
            groups = {i: [i] for i in stay}
            for i in range(1, len(x)):
                if i not in groups:
                    near = [torch.cosine_similarity(keys[i], keys[j], dim=0) for j in stay]
                    groups[stay[int(torch.stack(near).argmax())]].append(i)
            merged = [(weight[g, None] * x[g]).sum(0) / weight[g].sum() for g in groups.values()]
            x = torch.stack([x[0], *merged])
        x = x + layer.mlp(layer.layer_norm2(x))
    return x[1:]


@pytest.mark.parametrize("spread", [0.5, 1.5, 1e6])
def test_equals_the_plain_implementation(spread, images):
    tower, images = tiny.tower().double(), images.double()
    tokens, record = clip.patch(tower, OutlierMerging(3, spread))(images)
    if spread == 0.5:
        assert len(set(record.tokens[:, -1].tolist())) > 1, "every image keeps its own number"
    for row, image in zip(tokens.split(), images, strict=True):
        torch.testing.assert_close(row, plain(tower, image, spread), atol=1e-8, rtol=1e-8)


def test_a_batch_equals_its_images_alone(images):
    merged = clip.patch(tiny.tower(), OutlierMerging(3, 0.5))
    together = merged(images)[0].split()
    for row, image in zip(together, images, strict=True):
        torch.testing.assert_close(merged(image[None])[0].x, row, atol=1e-4, rtol=1e-4)


def test_only_the_last_layer_will_do():
    with pytest.raises(ValueError, match="the last of 4 layers is 3"):
        clip.patch(tiny.tower(), OutlierMerging(2))


def test_towers_without_a_class_token_are_refused(images):
    with pytest.raises(ValueError, match="class token"):
        clip.patch(tiny.tower("siglip"), OutlierMerging(3))(images)
