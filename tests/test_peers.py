"""Every peer against its definition, image by image and token by token, in plain loops."""

import math

import numpy as np
import pytest
import reference
import tokmerge
import torch
from conftest import build
from tokmerge import peers
from tokmerge.merge import Context
from tokmerge.packed import Layout

FIRST = 1  # the class token
MEANS, DEVIATIONS = (0.5, 0.6, 0.4, 0.5), (0.2, 0.3, 0.1, 0.2)


def class_attention(attn, x, sizes):
    qkv = attn.qkv(x).reshape(len(x), 3, attn.num_heads, attn.head_dim)
    heads = []
    for h in range(attn.num_heads):
        scores = [qkv[0, 0, h] @ qkv[j, 1, h] / math.sqrt(attn.head_dim) + math.log(sizes[j]) for j in range(len(x))]
        heads.append(torch.softmax(torch.stack(scores), 0))
    return torch.stack(heads).mean(0).tolist()


def combine(tokens, sizes, groups, pairs, dropped=(), weights=None, keep_norm=False):
    """What becomes of one image's tokens."""
    weights = sizes if weights is None else weights
    members = {i: [i] for i in range(len(tokens))}
    for a, b in pairs:
        members[b].append(a)
    left = [i for i in range(len(tokens)) if i not in dropped and i not in dict(pairs)]
    values = []
    for i in left:
        value = sum(tokens[j] * weights[j] for j in members[i]) / sum(weights[j] for j in members[i])
        if keep_norm and len(members[i]) > 1:
            value = value * max(tokens[j].norm() for j in members[i]) / value.norm()
        values.append(value)
    return (
        torch.stack(values),
        [sum(sizes[j] for j in members[i]) for i in left],
        [set().union(*(groups[j] for j in members[i])) for i in left],
    )


def run(model, image, decide, feature):
    """One image through the model; ``decide(layer, heads, attention, sizes)`` gives `combine`'s further arguments.

    What is matched: the keys of each head, or the tokens as the only head.
    """
    x = reference.embed(model, image)
    sizes, groups, counts = [1.0] * len(x), [{i} for i in range(len(x))], [len(x)]
    for layer, block in enumerate(model.blocks):
        normed = block.norm1(x)
        out, keys = reference.attention(block.attn, normed, sizes)
        attention = class_attention(block.attn, normed, sizes)
        x = x + out
        heads = x[None] if feature == "tokens" else keys
        x, sizes, groups = combine(x, sizes, groups, **decide(layer, heads, attention, sizes))
        x = x + block.mlp(block.norm2(x))
        counts.append(len(x))
    return model.forward_head(model.norm(x)[None])[0], counts, groups


def most_similar(pairs, r):
    return [(a, pairs[a][1]) for a in sorted(pairs, key=lambda a: (-pairs[a][0], a))[:r]]


def tofu(layer, keys, attention, sizes):
    return {"pairs": most_similar(reference.best_matches(keys, FIRST), [7, 0, 5, 30][layer]), "keep_norm": True}


def capped(layer, keys, attention, sizes):
    pairs = reference.best_matches(keys, FIRST)
    above = {a: pair for a, pair in pairs.items() if pair[0] > [0.3, 1.0, 0.5, 0.2][layer]}
    return {"pairs": most_similar(above, [4, 9, 100, 6][layer]) if layer != 1 else []}


def relative(layer, keys, attention, sizes):
    pairs = reference.best_matches(keys, FIRST)
    values = [c for c, _ in pairs.values()]
    level = np.mean(values) + [0.5, -0.3, math.inf, 0.0][layer] * np.std(values)
    return {"pairs": [(a, b) for a, (c, b) in pairs.items() if c > level]}


def adamerge(layer, keys, attention, sizes):
    pairs = reference.best_matches(keys, FIRST)
    mean = sum(c for c, _ in pairs.values()) / len(pairs)
    z = (mean - MEANS[layer]) / DEVIATIONS[layer]
    r = math.floor([12, 8, 6, 4][layer] / (1 + math.exp(-1.5 * z)))
    peak = max(attention[FIRST:])
    salience = [min(max(value / peak, 1e-6), 1.0) for value in attention]
    scores = {a: (c * (1 - salience[a]), b) for a, (c, b) in pairs.items()}
    return {"pairs": most_similar(scores, r), "weights": [w * s for w, s in zip(sizes, salience, strict=True)]}


def pruning(layer, keys, attention, sizes):
    free = sorted(range(FIRST, len(attention)), key=lambda i: attention[i])
    r = min([10, 0, 3, 200][layer], len(free) - 1)
    return {"pairs": [(i, free[r]) for i in free[:r]], "weights": attention}


def static(layer, keys, attention, sizes):
    free = sorted(range(FIRST, len(attention)), key=lambda i: attention[i])
    prune, merge = [5, 0, 8, 100][layer], [6, 4, 0, 3][layer]
    gone = free[: min(prune + merge, len(free) - 1)]
    metric = torch.nn.functional.normalize(keys.mean(0), dim=-1)
    staying = [i for i in free if i not in gone]
    pairs = [(i, max(staying, key=lambda j: float(metric[i] @ metric[j]))) for i in gone[prune:]]
    return {"pairs": pairs, "dropped": set(gone[:prune])}


def draw(layer, stream, n, seed=3):
    return np.random.default_rng((seed, layer, stream)).random(n)


def random_merging(layer, keys, attention, sizes):
    n = len(attention) - FIRST
    set_a, set_b = list(range(FIRST, FIRST + n))[::2], list(range(FIRST, FIRST + n))[1::2]
    score, partner = draw(layer, 0, len(set_a)), draw(layer, 1, len(set_a))
    order = sorted(range(len(set_a)), key=lambda place: -score[place])[: [9, 0, 5, 100][layer]]
    return {"pairs": [(set_a[place], set_b[int(partner[place] * len(set_b))]) for place in order] if set_b else []}


def random_pruning(layer, keys, attention, sizes):
    n = len(attention) - FIRST
    order = sorted(range(n), key=lambda place: -draw(layer, 0, n)[place])[: min([9, 0, 5, 200][layer], n - 1)]
    return {"pairs": [], "dropped": {FIRST + place for place in order}}


CASES = {
    "tofu": (tokmerge.ToFu([7, 0, 5, 30]), tofu),
    "capped": (tokmerge.CappedThreshold([0.3, 1.0, 0.5, 0.2], [4, 9, 100, 6]), capped),
    "relative": (tokmerge.RelativeThreshold([0.5, -0.3, math.inf, 0.0]), relative),
    "adamerge": (tokmerge.AdaMerge([12, 8, 6, 4], MEANS, DEVIATIONS, alpha=1.5), adamerge),
    "pruning": (tokmerge.AttentionPruning([10, 0, 3, 200]), pruning),
    "static": (tokmerge.StaticRates([5, 0, 8, 100], [6, 4, 0, 3]), static),
    "random merging": (tokmerge.RandomMerging([9, 0, 5, 100], seed=3), random_merging),
    "random pruning": (tokmerge.RandomPruning([9, 0, 5, 200], seed=3), random_pruning),
}
case = pytest.mark.parametrize(("policy", "decide"), CASES.values(), ids=CASES)


@case
def test_equals_its_definition(images, policy, decide):
    # In double precision: random weights amplify single-precision rounding from layer to layer.
    model, images = build().double(), images[:3].double()
    logits, record = tokmerge.patch(model, policy)(images, source=True)
    for i, image in enumerate(images):
        expected, counts, groups = run(model, image, decide, policy.feature)
        assert record.tokens[i].tolist() == counts
        assert min(counts) < 65
        torch.testing.assert_close(logits[i], expected, atol=1e-6, rtol=1e-6)
        found = [{j for j, token in enumerate(record.source[i].tolist()) if token == t} for t in range(counts[-1])]
        assert found == groups


@case
def test_a_batch_gives_every_image_what_it_gets_alone(images, policy, decide):
    merged = tokmerge.patch(build().double(), policy)
    logits, record = merged(images.double())
    for i, image in enumerate(images.double()):
        alone, one = merged(image[None])
        torch.testing.assert_close(alone[0], logits[i], atol=1e-5, rtol=0)
        assert torch.equal(one.tokens[0], record.tokens[i])
        assert torch.equal(one.payload_bytes[0], record.payload_bytes[i])
        assert one.macs[0] == record.macs[i]


@case
@pytest.mark.parametrize("lengths", [[1, 2], [2, 9, 1, 5]])
def test_few_and_uneven_tokens(policy, decide, lengths):
    generator = torch.Generator().manual_seed(0)
    n = sum(lengths)
    qkv = torch.randn(n, 3, 2, 4, generator=generator)
    metric = torch.nn.functional.normalize(qkv[:, 1].mean(1), dim=-1)
    layout = Layout(torch.tensor(lengths))
    merges = policy.select(Context(3, 4, 1, metric, None, layout, qkv))
    dropped = [] if merges.dropped is None else merges.dropped.tolist()
    gone = merges.src.tolist() + dropped
    assert len(set(gone)) == len(gone)
    assert not set(gone) & set(merges.dst.tolist())
    assert not set(gone) & set(layout.offsets.tolist()), "the class token stays"
    assert torch.equal(layout.image[merges.src], layout.image[merges.dst])
    expected = torch.bincount(layout.image[torch.tensor(gone, dtype=torch.int64)], minlength=len(lengths))
    assert torch.equal(merges.lost, expected)


def test_dropped_tokens_leave_zeros_on_the_grid(images):
    merged = tokmerge.patch(build(), tokmerge.RandomPruning(10))
    _, record = merged(images, source=True)
    grid = tokmerge.unmerge(merged.features(images), record)
    assert torch.equal((grid == 0).all(-1), record.source < 0)
    assert (record.source < 0).sum(1).tolist() == [40] * len(images)


def test_attention_needs_a_class_token(images):
    for policy in (tokmerge.AttentionPruning(2), tokmerge.StaticRates(2, 0), CASES["adamerge"][0]):
        with pytest.raises(ValueError, match="attention of a class token"):
            tokmerge.patch(build("no_cls_avg"), policy)(images)


def test_where_nothing_happens_nothing_is_active():
    assert [policy.active(1) for policy, _ in CASES.values()] == [False, False, True, True, False, True, False, False]
    assert not tokmerge.RelativeThreshold([math.inf]).active(0)
    assert not tokmerge.CappedThreshold(0.5, [0]).active(0)
    assert tokmerge.StaticRates([0], [1]).active(0)


def test_match_macs():
    n = torch.tensor([7, 8])
    for name in ("tofu", "capped", "relative", "adamerge"):
        assert CASES[name][0].match_macs(n, 10).tolist() == [120, 160]
    for name in ("pruning", "random merging", "random pruning"):
        assert CASES[name][0].match_macs(n, 10).tolist() == [0, 0]
    # Of 7 tokens 2 go and 3 look at the 2 that stay; of 4, 2 go, 1 looks at 1.
    static_rates = tokmerge.StaticRates([2, 2], [3, 3])
    assert static_rates.match_macs(torch.tensor([[7, 4]]), 10).tolist() == [[60, 10]]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: tokmerge.CappedThreshold("0.9", 3), TypeError, "CappedThreshold: thresholds is '0.9', not a number"),
        (lambda: tokmerge.CappedThreshold(0.9, [1, 2.5]), TypeError, r"CappedThreshold: caps\[1\] is 2.5"),
        (lambda: tokmerge.StaticRates(-1, 0), ValueError, "StaticRates: prune is -1, but cannot be negative"),
        (lambda: tokmerge.AdaMerge(3, [0.5], [0.0]), ValueError, "one positive number per block"),
        (lambda: tokmerge.RelativeThreshold(math.nan), TypeError, "RelativeThreshold: z is nan"),
    ],
)
def test_bad_values_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (peers.CappedThreshold([0.9] * 3, 5), "CappedThreshold: 3 thresholds for a model of 4 blocks"),
        (peers.CappedThreshold(0.9, [5] * 5), "CappedThreshold: 5 caps for a model of 4 blocks"),
        (peers.StaticRates(1, [1, 2]), "StaticRates: 2 merge values for a model of 4 blocks"),
        (peers.AdaMerge(3, [0.5], [0.1]), "AdaMerge: 1 means for a model of 4 blocks"),
        (peers.RelativeThreshold([1.0]), "RelativeThreshold: 1 z values"),
    ],
)
def test_wrong_lengths_are_named(model, policy, message):
    with pytest.raises(ValueError, match=message):
        tokmerge.patch(model, policy)
