from dataclasses import replace

import checks
import pytest
import reference
import timm
import tokmerge
import torch
from conftest import GEOMETRY, build_dense
from tokmerge import wire
from tokmerge.channel.segmentation import encode_payloads
from tokmerge.merging import merge
from tokmerge.models.cost import module_macs


def grid(x, groups):
    """Every place with the value of the token that it is part of."""
    whole = torch.zeros(65, 48, dtype=x.dtype)
    for value, group in zip(x, groups, strict=True):
        whole[sorted(group)] = value
    return whole


def plain(model, decide, split):
    """The map of one image where all places keep their own stream from a block on, to which their token's steps add."""

    def run(image):
        x, whole = model.norm_pre(model._pos_embed(model.patch_embed(image[None])))[0], 0
        sizes, groups, counts = [1.0] * len(x), [{i} for i in range(len(x))], [len(x)]
        for index, block in enumerate(model.blocks):
            whole = grid(x, groups) if index == split else whole
            out, _, first = reference.vit_layer(block, x, sizes)
            x, whole = x + out, whole + grid(out, groups)
            layer = reference.Layer(index, x[None], first, sizes, groups, model.num_prefix_tokens)
            x, sizes, groups = reference.combine(x, sizes, groups, **decide(layer))
            out = block.ls2(block.mlp(block.norm2(x)))
            x, whole = x + out, whole + grid(out, groups)
            counts.append(len(x))
        whole = grid(x, groups) if split == len(model.blocks) else whole
        return model.decoder(model.norm(whole)[1:].T.unflatten(1, (8, 8))[None])[0], counts, sizes, groups

    return run


POLICIES = {
    "threshold": (tokmerge.Threshold([0.9, 1.0, 0.5, -1.0]), reference.threshold_choice([0.9, 1.0, 0.5, -1.0])),
    "top r": (tokmerge.TopR([9, 0, 5, 20], "tokens"), reference.top_r_choice([9, 0, 5, 20])),
}


@pytest.mark.parametrize("split", [0, 2, 4])
@pytest.mark.parametrize(("policy", "decide"), POLICIES.values(), ids=POLICIES)
def test_maps_are_those_of_the_grid_whose_places_keep_what_the_server_merges(policy, decide, split, images):
    model = build_dense()
    merged = tokmerge.patch(model, policy, split_layer=split)
    checks.equals_alone(merged, images)
    forgets, _ = tokmerge.patch(model, policy)(images)
    assert torch.allclose(merged(images)[0], forgets, atol=1e-3) == (split == 4)
    checks.equals_plain(merged, images, plain(model.double(), decide, split))


def test_places_that_never_arrived_stay_empty(images):
    merged = tokmerge.patch(build_dense(), tokmerge.TopR(9), split_layer=2)
    sent = merged.edge(images)
    kept = torch.ones(len(sent.x), dtype=torch.bool)
    kept[5:9] = False
    received = sent.keep(kept)
    tokens, _ = merged._server(received)
    lost = received.source < 0
    assert lost.any()
    assert (merge.unmerge_tokens(tokens, tokens.source)[lost] == 0).all()


def test_without_merging_it_is_the_model_itself(images):
    model = build_dense()
    found, record = tokmerge.patch(model, None)(images)
    assert found.shape == (5, 32, 32)
    torch.testing.assert_close(found, model(images), atol=1e-5, rtol=0)
    decoder = module_macs(model.decoder, 1, 48, 8, 8)
    assert decoder == 48 * 32 * 32
    assert (record.macs - record.edge_macs == decoder).all(), "the decoder is the server's"
    # Nothing has merged: the server knows where every token belongs.
    assert record.payload_bytes[0] == len(wire.encode(torch.zeros(65, 48)))
    checks.leaves_model_alone(model, lambda it: tokmerge.patch(it, tokmerge.TopR(3)),
                              lambda merged: merged(images))  # fmt: skip


@pytest.mark.parametrize("split", [2, 4])
@pytest.mark.parametrize("policy", [tokmerge.Threshold(0.5), tokmerge.RandomPruning(7), tokmerge.ToFu(9)])
def test_a_server_decodes_what_the_payload_says(split, policy, images):
    merged = tokmerge.patch(build_dense(), policy, split_layer=split, precision="float32")
    expected, record = merged(images)
    sent = merged.edge(images)
    payloads = encode_payloads(merged, sent, wire.CHUNK_TOKENS)
    assert [len(payload) for payload in payloads] == record.payload_bytes.tolist()
    for i, payload in enumerate(payloads):
        got = wire.decode(payload)
        assert got.sizes is None, "the map says them"
        alone = sent.images(torch.tensor([i]))
        # The order of travel is undone by what the map names.
        grid = got.tokens[got.source.clamp(min=0)] * (got.source >= 0)[:, None]
        own = alone.x[alone.source[0].clamp(min=0)] * (alone.source[0] >= 0)[:, None]
        assert torch.equal(grid, own)
    torch.testing.assert_close(merged.serve(sent), expected)
    if split == 4:
        with pytest.raises(ValueError, match="came without a source map"):
            merged.serve(replace(sent, source=None))


def test_a_head_that_pools_nothing_needs_a_decoder():
    bare = timm.models.VisionTransformer(**{**GEOMETRY, "global_pool": ""})
    with pytest.raises(TypeError, match="global_pool='' is not supported"):
        tokmerge.patch(bare, None)
