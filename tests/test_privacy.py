import pytest
import tokmerge
import torch
from conftest import build
from tokmerge import wire
from tokmerge.merge import unmerge
from tokmerge.packed import Layout, Packed
from tokmerge.privacy import Defence, add_noise, collect, decreasing, join, listen, pick, serve, to


@pytest.fixture
def heard(model, images):
    return collect(listen(tokmerge.patch(model, tokmerge.Threshold(0.6))), images, batch_size=2)


def test_a_defence_is_plain_values_and_makes_its_policy():
    defence = Defence("merged", "threshold", [0.9, 0.8])
    assert defence == Defence("merged", "threshold", (0.9, 0.8))
    assert defence.policy == tokmerge.Threshold((0.9, 0.8))
    assert Defence("unmerged").policy is None
    assert Defence("pruned", "pruning", (3, 0)).policy == tokmerge.RandomPruning((3, 0))
    with pytest.raises(ValueError, match="odd: unknown method 'magic'"):
        Defence("odd", "magic")
    with pytest.raises(ValueError, match="odd: unknown precision 'int3'"):
        Defence("odd", precision="int3")


def test_noise_has_the_power_asked_for_in_every_image():
    generator = torch.Generator().manual_seed(0)
    layout = Layout(torch.tensor([4000, 500]))
    x = torch.randn(4500, 16, generator=generator) * torch.where(layout.image == 0, 1.0, 30.0)[:, None]
    noise = add_noise(x, layout, 6.0, generator) - x
    for image in range(2):
        rows = layout.image == image
        signal, power = x[rows].square().mean(), noise[rows].square().mean()
        assert 10 * (signal / power).log10().item() == pytest.approx(6.0, abs=0.15)


def test_the_eavesdropper_gets_what_the_payload_decodes_to(heard):
    received = Defence("int4", precision="int4").receive(heard)
    first = heard.split()[0].float()
    assert torch.equal(received.split()[0], wire.decode(wire.encode(first, precision="int4")).tokens)
    assert torch.equal(Defence("clean").receive(heard).x, heard.x.float())


@pytest.mark.parametrize(("total", "depth"), [(0, 3), (7, 2), (188, 12), (11, 12)])
def test_decreasing_counts_fall_to_zero_and_add_up(total, depth):
    counts = decreasing(total, depth)
    assert (len(counts), sum(counts), counts[-1]) == (depth, total, 0)
    exact = [total * 2 * (depth - 1 - i) / (depth * (depth - 1)) for i in range(depth)]
    assert all(abs(count - share) <= 1 for count, share in zip(counts, exact, strict=True))


@pytest.mark.parametrize("split_layer", [2, None])
def test_listening_hears_what_edge_sends_with_its_source_map(model, images, split_layer):
    merged = tokmerge.patch(model, tokmerge.Threshold(0.6), split_layer=split_layer)
    heard, sent = listen(merged)(images), merged.edge(images)
    assert torch.equal(heard.x, sent.x)
    assert torch.equal(heard.lengths, sent.lengths)
    assert 65 > heard.lengths.max() > heard.lengths.min()
    # Every token stands for as many patches as its size says.
    for row, size in zip(heard.source, heard.sizes.split(heard.layout.counts), strict=True):
        assert torch.bincount(row, minlength=len(size)).tolist() == size.tolist()


def test_collected_batches_are_those_of_each_image_alone(model, images, heard):
    one = listen(tokmerge.patch(model, tokmerge.Threshold(0.6)))
    for i, tokens in enumerate(heard.split()):
        alone = one(images[i : i + 1])
        assert torch.allclose(tokens.float(), alone.x, rtol=2e-3, atol=1e-4)
        assert torch.equal(heard.source[i].long(), alone.source[0])


def test_pick_takes_images_in_any_order_and_repeatedly(heard):
    picked = pick(heard, torch.tensor([4, 0, 4]))
    parts = heard.split()
    assert [len(part) for part in picked.split()] == [len(parts[i]) for i in (4, 0, 4)]
    for part, i in zip(picked.split(), (4, 0, 4), strict=True):
        assert torch.equal(part, parts[i].float())
    grid = unmerge(heard, heard.source.long())
    assert torch.equal(unmerge(picked, picked.source), grid[[4, 0, 4]].float())
    sizes = heard.sizes.split(heard.layout.counts)
    assert torch.equal(picked.sizes, torch.cat([sizes[4], sizes[0], sizes[4]]))


def test_join_is_undone_by_pick(heard):
    again = join([pick(heard, torch.tensor([0, 1])), pick(heard, torch.tensor([2, 3, 4]))])
    for name in ("x", "sizes", "source"):
        assert torch.equal(getattr(again, name), getattr(heard, name).to(getattr(again, name).dtype))
    assert torch.equal(again.lengths, heard.lengths)


@pytest.mark.parametrize("split_layer", [2, None])
def test_the_server_gets_the_same_tokens(model, images, split_layer):
    defence = Defence("merged", "threshold", (0.6,) * 4)
    merged = tokmerge.patch(model, defence.policy, split_layer=split_layer)
    tokens = collect(listen(merged), images, batch_size=5)
    logits, sent = serve(merged, tokens, defence, batch_size=2, seed=0)
    expected, record = merged(images)
    assert torch.allclose(logits, expected, atol=2e-2)
    assert torch.equal(sent, record.payload_bytes)


def test_noise_costs_the_server_as_well(model, images):
    merged = tokmerge.patch(model, None)
    tokens = collect(listen(merged), images, batch_size=5)
    clean, _ = serve(merged, tokens, Defence("clean"), batch_size=5, seed=0)
    loud, _ = serve(merged, tokens, Defence("loud", snr_db=-10.0), batch_size=5, seed=0)
    again, _ = serve(merged, tokens, Defence("loud", snr_db=-10.0), batch_size=5, seed=0)
    faint, _ = serve(merged, tokens, Defence("faint", snr_db=60.0), batch_size=5, seed=0)
    assert torch.equal(loud, again)
    assert (loud - clean).abs().max() > 10 * (faint - clean).abs().max()


def test_to_keeps_everything():
    tokens = Packed(torch.ones(3, 2), Layout(torch.tensor([1, 2])), torch.ones(3), torch.zeros(2, 4, dtype=torch.long))
    moved = to(tokens, "meta")
    assert {moved.x.device.type, moved.lengths.device.type, moved.sizes.device.type} == {"meta"}
    assert moved.source.shape == (2, 4)


def test_class_token_alone_still_serves(images):
    model = build()
    merged = tokmerge.patch(model, Defence("class token", "pruning", (0, 0, 0, 64)).policy)
    tokens = collect(listen(merged), images, batch_size=5)
    assert tokens.lengths.tolist() == [2] * 5
    logits, _ = serve(merged, tokens, Defence("class token"), batch_size=5, seed=0)
    assert torch.allclose(logits, model(images), atol=2e-2)
