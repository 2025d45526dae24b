import pytest
import tokmerge
import torch
from conftest import build
from tokmerge.models.cost import LanguageCost, ViTCost, module_macs
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def counted_macs(function):
    """What torch counts with attention in plain matrix products, two operations per MAC."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops() / 2


def test_unmerged_macs_are_what_torch_counts(any_model, images):
    record = tokmerge.patch(any_model, None)(images[:1])[1]
    assert record.macs.item() == pytest.approx(counted_macs(lambda: any_model(images[:1])), rel=0.01)


@pytest.mark.parametrize("policy", [tokmerge.TopR(9), tokmerge.PiToMe(9), tokmerge.Threshold([-1.0, 1.0, -1.0, 1.0])])
def test_merged_macs_are_what_torch_counts(any_model, images, policy):
    merged = tokmerge.patch(any_model, policy)
    macs = merged(images[:1])[1].macs.item()
    counted = counted_macs(lambda: merged(images[:1]))
    # torch sees matrix products only; normalising and averaging come on top.
    assert counted <= macs <= 1.02 * counted


def test_deit_small_has_the_published_cost():
    import timm

    with torch.device("meta"):
        model = timm.create_model("deit_small_patch16_224")
    cost = ViTCost.of(model, (3, 224, 224))
    total = cost.total(torch.full((1, 13), 197)).item()
    assert total / 1e9 == pytest.approx(4.6, abs=0.05)


def test_block_cost_by_hand():
    cost = ViTCost(
        embed=1000,
        attn_linear=(10, 10),
        mlp_linear=(20, 20),
        attn_dim=4,
        head_dim=2,
        embed_dim=4,
        pool_per_token=0,
        head=7,
        protected=1,
    )
    tokens = torch.tensor([[5, 3, 3]])
    plain = [5 * 10 + 2 * 25 * 4 + 3 * 20, 3 * 10 + 2 * 9 * 4 + 3 * 20]
    assert cost.blocks(tokens).tolist() == [plain]
    assert cost.total(tokens).item() == 1000 + sum(plain) + 7
    # First layer: 4 free tokens, 2 x 2 similarities of width 2; metric of 5 tokens; 5 + 3 tokens averaged.
    overhead = 2 * 2 * 2 + 5 * (4 + 2 * 2) + (5 + 3) * 4
    assert cost.blocks(tokens, tokmerge.TopR([2, 0])).tolist() == [[plain[0] + overhead, plain[1]]]


def test_images_are_counted_one_by_one(model, images):
    merged = tokmerge.patch(model, tokmerge.Threshold(0.9))
    together = merged(images)[1].macs
    assert together.tolist() == [merged(image[None])[1].macs.item() for image in images]
    assert len(set(together.tolist())) > 1


def test_convolutional_stem_is_counted():
    stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 8, 1))
    assert module_macs(stem, 1, 1, 6, 6) == 36 * (9 * 4 + 4 * 8)


def test_counting_leaves_the_model_where_it_is():
    model = build()
    ViTCost.of(model, (3, 32, 32))
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def test_language_cost_by_hand():
    cost = LanguageCost(linear=100, attn_dim=6, head=40, depth=3)
    prompt, generated = torch.tensor([10, 10, 10, 3]), torch.tensor([0, 1, 3, 2])
    ten, three = 10 * 100 + 2 * 6 * 100, 3 * 100 + 2 * 6 * 9
    assert cost.prefill(prompt, prompt, 0).tolist() == [3 * ten + 40] * 3 + [3 * three + 40]
    # Three tokens take two passes, over 11 and 12 tokens; the first token comes with the prefill.
    two = 2 * (3 * 100 + 40) + 3 * 2 * 6 * (11 + 12)
    assert cost.decode(prompt, prompt, 0, generated).tolist() == [0, 0, two, 3 * 100 + 40 + 3 * 2 * 6 * 4]
    # The last two layers read three tokens only.
    left = torch.full((4,), 3)
    assert cost.prefill(prompt, left, 2).tolist() == [ten + 2 * three + 40] * 3 + [3 * three + 40]
    two = 2 * (3 * 100 + 40) + 2 * 6 * (11 + 12 + 2 * (4 + 5))
    assert cost.decode(prompt, left, 2, generated).tolist()[2] == two
