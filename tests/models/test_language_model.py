import math

import pytest
import tiny
import torch
from tokmerge import Threshold, TopR
from tokmerge.models import language_model, llava
from tokmerge.models.language_model import Pruning
from transformers import Qwen2Config


def rotate(x, position, theta=10000.0):
    """One head's (d,) rotated by its position, pair by pair."""
    d = len(x)
    out = x.clone()
    for i in range(d // 2):
        angle = position * theta ** (-2 * i / d)
        low, high = x[i], x[i + d // 2]
        out[i] = low * math.cos(angle) - high * math.sin(angle)
        out[i + d // 2] = high * math.cos(angle) + low * math.sin(angle)
    return out


def plain_layer(layer, rows, positions, weights):
    """One sample's layer, query by query: (N, D) rows, and the last row's mean attention."""
    attn, normed = layer.self_attn, layer.input_layernorm(rows)
    d, heads = attn.head_dim, attn.q_proj.out_features // attn.head_dim
    shared = heads // (attn.k_proj.out_features // d)
    q, k, v = (part(normed).view(len(rows), -1, d) for part in (attn.q_proj, attn.k_proj, attn.v_proj))
    outs, last = [], 0
    for i in range(len(rows)):
        parts = []
        for h in range(heads):
            query = rotate(q[i, h], positions[i])
            scores = [
                (query @ rotate(k[j, h // shared], positions[j])) / math.sqrt(d) + weights[j] for j in range(i + 1)
            ]
            share = torch.stack(scores).softmax(0)
            parts.append(sum(s * v[j, h // shared] for j, s in enumerate(share)))
            if i == len(rows) - 1:
                last = last + share / heads
        outs.append(torch.cat(parts))
    rows = rows + attn.o_proj(torch.stack(outs))
    return rows + layer.mlp(layer.post_attention_layernorm(rows)), last


def plain_read(model, rows, positions, visual, weights, pruning):
    """One sample through the language model, token by token: last hidden states of what is left."""
    for index, layer in enumerate(model.model.language_model.layers):
        rows, last = plain_layer(layer, rows, positions, weights)
        if pruning is not None and index == pruning.layer - 1:
            image = sorted((i for i in range(len(rows)) if visual[i]), key=lambda i: -float(last[i]))
            gone = set(image[max(1, round(pruning.keep * len(image))) :])
            left = [i for i in range(len(rows)) if i not in gone]
            rows, positions = rows[left], [positions[i] for i in left]
            visual, weights = [visual[i] for i in left], [weights[i] for i in left]
    return model.model.language_model.norm(rows)


@pytest.mark.parametrize("weights", llava.WEIGHTS)
@pytest.mark.parametrize("pruning", [None, Pruning(1, 0.3)])
def test_reading_equals_the_plain_implementation(weights, pruning, images):
    model, images = tiny.llava().double(), images.double()
    policy = Threshold(tiny.thresholds(model.model.vision_tower, images))
    merged = llava.patch(model, policy, weights=weights, positions="first", pruning=pruning)
    ids, mask = tiny.padded(tiny.PROMPTS)
    sent = merged.encode_images(images)
    logits, record = merged(ids, sent, mask)
    embed, start = model.get_input_embeddings(), 0
    for row in (0, 3):
        prompt, n = tiny.PROMPTS[row], int(sent.tokens.lengths[row])
        start = int(sent.tokens.layout.offsets[row])
        x, sizes = sent.tokens.x[start : start + n], sent.tokens.sizes[start : start + n].tolist()
        first = sent.first[start : start + n].tolist()
        at = prompt.index(tiny.IMAGE_TOKEN)
        behind = prompt[at + 1 :]
        rows = torch.cat([embed(torch.tensor(prompt[:at]).long()), x, embed(torch.tensor(behind))])
        positions = [*range(at), *(at + p for p in first), *range(at + 64, at + 64 + len(behind))]
        visual = [at <= i < at + n for i in range(len(rows))]
        log = [math.log(sizes[i - at]) if visual[i] and weights == "size" else 0.0 for i in range(len(rows))]
        expected = model.lm_head(plain_read(model, rows, positions, visual, log, pruning))
        assert record.left[row] == len(expected)
        torch.testing.assert_close(logits[row, -len(expected) :], expected, atol=2e-5, rtol=0)


def test_a_token_of_size_s_counts_as_s_equal_tokens(images):
    """Without positions that tell them apart, weighing is repeating."""
    model = tiny.llava()
    x = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(1))
    same = torch.zeros(1, 7, dtype=torch.int64)
    there, visual = torch.ones(1, 7, dtype=torch.bool), torch.zeros(1, 7, dtype=torch.bool)
    weight = torch.tensor([[0.0, math.log(4), 0.0, 0.0]])
    # The repeated ones must not see fewer of their kind than the weighed one: they come first.
    weighed = language_model.Prompts(
        x[:, [1, 0, 2, 3]], there[:, :4], same[:, :4], visual[:, :4], weight[:, [1, 0, 2, 3]]
    )
    repeated = language_model.Prompts(x[:, [1, 1, 1, 1, 0, 2, 3]], there, same, visual, torch.zeros(1, 7))
    got, expected = language_model.read(model, weighed), language_model.read(model, repeated)
    torch.testing.assert_close(got.x[:, -3:], expected.x[:, -3:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("text", [None, Qwen2Config])
def test_pruned_answers_are_those_of_each_sample_alone_and_of_repeated_reading(text, images):
    model = tiny.llava(text=text and text(**tiny.TEXT))
    merged = llava.patch(model, TopR(4), pruning=Pruning(1, 0.2), weights="size", positions="first")
    ids, mask = tiny.padded(tiny.PROMPTS)
    new, record = merged.generate(ids, images, mask, max_new_tokens=4)
    n = 64 - 4 * 4
    assert record.left.tolist() == [len(prompt) - 1 + round(0.2 * n) for prompt in tiny.PROMPTS]
    for i, prompt in enumerate(tiny.PROMPTS):
        alone, own = merged.generate(torch.tensor([prompt]), images[i : i + 1], max_new_tokens=4)
        assert alone[0].tolist() == new[i, : alone.shape[1]].tolist()
        torch.testing.assert_close(own.scores[0], record.scores[i], atol=1e-4, rtol=0)
        assert (own.macs, own.prefill_macs, own.decode_macs) == (
            record.macs[i], record.prefill_macs[i], record.decode_macs[i],
        )  # fmt: skip


def test_the_cache_after_pruning_gives_what_reading_everything_again_gives(images):
    """The kept tokens and the first answer token in one go, as if the pruning were known beforehand."""
    model = tiny.llava().double()
    merged = llava.patch(model, None, pruning=Pruning(1, 0.25))
    one = torch.tensor([tiny.PROMPTS[1]])
    new, _ = merged.generate(one, images[1:2].double(), max_new_tokens=2)
    prompts, _ = merged._prompts(one, images[1:2].double(), None)
    layers, norm = model.model.language_model.layers, model.model.language_model.norm
    x, positions, visual = prompts.x[0], prompts.positions[0].tolist(), prompts.visual[0].tolist()
    first, last = plain_layer(layers[0], x, positions, [0.0] * len(x))
    image = sorted((i for i in range(len(x)) if visual[i]), key=lambda i: -float(last[i]))[:16]
    left = [i for i in range(len(x)) if i in image or not visual[i]]
    answer = model.get_input_embeddings()(new[:, 0])
    longer, _ = plain_layer(layers[0], torch.cat([x, answer]), [*positions, len(x)], [0.0] * (len(x) + 1))
    kept = torch.cat([first[left], longer[-1:]])
    out, _ = plain_layer(layers[1], kept, [*(positions[i] for i in left), len(x)], [0.0] * len(kept))
    assert model.lm_head(norm(out[-1:])).argmax() == new[0, 1]


def test_pruning_saves_what_it_says(images):
    model = tiny.llava()
    ids, mask = tiny.padded(tiny.PROMPTS)
    full = llava.patch(model, None).generate(ids, images, mask, max_new_tokens=3)[1]
    cut = llava.patch(model, None, pruning=Pruning(1, 0.5)).generate(ids, images, mask, max_new_tokens=3)[1]
    cost = llava.patch(model, None).cost
    for i, prompt in enumerate(tiny.PROMPTS):
        n, left = len(prompt) - 1 + 64, len(prompt) - 1 + 32
        saved = (n - left) * cost.linear + 2 * (n * n - left * left) * cost.attn_dim
        assert full.prefill_macs[i] - cut.prefill_macs[i] == saved
    assert torch.equal(full.payload_bytes, cut.payload_bytes), "what is pruned at the server has been sent"
    assert torch.equal(full.visual, cut.visual)


def test_bad_pruning_is_named(images):
    with pytest.raises(ValueError, match="keep is a share"):
        Pruning(1, 0.0)
    with pytest.raises(ValueError, match="layer at least 1"):
        Pruning(0, 0.5)
    with pytest.raises(ValueError, match="has 2 layers"):
        llava.patch(tiny.llava(), None, pruning=Pruning(2, 0.5))
    model = tiny.llava()
    model.config.text_config.sliding_window = 30
    with pytest.raises(ValueError, match="sliding window of 30"):
        llava.patch(model, None)(torch.tensor([tiny.PROMPTS[0]]), images[:1])
