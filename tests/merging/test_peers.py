"""Every policy of other papers, and of `thresholds`, against its definition, image by image and token by token."""

import math

import numpy as np
import pytest
import reference
import tiny
import tokmerge
import torch
from conftest import build
from tokmerge.merging import peers, thresholds
from tokmerge.merging.matching import Context
from tokmerge.merging.packed import Layout
from tokmerge.merging.peers import OutlierMerging
from tokmerge.models import vision_tower

MEANS, DEVIATIONS = (0.5, 0.6, 0.4, 0.5), (0.2, 0.3, 0.1, 0.2)


def tofu(layer):
    return {"pairs": reference.largest(layer.matches, [7, 0, 5, 30][layer.index]), "keep_norm": True}


def capped(layer):
    above = {a: pair for a, pair in layer.matches.items() if pair[0] > [0.3, 1.0, 0.5, 0.2][layer.index]}
    return {"pairs": reference.largest(above, [4, 9, 100, 6][layer.index]) if layer.index != 1 else []}


def relative(layer):
    values = [c for c, _ in layer.matches.values()]
    level = np.mean(values) + [0.5, -0.3, math.inf, 0.0][layer.index] * np.std(values)
    return {"pairs": [(a, b) for a, (c, b) in layer.matches.items() if c > level]}


def adamerge(layer):
    pairs = layer.matches
    mean = sum(c for c, _ in pairs.values()) / len(pairs)
    z = (mean - MEANS[layer.index]) / DEVIATIONS[layer.index]
    r = math.floor([12, 8, 6, 4][layer.index] / (1 + math.exp(-1.5 * z)))
    peak = max(layer.attention[1:])
    salience = [min(max(value / peak, 1e-6), 1.0) for value in layer.attention]
    scores = {a: (c * (1 - salience[a]), b) for a, (c, b) in pairs.items()}
    weights = [w * s for w, s in zip(layer.sizes, salience, strict=True)]
    return {"pairs": reference.largest(scores, r), "weights": weights}


def least_attended(layer):
    return sorted(range(1, len(layer.attention)), key=lambda i: layer.attention[i])


def pruning(layer):
    free = least_attended(layer)
    r = min([10, 0, 3, 200][layer.index], len(free) - 1)
    return {"pairs": [(i, free[r]) for i in free[:r]], "weights": layer.attention}


def static(layer):
    free = least_attended(layer)
    prune, merge = [5, 0, 8, 100][layer.index], [6, 4, 0, 3][layer.index]
    gone = free[: min(prune + merge, len(free) - 1)]
    staying = [i for i in free if i not in gone]
    pairs = [(i, reference.most_similar(layer.heads.mean(0), i, staying)[1]) for i in gone[prune:]]
    return {"pairs": pairs, "dropped": set(gone[:prune])}


def draw(layer, stream, n):
    return np.random.default_rng((3, layer.index, stream)).random(n)


def random_merging(layer):
    free = range(1, len(layer.sizes))
    set_a, set_b = free[::2], free[1::2]
    score, partner = draw(layer, 0, len(set_a)), draw(layer, 1, len(set_a))
    order = sorted(range(len(set_a)), key=lambda place: -score[place])[: [9, 0, 5, 100][layer.index]]
    return {"pairs": [(set_a[place], set_b[int(partner[place] * len(set_b))]) for place in order] if set_b else []}


def random_pruning(layer):
    score = draw(layer, 0, n := len(layer.sizes) - 1)
    order = sorted(range(n), key=lambda place: -score[place])[: min([9, 0, 5, 200][layer.index], n - 1)]
    return {"pairs": [], "dropped": {1 + place for place in order}}


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
        expected, counts, _, groups = reference.run(model, image, decide, policy.feature)
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


def outliers(spread):
    def decide(layer):
        if layer.index < 3:
            return {"pairs": []}
        weight, free = np.array(layer.attention), range(1, len(layer.sizes))
        low, high = np.quantile(weight[1:], [0.25, 0.75])
        stay = [i for i in free if weight[i] > high + spread * (high - low)] or [1 + int(weight[1:].argmax())]
        keys = layer.heads.mean(0)
        pairs = [(i, reference.most_similar(keys, i, stay)[1]) for i in free if i not in stay]
        return {"pairs": pairs, "weights": layer.attention}

    return decide


@pytest.mark.parametrize("spread", [0.5, 1.5, 1e6])
def test_outliers_of_attention_equal_their_definition(spread, images):
    tower, images = tiny.tower().double(), images.double()
    tokens, record = vision_tower.patch_tower(tower, OutlierMerging(3, spread))(images)
    if spread == 0.5:
        assert len(set(record.tokens[:, -1].tolist())) > 1, "every image keeps its own number"
    for row, image in zip(tokens.split(), images, strict=True):
        expected = reference.run_tower(tower, image, outliers(spread), 4, 1, "keys")[0]
        torch.testing.assert_close(row, expected, atol=1e-8, rtol=1e-8)


def test_outliers_in_a_batch_and_in_half_precision(images):
    merged = vision_tower.patch_tower(tiny.tower(), OutlierMerging(3, 0.5))
    for row, image in zip(merged(images)[0].split(), images, strict=True):
        torch.testing.assert_close(merged(image[None])[0].x, row, atol=1e-4, rtol=1e-4)
    assert merged.to(torch.bfloat16)(images.bfloat16())[0].x.isfinite().all()


def test_outliers_only_in_the_last_layer_of_a_tower_with_a_class_token(images):
    with pytest.raises(ValueError, match="the last of 4 layers is 3"):
        vision_tower.patch_tower(tiny.tower(), OutlierMerging(2))
    with pytest.raises(ValueError, match="class token"):
        vision_tower.patch_tower(tiny.tower("siglip"), OutlierMerging(3))(images)


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
        (thresholds.CappedThreshold([0.9] * 3, 5), "CappedThreshold: 3 thresholds for a model of 4 blocks"),
        (thresholds.CappedThreshold(0.9, [5] * 5), "CappedThreshold: 5 caps for a model of 4 blocks"),
        (peers.StaticRates(1, [1, 2]), "StaticRates: 2 merge values for a model of 4 blocks"),
        (peers.AdaMerge(3, [0.5], [0.1]), "AdaMerge: 1 means for a model of 4 blocks"),
        (thresholds.RelativeThreshold([1.0]), "RelativeThreshold: 1 z values"),
    ],
)
def test_wrong_lengths_are_named(model, policy, message):
    with pytest.raises(ValueError, match=message):
        tokmerge.patch(model, policy)
