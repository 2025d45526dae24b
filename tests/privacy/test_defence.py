import json
from functools import partial

import pytest
import tokmerge
import torch
from conftest import build
from tokmerge import wire
from tokmerge.io import paths, store
from tokmerge.merging.merge import unmerge_tokens
from tokmerge.merging.packed import Layout, join
from tokmerge.privacy.defence import (
    Defence,
    add_noise,
    collect_tokens,
    decreasing_schedule,
    serve,
)


def edge(merged):
    """What a device sends, as an eavesdropper who knows the source map gets it."""
    return partial(merged.edge, source=True)


@pytest.fixture
def sent(model, images):
    return collect_tokens(edge(tokmerge.patch(model, tokmerge.Threshold(0.6))), images, batch_size=2)


@pytest.mark.parametrize("policy", [None, tokmerge.Threshold((0.9, 0.8)), tokmerge.RandomPruning((3, 0))])
def test_a_defence_is_written_down_as_plain_values(policy):
    defence = Defence("one", policy, "int8", 3.0)
    assert Defence.from_json(json.loads(json.dumps(defence.to_json()))) == defence


def test_what_is_no_defence_is_named():
    plain = Defence("odd").to_json()
    with pytest.raises(ValueError, match="unknown policy 'Magic'"):
        Defence.from_json(plain | {"policy": {"kind": "Magic"}})
    with pytest.raises(ValueError, match="odd: unknown precision 'int3'"):
        Defence.from_json(plain | {"precision": "int3"})
    with pytest.raises(ValueError, match=r"is no defence: .*method"):
        Defence.from_json(plain | {"method": "threshold"})
    del plain["policy"]
    with pytest.raises(ValueError, match="is no defence: 'policy'"):
        Defence.from_json(plain)


def test_the_shipped_study_says_which_policy_each_defence_had():
    facts = store.load_json(paths.ASSETS / "privacy_study" / "study.json")
    defences = {row["name"]: Defence.from_json(row) for row in facts["defences"]}
    assert defences["unmerged"] == Defence("unmerged")
    assert isinstance(defences[facts["main"]].policy, tokmerge.Threshold)
    assert sum(defences["ToMe"].policy.r) == sum(defences["pruned"].policy.r) == 189
    assert defences["merged, 10 dB"].policy == defences["merged"].policy
    assert defences["merged, 10 dB"].snr_db == 10.0


def test_noise_has_the_power_asked_for_in_every_image():
    generator = torch.Generator().manual_seed(0)
    layout = Layout(torch.tensor([4000, 500]))
    x = torch.randn(4500, 16, generator=generator) * torch.where(layout.image == 0, 1.0, 30.0)[:, None]
    noise = add_noise(x, layout, 6.0, generator) - x
    for image in range(2):
        rows = layout.image == image
        signal, power = x[rows].square().mean(), noise[rows].square().mean()
        assert 10 * (signal / power).log10().item() == pytest.approx(6.0, abs=0.15)


def test_the_eavesdropper_gets_what_the_payload_decodes_to(sent):
    received = Defence("int4", precision="int4").receive(sent)
    first = sent.split()[0].float()
    assert torch.equal(received.split()[0], wire.decode(wire.encode(first, precision="int4")).tokens)
    assert torch.equal(Defence("clean").receive(sent).x, sent.x.float())


@pytest.mark.parametrize(("total", "depth"), [(0, 3), (7, 2), (188, 12), (11, 12)])
def test_decreasing_counts_fall_to_zero_and_add_up(total, depth):
    counts = decreasing_schedule(total, depth)
    assert (len(counts), sum(counts), counts[-1]) == (depth, total, 0)
    exact = [total * 2 * (depth - 1 - i) / (depth * (depth - 1)) for i in range(depth)]
    assert all(abs(count - share) <= 1 for count, share in zip(counts, exact, strict=True))


@pytest.mark.parametrize("split_layer", [2, None])
def test_what_is_intercepted_is_what_edge_sends_with_its_source_map(model, images, split_layer):
    merged = tokmerge.patch(model, tokmerge.Threshold(0.6), split_layer=split_layer)
    found, sent = edge(merged)(images), merged.edge(images)
    assert torch.equal(found.x, sent.x)
    assert torch.equal(found.lengths, sent.lengths)
    assert 65 > found.lengths.max() > found.lengths.min()
    # Every token stands for as many patches as its size says.
    for row, size in zip(found.source, found.sizes.split(found.layout.counts), strict=True):
        assert torch.bincount(row, minlength=len(size)).tolist() == size.tolist()


def test_collected_batches_are_those_of_each_image_alone(model, images, sent):
    one = edge(tokmerge.patch(model, tokmerge.Threshold(0.6)))
    for i, tokens in enumerate(sent.split()):
        alone = one(images[i : i + 1])
        assert torch.allclose(tokens.float(), alone.x, rtol=2e-3, atol=1e-4)
        assert torch.equal(sent.source[i].long(), alone.source[0])


def test_images_are_taken_in_any_order_and_repeatedly(sent):
    picked = sent.images(torch.tensor([4, 0, 4]))
    grid = unmerge_tokens(sent, sent.source.long())
    assert torch.equal(unmerge_tokens(picked, picked.source.long()), grid[[4, 0, 4]])
    again = join([sent.images(torch.tensor([0, 1])), sent.images(torch.tensor([2, 3, 4]))])
    for name in ("x", "sizes", "source", "lengths"):
        assert torch.equal(getattr(again, name), getattr(sent, name))


@pytest.mark.parametrize("split_layer", [2, None])
def test_the_server_gets_the_same_tokens(model, images, split_layer):
    defence = Defence("merged", tokmerge.Threshold([0.6] * 4))
    merged = tokmerge.patch(model, defence.policy, split_layer=split_layer)
    tokens = collect_tokens(edge(merged), images, batch_size=5)
    logits, sent = serve(merged, tokens, defence, batch_size=2, seed=0)
    expected, record = merged(images)
    assert torch.allclose(logits, expected, atol=2e-2)
    assert torch.equal(sent, record.payload_bytes)


def test_noise_costs_the_server_as_well(model, images):
    merged = tokmerge.patch(model, None)
    tokens = collect_tokens(edge(merged), images, batch_size=5)
    clean, _ = serve(merged, tokens, Defence("clean"), batch_size=5, seed=0)
    loud, _ = serve(merged, tokens, Defence("loud", snr_db=-10.0), batch_size=5, seed=0)
    again, _ = serve(merged, tokens, Defence("loud", snr_db=-10.0), batch_size=5, seed=0)
    faint, _ = serve(merged, tokens, Defence("faint", snr_db=60.0), batch_size=5, seed=0)
    assert torch.equal(loud, again)
    assert (loud - clean).abs().max() > 10 * (faint - clean).abs().max()


def test_class_token_alone_still_serves(images):
    model = build()
    merged = tokmerge.patch(model, tokmerge.RandomPruning([0, 0, 0, 64]))
    tokens = collect_tokens(edge(merged), images, batch_size=5)
    assert tokens.lengths.tolist() == [2] * 5
    logits, _ = serve(merged, tokens, Defence("class token"), batch_size=5, seed=0)
    assert torch.allclose(logits, model(images), atol=2e-2)
