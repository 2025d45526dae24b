"""What holds of every patched model, whatever its kind."""

import copy

import tokmerge
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def counted_macs(function):
    """What torch counts with attention in plain matrix products, two operations per MAC."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops() / 2


def rows(found):
    """What each image got: its class scores or its tokens."""
    return found if isinstance(found, torch.Tensor) else found.split()


def equals_plain(merged, images, plain):
    """Values, token counts and groups of every image are those of ``plain(image)``, see `reference.run`."""
    # In double precision: random weights amplify single-precision rounding from layer to layer.
    images = images.double()
    found, record = merged.double()(images, source=True)
    for i, image in enumerate(images):
        expected, counts, sizes, groups = plain(image)
        assert record.tokens[i].tolist() == counts
        torch.testing.assert_close(rows(found)[i], expected, atol=1e-6, rtol=1e-6)
        source = record.source[i].tolist()
        assert [{place for place, token in enumerate(source) if token == t} for t in range(len(groups))] == groups
        if getattr(found, "sizes", None) is not None:
            assert found.sizes.split(found.layout.counts)[i].tolist() == sizes
    return record


def equals_alone(merged, images):
    """Every image gets in a batch what it gets alone, and takes as much."""
    found, record = merged(images)
    for i, image in enumerate(images):
        alone, own = merged(image[None])
        torch.testing.assert_close(rows(alone)[0], rows(found)[i], atol=1e-5, rtol=0)
        for name in ("tokens", "macs", "edge_macs", "payload_bytes"):
            assert torch.equal(getattr(own, name, own.macs)[0], getattr(record, name, record.macs)[i]), name
    return record


def leaves_model_alone(model, patch, run):
    """Neither patching, running nor patching again changes the model's class, its methods or its weights."""
    kind, before, names = type(model), copy.deepcopy(model.state_dict()), set(vars(model))
    merged = patch(model)
    run(merged)
    assert (type(model), set(vars(model))) == (kind, names)
    assert merged.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert set(merged.parameters()) == set(model.parameters())
    assert merged.load_state_dict(before).missing_keys == []
    assert tokmerge.unpatch(merged) is tokmerge.unpatch(patch(merged)) is model
