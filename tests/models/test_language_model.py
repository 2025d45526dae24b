"""Whole answers of a LLaVA, from the image on, against the same done token by token."""

import math

import pytest
import reference
import tiny
import torch
from tiny import IDS, MASK
from tokmerge import Threshold, TopR
from tokmerge.models import language_model, llava
from tokmerge.models.language_model import Pruning


def rotate(x, position, theta=10000.0):
    """One head's (d,) rotated by its position, pair by pair."""
    low, high = x.chunk(2)
    angles = [position * theta ** (-2 * i / len(x)) for i in range(len(low))]
    cos, sin = (x.new_tensor([function(angle) for angle in angles]) for function in (math.cos, math.sin))
    return torch.cat([low * cos - high * sin, high * cos + low * sin])


def plain_layer(layer, rows, positions, weights):
    """One sample's layer, query by query: (N, D) rows, and the last row's mean attention."""
    attn, normed = layer.self_attn, layer.input_layernorm(rows)
    d, heads = attn.head_dim, attn.q_proj.out_features // attn.head_dim
    shared = heads // (attn.k_proj.out_features // d)
    q, k, v = (part(normed).view(len(rows), -1, d) for part in (attn.q_proj, attn.k_proj, attn.v_proj))
    q, k = ([[rotate(one, positions[i]) for one in row] for i, row in enumerate(part)] for part in (q, k))
    outs, last = [], 0
    for i in range(len(rows)):
        parts = []
        for h in range(heads):
            scores = [q[i][h] @ k[j][h // shared] / math.sqrt(d) + weights[j] for j in range(i + 1)]
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


@pytest.mark.parametrize(
    ("positions", "output", "weights", "pruning"),
    [
        ("consecutive", None, "one", None),
        ("consecutive", 7, "one", None),
        ("first", None, "one", None),
        ("first", 7, "size", None),
        ("first", None, "one", Pruning(1, 0.3)),
        ("first", 7, "size", Pruning(1, 0.3)),
    ],
)
def test_merging_and_reading_equal_the_plain_implementation(positions, output, weights, pruning, images):
    # In double precision: random weights amplify single-precision rounding from layer to layer.
    model, images = tiny.llava().double(), images.double()
    tower, embed = model.model.vision_tower, model.get_input_embeddings()
    taus, at_output = tiny.thresholds(tower, images), output and TopR(output)
    options = {"output_policy": at_output, "positions": positions, "weights": weights, "pruning": pruning}
    logits, record = llava.patch(model, Threshold(taus), **options)(IDS, images, MASK)
    assert len(set(record.visual.tolist())) > 1, "samples must keep different token counts"
    for i, prompt in enumerate(tiny.PROMPTS):
        x, _, sizes, groups = reference.run_tower(tower, images[i], reference.threshold_choice(taus), 4, 1)
        x, start = model.model.multi_modal_projector(x), prompt.index(tiny.IMAGE_TOKEN)
        if output:
            x, sizes, groups = reference.merge_once(x, sizes, groups, reference.top_r_choice([output]))
        before, behind = prompt[:start], prompt[start + 1 :]
        rows = torch.cat([embed(torch.tensor(before).long()), x, embed(torch.tensor(behind))])
        visual = [False] * len(before) + [True] * len(x) + [False] * len(behind)
        numbers, log = list(range(len(rows))), [0.0] * len(rows)
        if positions == "first":
            numbers[start:] = [*(start + min(group) for group in groups), *range(start + 64, start + 64 + len(behind))]
        if weights == "size":
            log[start : start + len(x)] = [math.log(size) for size in sizes]
        expected = model.lm_head(plain_read(model, rows, numbers, visual, log, pruning))
        assert (record.prompt[i], record.left[i]) == (len(rows), len(expected))
        torch.testing.assert_close(logits[i, -len(expected) :], expected, atol=2e-5, rtol=0)


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


def test_the_cache_after_pruning_gives_what_reading_everything_again_gives(images):
    """The kept tokens and the first answer token in one go, as if the pruning were known beforehand."""
    model = tiny.llava().double()
    merged = llava.patch(model, None, pruning=Pruning(1, 0.25))
    one = torch.tensor([tiny.PROMPTS[1]])
    new, _ = merged.generate(one, images[1:2].double(), max_new_tokens=2)
    prompts = language_model.Prompts.padded(merged._prompts(one, images[1:2].double(), None)[0])
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
    full = llava.patch(model, None).generate(IDS, images, MASK, max_new_tokens=3)[1]
    cut = llava.patch(model, None, pruning=Pruning(1, 0.5)).generate(IDS, images, MASK, max_new_tokens=3)[1]
    cost = llava.patch(model, None).cost
    n = torch.tensor([len(prompt) - 1 + 64 for prompt in tiny.PROMPTS])
    saved = 32 * cost.linear + 2 * (n * n - (n - 32) ** 2) * cost.attn_dim
    assert torch.equal(full.prefill_macs - cut.prefill_macs, saved)
    assert torch.equal(full.payload_bytes, cut.payload_bytes), "what is pruned at the server has been sent"
    assert torch.equal(full.visual, cut.visual)
