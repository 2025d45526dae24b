from functools import partial

import checks
import pytest
import reference
import tiny
import tokmerge
import torch
from conftest import build
from tokmerge import ConfidenceThreshold, Threshold
from tokmerge.merging import matching
from tokmerge.merging.packed import Layout
from tokmerge.merging.thresholds import LocalThreshold
from tokmerge.models import vision_tower


def window_choice(tau, window):
    def decide(layer):
        windows, pairs, first = {}, [], 0
        for token in range(layer.protected, len(layer.sizes)):
            # The mean place of a token's patches on the grid of 8 x 8; token 0 is CLS.
            places = [divmod(patch - 1, 8) for patch in layer.groups[token]]
            row, column = (sum(part) / len(places) for part in zip(*places, strict=True))
            windows.setdefault((int(row // window), int(column // window)), []).append(token)
        for _, tokens in sorted(windows.items()):
            # The alternation goes on from window to window.
            a_s = [token for number, token in enumerate(tokens, first) if number % 2 == 0]
            first += len(tokens)
            for a in a_s:
                best = reference.most_similar(layer.heads.mean(0), a, sorted(set(tokens) - set(a_s)))
                pairs += [(a, best[1])] if best and best[0] > tau else []
        return {"pairs": pairs}

    return decide


@pytest.mark.parametrize("window", [2, 3])
def test_equals_the_plain_implementation(window, images):
    tower, decide = tiny.tower(), window_choice(0.2, window)
    plain = partial(reference.run_tower, tower, decide=decide, layer=4, skip=1, feature="keys")
    record = checks.equals_plain(vision_tower.patch_tower(tower, LocalThreshold(0.2, window, "keys")), images, plain)
    assert (record.tokens[:, 0] - record.tokens[:, -1]).sum() > 50


def test_one_window_is_the_threshold(images):
    tower = tiny.tower()
    features, record = vision_tower.patch_tower(tower, LocalThreshold(0.3, 100))(images)
    expected, other = vision_tower.patch_tower(tower, Threshold(0.3))(images)
    torch.testing.assert_close(features.x, expected.x)
    assert torch.equal(record.tokens, other.tokens)
    assert (record.macs > other.macs).all(), "comparisons of windows are counted"


def test_unknown_places_and_bad_numbers_are_named():
    context = matching.Context(0, 1, 0, torch.eye(4), None, Layout(torch.tensor([4])))
    with pytest.raises(ValueError, match="places of tokens"):
        LocalThreshold(0.5, 1).select(context)
    with pytest.raises(ValueError, match="2 windows for a model of 4 blocks"):
        vision_tower.patch_tower(tiny.tower(), LocalThreshold(0.5, (1, 2)))
    with pytest.raises(TypeError, match="window is 'far'"):
        LocalThreshold(0.5, "far")
    with pytest.raises(ValueError, match="a side of 1 or more patches"):
        LocalThreshold(0.5, (2, 0, 2, 2))


def test_confidence_is_what_the_head_would_say_now(any_model, images):
    model, seen = any_model, []

    def spy(tokens):
        seen.append((tokens, confidence(tokens)))
        return seen[-1][1]

    merged = tokmerge.patch(model, ConfidenceThreshold(0.3, 0.5, 1.5, first=2))
    confidence, merged.confidence = merged.confidence, spy
    merged(images)
    assert len(seen) == 2, "asked from the third of four blocks on"
    for tokens, got in seen:
        for i in range(len(images)):
            alone = tokens.images(torch.tensor([i]))
            scores = merged.forward_head(alone.with_x(model.norm(alone.x)))[0].softmax(0).sort(descending=True).values
            assert got[i].item() == pytest.approx((scores[0] - scores[1]).item(), abs=1e-5)


def test_equally_sure_is_one_threshold_and_unsure_of_everything_is_none(images):
    model = build()
    for same in (1.0, 0.5):
        plain = tokmerge.patch(model, Threshold(1 - 0.7 * same**2))(images)
        sure = tokmerge.patch(model, ConfidenceThreshold(0.3, same, same))(images)
        assert torch.equal(sure[1].tokens, plain[1].tokens)
        assert torch.equal(sure[0], plain[0])
    nothing = tokmerge.patch(model, ConfidenceThreshold(0.3, 0.0, 0.0))(images)[1]
    assert (nothing.tokens == 65).all()


def test_asking_for_confidence_costs_a_head_per_block(images):
    model = build()
    plain, asked, late = (tokmerge.patch(model, policy)(images)[1] for policy in (
        Threshold(0.3), ConfidenceThreshold(0.3, 1.0, 1.0), ConfidenceThreshold(0.3, 1.0, 1.0, first=3)))  # fmt: skip
    head = model.head.in_features * model.head.out_features
    assert (asked.macs - plain.macs).tolist() == [4 * head] * len(images)
    assert (late.macs - plain.macs).tolist() == [head] * len(images)


def test_confidence_needs_a_classifier():
    for make in (partial(tokmerge.patch, build(num_classes=0)), partial(vision_tower.patch_tower, tiny.tower())):
        with pytest.raises(ValueError, match="ConfidenceThreshold needs a model that gives it: confidence"):
            make(ConfidenceThreshold(0.9))
