import json
from functools import partial

import pytest
import tokmerge
import torch
from tokmerge import wire
from tokmerge.io import paths, store
from tokmerge.merging.merge import unmerge_tokens
from tokmerge.merging.packed import Layout, join
from tokmerge.privacy.defence import Defence, add_noise, collect_tokens, serve


def intercept(merged, images, batch_size=5):
    """What a device sends, as an eavesdropper who knows the source map gets it."""
    return collect_tokens(partial(merged.edge, source=True), images, batch_size)


@pytest.fixture
def sent(model, images):
    return intercept(tokmerge.patch(model, tokmerge.Threshold(0.6)), images, batch_size=2)


@pytest.mark.parametrize("policy", [None, tokmerge.RandomPruning((3, 0))])
def test_a_defence_is_written_down_as_plain_values(policy):
    defence = Defence("one", policy, "int8", 3.0)
    assert Defence.from_json(json.loads(json.dumps(defence.to_json()))) == defence


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ({"name": "odd", "policy": None, "precision": "int3"}, "odd: unknown precision 'int3'"),
        ({"name": "odd", "policy": None, "method": "threshold"}, "is no defence: .*method"),
        ({"name": "odd"}, "is no defence: 'policy'"),
    ],
)
def test_what_is_no_defence_is_named(plain, message):
    with pytest.raises(ValueError, match=message):
        Defence.from_json(plain)


def test_the_shipped_study_says_which_policy_each_defence_had():
    facts = store.load_json(paths.ASSETS / "privacy_study" / "study.json")
    defences = {row["name"]: Defence.from_json(row) for row in facts["defences"]}
    assert defences["unmerged"] == Defence("unmerged")
    assert isinstance(defences[facts["main"]].policy, tokmerge.Threshold)
    assert defences["same counts"].policy.r == defences["pruned"].policy.r
    assert sum(defences["cut off"].policy.r) == sum(defences["pruned"].policy.r)
    assert defences["merged, int4"].policy == defences["merged"].policy
    assert defences["merged, int4"].precision == "int4"


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


def test_collected_batches_are_those_of_each_image_alone(model, images, sent):
    assert 65 > sent.lengths.max() > sent.lengths.min()
    merged = tokmerge.patch(model, tokmerge.Threshold(0.6))
    for i, tokens in enumerate(sent.split()):
        alone = merged.edge(images[i : i + 1], source=True)
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
    logits, sent = serve(merged, intercept(merged, images), defence, batch_size=2, seed=0)
    expected, record = merged(images)
    assert torch.allclose(logits, expected, atol=2e-2)
    assert torch.equal(sent, record.payload_bytes)


def test_noise_costs_the_server_as_well(model, images):
    merged = tokmerge.patch(model, None)
    tokens, snrs = intercept(merged, images), (None, -10.0, -10.0, 60.0)
    clean, loud, again, faint = (serve(merged, tokens, Defence("one", snr_db=snr), 5, seed=0)[0] for snr in snrs)
    assert torch.equal(loud, again)
    assert (loud - clean).abs().max() > 10 * (faint - clean).abs().max()
