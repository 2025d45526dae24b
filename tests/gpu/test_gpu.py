"""On a GPU everything is as on the CPU, within rounding: the engine, LLaVA, the channel, attackers. `make test-gpu`."""

import copy
from functools import partial

import pytest
import tiny
import tokmerge
import torch
from conftest import build, build_dense
from members import measured_link
from tokmerge.channel.transmission import send_image_tokens
from tokmerge.evaluation import timing
from tokmerge.merging.packed import Layout, attend, attend_padded, pack
from tokmerge.merging.peers import WindowPooling
from tokmerge.models import llava
from tokmerge.models.language_model import Pruning
from tokmerge.privacy.decoder import Attacker, reconstruct, train_attacker

POLICIES = [
    None, tokmerge.Threshold(0.5), tokmerge.Threshold(0.5, "keys"), tokmerge.CappedThreshold(0.5, 5),
    tokmerge.RelativeThreshold(0.5), tokmerge.LocalThreshold(0.5, 2), tokmerge.ConfidenceThreshold(0.5, 0.5, 1.5),
    tokmerge.TopR(9), tokmerge.TopR(9, "tokens"), tokmerge.PiToMe(9), tokmerge.ToFu(9),
    tokmerge.AdaMerge(9, [0.5] * 4, [0.2] * 4), tokmerge.AttentionPruning(9), tokmerge.StaticRates(4, 4),
    WindowPooling(2, 2),
]  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@pytest.mark.parametrize("variant", ["cls", "registers", "map"])
def test_classifiers(policy, variant, images, device):
    # In double precision no two tokens are equally near by rounding.
    model = build(variant).double()
    if type(policy).__name__ in ("AttentionPruning", "StaticRates") and variant == "map":
        with pytest.raises(ValueError, match="class token"):
            tokmerge.patch(model, policy)
        return
    expected, counted = tokmerge.patch(model, policy)(images.double(), source=True)
    got, record = tokmerge.patch(copy.deepcopy(model).to(device), policy)(images.double().to(device), source=True)
    torch.testing.assert_close(got.cpu(), expected, atol=1e-8, rtol=1e-8)
    assert torch.equal(record.tokens.cpu(), counted.tokens)
    assert torch.equal(record.source.cpu(), counted.source)
    assert torch.equal(record.macs.cpu(), counted.macs)
    assert torch.equal(record.payload_bytes.cpu(), counted.payload_bytes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sized", [False, True])
def test_attention_of_ragged_batches(dtype, sized, device):
    generator = torch.Generator().manual_seed(0)
    layout = Layout(torch.tensor([5, 1, 17, 64]))
    qkv = torch.randn(87, 3, 4, 24, generator=generator)
    sizes = torch.randint(1, 9, (87,), generator=generator).float() if sized else None
    expected = attend_padded(qkv.double(), layout, sizes)
    there = attend(
        qkv.to(device, dtype), Layout(layout.lengths.to(device)), None if sizes is None else sizes.to(device)
    )
    torch.testing.assert_close(there.cpu().double(), expected, atol=2e-2 if dtype.itemsize == 2 else 1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_sixteen_bits_an_image_gets_in_a_batch_what_it_gets_alone(dtype, images, device):
    merged = tokmerge.patch(build().to(device, dtype), tokmerge.Threshold(0.5))
    given = images.to(device, dtype)
    got, record = merged(given)
    for i in range(len(given)):
        alone, own = merged(given[i : i + 1])
        assert torch.equal(own.tokens[0], record.tokens[i])
        torch.testing.assert_close(alone[0], got[i], atol=0.1, rtol=0.05)


@pytest.mark.parametrize("split", [2, 4])
def test_maps(split, images, device):
    model = build_dense().double()
    expected, _ = tokmerge.patch(model, tokmerge.Threshold(0.5), split_layer=split)(images.double())
    merged = tokmerge.patch(copy.deepcopy(model).to(device), tokmerge.Threshold(0.5), split_layer=split)
    torch.testing.assert_close(merged(images.double().to(device))[0].cpu(), expected, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize(
    "options", [{}, {"positions": "first", "weights": "size"}, {"pruning": Pruning(1, 0.5)}], ids=str
)
def test_llava_answers(options, device):
    model = tiny.llava()
    pixels = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    policy = tokmerge.Threshold(tiny.thresholds(model.model.vision_tower, pixels))
    alike = torch.arange(5)
    expected, counted = llava.patch(model, policy, **options).generate(tiny.IDS, pixels, tiny.MASK, max_new_tokens=6)
    merged = llava.patch(copy.deepcopy(model).to(device), policy, **options)
    for shared in (None, alike.to(device)):
        got, record = merged.generate(
            tiny.IDS.to(device), pixels.to(device), tiny.MASK.to(device), max_new_tokens=6, alike=shared
        )
        assert got.cpu().tolist() == expected.tolist()
        torch.testing.assert_close(record.scores.cpu(), counted.scores, atol=1e-3, rtol=0)
        assert torch.equal(record.macs.cpu(), counted.macs)


@pytest.mark.parametrize("make", [build, build_dense])
def test_the_channel(make, images, device):
    model = make()
    sent = {}
    for where in ("cpu", device):
        merged = tokmerge.patch(copy.deepcopy(model).to(where), tokmerge.TopR(9, "tokens"), split_layer=2)
        sent[where] = send_image_tokens(merged, images, ["int8"])["int8"]
    here, there = sent["cpu"], sent[device]
    assert torch.equal(here.n_bytes, there.n_bytes)
    for snr_db in (-5.0, 5.0, 20.0):
        draw = partial(torch.Generator().manual_seed, 1)
        answers = [one.deliver(measured_link(), snr_db, 2000, 5, draw()) for one in (here, there)]
        assert (answers[0] == answers[1]).double().mean() > 0.98


@pytest.mark.parametrize("kind", ["sequence", "grid", "map"])
def test_attackers_learn_alike(kind, device):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (24, 1, 16, 16), generator=generator, dtype=torch.uint8)
    tokens = pack(torch.randn(24, 17, 6, generator=generator), source=True)
    losses = []
    for where in ("cpu", device):
        torch.manual_seed(0)
        attacker = Attacker(kind, 6, 17, 1, (1, 16, 16), 16).to(where)
        keep = lambda packed, drawn=None: packed  # noqa: E731
        curve = train_attacker(attacker, tokens, images, keep, steps=6, check_every=3, batch_size=8, lr=1e-3, seed=0,
                               n_check=8)  # fmt: skip
        rebuilt = reconstruct(attacker, tokens, keep, 8, generator)
        assert rebuilt.shape == images.shape
        losses.append(curve.loss.tolist())
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


@pytest.mark.parametrize("batch", [1, 32])
def test_the_engine_against_its_limit(batch, device, capsys):
    photos = torch.stack([torch.rand(3, 224, 224) for _ in range(batch)]).to(device)
    model, _ = timing.deit_small(photos[:1].cpu())
    ratios = timing.compare_engine(model.to(device), photos, timing.R, rounds=20 if device.type == "cuda" else 2)
    with capsys.disabled():
        print(f"\nDeiT-S, batch {batch}: " + ", ".join(f"{name} {value:.2f}" for name, value in ratios.items()))
    assert 0.5 < ratios["over_limit"] < 20
