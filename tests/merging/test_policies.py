"""Every policy against its definition, image by image and token by token; `LocalThreshold` has a file of its own."""

import math
from functools import partial

import checks
import numpy as np
import pytest
import reference
import tiny
import tokmerge
import torch
from conftest import build
from tokmerge import Threshold, TopR
from tokmerge.merging.matching import Context
from tokmerge.merging.notation import policy_from_json, policy_to_json
from tokmerge.merging.packed import Layout
from tokmerge.merging.peers import DominantMerging, OutlierMerging, WindowPooling
from tokmerge.models import vision_tower

MEANS, DEVIATIONS = (0.5, 0.6, 0.4, 0.5), (0.2, 0.3, 0.1, 0.2)


def by_energy(layer):
    """Cosines of all tokens, the unprotected ones from high to low energy, and how many merge."""
    metric, free, margin = layer.heads.mean(0), range(1, len(layer.sizes)), 0.75 * (1 - layer.index / 4)
    cosine = torch.nn.functional.cosine_similarity(metric[:, None], metric[None], dim=2).tolist()
    energy = {}
    for i in free:
        others = [cosine[i][j] - margin for j in free if j != i]
        energy[i] = sum(x if x > 0 else math.expm1(x) for x in others) / max(len(others), 1)
    return cosine, sorted(free, key=lambda i: -energy[i]), min([9, 0, 5, 100][layer.index], len(free) // 2)


def pitome(layer):
    cosine, order, r = by_energy(layer)
    targets = order[1 : 2 * r : 2]
    return {"pairs": [(a, max(targets, key=lambda b: cosine[a][b])) for a in order[: 2 * r : 2]]}


def half_pitome(layer):
    """PiToMe whose first two of four blocks protect no token."""
    if layer.index >= 2:
        return pitome(layer)
    cosine, order, r = by_energy(layer)
    pairs = {a: max((cosine[a][b], -place, b) for place, b in enumerate(order[1::2])) for a in order[::2]}
    chosen = sorted(pairs, key=lambda a: -pairs[a][0])[:r]
    return {"pairs": [(a, pairs[a][2]) for a in chosen]}


def tofu(layer):
    return {"pairs": reference.largest(layer.matches, [7, 0, 5, 30][layer.index]), "keep_norm": True}


def size_aware(layer, taus=(0.9, 1.0, 0.5, -3.0)):
    """Best matches by 1 - sqrt(harmonic mean of sizes) (1 - cosine)."""
    metric, free, tau, pairs = layer.heads.mean(0), range(1, len(layer.sizes)), taus[layer.index], []
    for a in free[::2] if tau < 1 else ():
        scores = []
        for b in free[1::2]:
            cosine = torch.nn.functional.cosine_similarity(metric[a], metric[b], dim=0).item()
            sizes = layer.sizes[a], layer.sizes[b]
            scores.append((1 - math.sqrt(2 * sizes[0] * sizes[1] / sum(sizes)) * (1 - cosine), b))
        best = max(scores, key=lambda pair: pair[0])
        pairs += [(a, best[1])] if best[0] > tau else []
    return {"pairs": pairs}


def windows(layer):
    """Groups of patches by their mean place, on the 8 x 8 grid."""
    rows, columns = [1, 2, 1, 3][layer.index], [1, 1, 2, 3][layer.index]
    first, pairs = {}, []
    for token, group in enumerate(layer.groups[1:], 1):
        places = [divmod(patch - 1, 8) for patch in group]
        row, column = (sum(values) / len(places) for values in zip(*places, strict=True))
        window = row // rows, column // columns
        if window in first:
            pairs.append((token, first[window]))
        first.setdefault(window, token)
    return {"pairs": pairs}


def capped(layer):
    above = {a: pair for a, pair in layer.matches.items() if pair[0] > [0.3, 1.0, 0.5, 0.2][layer.index]}
    return {"pairs": reference.largest(above, [4, 9, 100, 6][layer.index]) if layer.index != 1 else []}


def relative(layer):
    values = [c for c, _ in layer.matches.values()]
    level = np.mean(values) + [0.5, -0.3, math.inf, 0.0][layer.index] * np.std(values)
    return {"pairs": [(a, b) for a, (c, b) in layer.matches.items() if c > level]}


def confident(layer):
    model = build().to(layer.heads.dtype)
    first, second = model.forward_head(model.norm(layer.heads[0])[None])[0].softmax(0).topk(2).values.tolist()
    factor = (0.3 + (1.6 - 0.3) * (first - second)) ** 2 if layer.index > 0 else 1.0
    tau = 1 - (1 - [0.7, 1.0, 0.4, 0.1][layer.index]) * factor
    return {"pairs": [(a, b) for a, (c, b) in layer.matches.items() if c > tau] if layer.index != 1 else []}


def adamerge(layer):
    pairs = layer.matches
    mean = sum(c for c, _ in pairs.values()) / len(pairs)
    z = (mean - MEANS[layer.index]) / DEVIATIONS[layer.index]
    r = math.floor([12, 8, 6, 4][layer.index] / (1 + math.exp(-1.5 * z)))
    metric = layer.heads.mean(0)
    cosine = torch.nn.functional.cosine_similarity(metric[:, None], metric[None, 1:], dim=2).clamp(min=0)
    sums = cosine.sum(1).tolist()
    salience = [min(max(value / max(sums[1:]), 1e-6), 1.0) for value in sums]
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


TAUS, COUNTS = [0.9, 1.0, 0.5, -1.0], [9, 0, 5, 100]
CASES = {
    "threshold": (tokmerge.Threshold(TAUS), reference.threshold_choice(TAUS)),
    "threshold on keys": (tokmerge.Threshold(TAUS, "keys"), reference.threshold_choice(TAUS)),
    "size-aware": (tokmerge.Threshold([0.9, 1.0, 0.5, -3.0], size_aware=True), size_aware),
    "top r": (tokmerge.TopR(COUNTS), reference.top_r_choice(COUNTS)),
    "top r on tokens": (tokmerge.TopR(COUNTS, "tokens"), reference.top_r_choice(COUNTS)),
    "pitome": (tokmerge.PiToMe(COUNTS), pitome),
    "half pitome": (tokmerge.PiToMe(COUNTS, unprotected=0.5), half_pitome),
    "windows": (WindowPooling([1, 2, 1, 3], [1, 1, 2, 3]), windows),
    "tofu": (tokmerge.ToFu([7, 0, 5, 30]), tofu),
    "capped": (tokmerge.CappedThreshold([0.3, 1.0, 0.5, 0.2], [4, 9, 100, 6]), capped),
    "confidence": (tokmerge.ConfidenceThreshold([0.7, 1.0, 0.4, 0.1], 0.3, 1.6, first=1), confident),
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
    model = build()
    plain = partial(reference.run, model, decide=decide, feature=policy.feature)
    record = checks.equals_plain(tokmerge.patch(model, policy), images, plain)
    assert (record.tokens[:, -1] < 65).all()


@case
def test_a_batch_gives_every_image_what_it_gets_alone(images, policy, decide):
    checks.equals_alone(tokmerge.patch(build().double(), policy), images.double())


def fates(policy, qkv, lengths, first=0):
    """{row: the row it merges into, or None} of all that disappear, rows counted from ``first``."""
    metric, layout = torch.nn.functional.normalize(qkv[:, 1].mean(1), dim=-1), Layout(torch.tensor(lengths))
    place = torch.stack([layout.position, layout.position], 1).float()
    merges = policy.select(Context(3, 4, 1, metric, None, layout, qkv, place, lambda: metric[layout.offsets, 0].abs()))
    pairs = list(zip(merges.src.tolist(), merges.dst.tolist(), strict=True))
    pairs += [(row, None) for row in ([] if merges.dropped is None else merges.dropped.tolist())]
    gone = dict(pairs)
    assert len(gone) == len(pairs)
    assert torch.equal(merges.lost, layout.image[list(gone)].bincount(minlength=len(lengths)))
    assert not set(gone) & {*merges.dst.tolist(), *layout.offsets.tolist()}, "the class token stays, as does a target"
    return {first + row: to if to is None else first + to for row, to in pairs}


@case
@pytest.mark.parametrize("lengths", [[1, 2], [2, 9, 1, 5]])
def test_of_few_and_uneven_tokens_those_go_that_go_alone(policy, decide, lengths):
    qkv, expected, first = torch.randn(sum(lengths), 3, 2, 4, generator=torch.Generator().manual_seed(0)), {}, 0
    for image in qkv.split(lengths):
        expected |= fates(policy, image, [len(image)], first) if len(image) > 1 else {}
        first += len(image)
    assert fates(policy, qkv, lengths) == expected


def outliers(spread, samples=0):
    def decide(layer):
        if layer.index < 3:
            return {"pairs": []}
        weight, free = np.array(layer.attention), range(1, len(layer.sizes))
        low, high = np.quantile(weight[1:], [0.25, 0.75])
        stay = [i for i in free if weight[i] > high + spread * (high - low)] or [1 + int(weight[1:].argmax())]
        if samples:
            stay = sorted({*stay, *free[:: max(1, len(free) // len(stay) // samples)]})
        keys = layer.heads.mean(0)
        pairs = [(i, reference.most_similar(keys, i, stay)[1]) for i in free if i not in stay]
        return {"pairs": pairs, "weights": layer.attention}

    return decide


def dominant(layer):
    if layer.index < 3:
        return {"pairs": []}
    order = least_attended(layer)[::-1]
    rest, keys = sorted(order[6:]), layer.heads.mean(0)
    targets = rest[:: len(rest) // 4][:4]
    going = [i for i in rest if i not in targets]
    pairs = [(i, reference.most_similar(keys, i, targets)[1]) for i in going]
    return {"pairs": pairs, "weights": [1.0] * len(layer.sizes)}


@pytest.mark.parametrize(
    ("policy", "decide"),
    [
        *((OutlierMerging(3, spread), outliers(spread)) for spread in (0.5, 1.5, 1e6)),
        (OutlierMerging(3, 0.5, samples=3), outliers(0.5, 3)),
        (DominantMerging(3, 6, 4), dominant),
    ],
)
def test_what_a_tower_keeps_by_attention_equals_its_definition_in_a_batch_and_alone(policy, decide, images):
    tower = tiny.tower()
    merged = vision_tower.patch_tower(tower, policy)
    left = checks.equals_alone(merged, images).tokens[:, -1].tolist()
    if policy == OutlierMerging(3, 0.5):
        assert len(set(left)) > 1, "every image keeps its own number"
    if isinstance(policy, DominantMerging):
        assert left == [11] * len(images)
    plain = partial(reference.run_tower, tower, decide=decide, layer=4, skip=1, feature="keys")
    checks.equals_plain(merged, images, plain)
    assert merged.to(torch.bfloat16)(images.bfloat16())[0].x.isfinite().all()


def test_attention_needs_a_class_token_and_outliers_the_last_layer():
    with pytest.raises(ValueError, match="the last of 4 layers is 3"):
        vision_tower.patch_tower(tiny.tower(), OutlierMerging(2))
    with pytest.raises(ValueError, match="OutlierMerging needs a model that gives it: class token"):
        vision_tower.patch_tower(tiny.tower("siglip"), OutlierMerging(3))
    # Without a class token the first token is a patch.
    for name in ("pruning", "static"):
        with pytest.raises(ValueError, match="needs a model that gives it: class token"):
            tokmerge.patch(build("no_cls_avg"), CASES[name][0])


@case
def test_a_policy_is_what_was_written_down(policy, decide):
    assert policy_from_json(policy_to_json(policy)) == policy


def test_where_nothing_happens_nothing_is_active():
    idle = {name for name, (policy, _) in CASES.items() if not policy.active(1)}
    assert idle == set(CASES) - {"relative", "adamerge", "static", "windows"}
    assert not tokmerge.RelativeThreshold([math.inf]).active(0)
    assert not tokmerge.CappedThreshold(0.5, [0]).active(0)
    assert tokmerge.StaticRates([0], [1]).active(0)


def test_match_macs():
    n = torch.tensor([7, 8, 0])
    for name in ("threshold", "top r", "tofu", "capped", "relative"):
        assert CASES[name][0].match_macs(n, 10).tolist() == [4 * 3 * 10, 4 * 4 * 10, 0]
    for name in ("pruning", "random merging", "random pruning", "windows"):
        assert CASES[name][0].match_macs(n, 10).tolist() == [0, 0, 0]
    assert CASES["size-aware"][0].match_macs(n, 10).tolist() == [4 * 3 * 13, 4 * 4 * 13, 0]
    for name in ("pitome", "half pitome", "adamerge"):
        assert CASES[name][0].match_macs(n, 10).tolist() == [490, 640, 0]
    # Of 7 tokens 2 go and 3 look at the 2 that stay; of 4, 2 go, 1 looks at 1.
    static_rates = tokmerge.StaticRates([2, 2], [3, 3])
    assert static_rates.match_macs(torch.tensor([[7, 4]]), 10).tolist() == [[60, 10]]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda _: Threshold([0.9, "0.8"]), TypeError, r"Threshold: thresholds\[1\] is '0.8', not a number"),
        (lambda _: Threshold([0.9, math.nan]), TypeError, r"thresholds\[1\] is nan"),
        (lambda _: Threshold([True]), TypeError, r"thresholds\[0\] is True"),
        (lambda _: Threshold("0.9"), TypeError, "thresholds is '0.9'"),
        (lambda _: TopR(1.5), TypeError, "TopR: r is 1.5, not an integer"),
        (lambda _: TopR([1, -2]), ValueError, r"r\[1\] is -2, but cannot be negative"),
        (lambda _: TopR(3, "value"), ValueError, "TopR: unknown feature 'value': use one of tokens, keys"),
        (lambda _: tokmerge.AdaMerge(3, [0.5], [0.0]), ValueError, "one positive number per block"),
        (lambda patch: patch(tokmerge.CappedThreshold([0.9] * 3, 5)), ValueError, "CappedThreshold: 3 thresholds for"),
        (lambda patch: patch(tokmerge.CappedThreshold(0.9, [5] * 5)), ValueError, "CappedThreshold: 5 caps for"),
        (lambda patch: patch(tokmerge.StaticRates(1, [1, 2])), ValueError, "StaticRates: 2 merge values for"),
        (lambda patch: patch(tokmerge.AdaMerge(3, [0.5], [0.1])), ValueError, "AdaMerge: 1 means for a model of 4"),
        (lambda _: tokmerge.ConfidenceThreshold(0.9, -0.1), ValueError, "unsure, sure and first cannot be negative"),
        (lambda patch: patch(tokmerge.RelativeThreshold([1.0])), ValueError, "RelativeThreshold: 1 z values"),
    ],
)
def test_bad_values_are_named(model, make, error, message):
    with pytest.raises(error, match=message):
        make(partial(tokmerge.patch, model))
