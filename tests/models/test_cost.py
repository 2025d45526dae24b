import pytest
import timm
import tokmerge
import torch
from checks import counted_macs
from tokmerge.models.cost import LanguageCost, ViTCost


@pytest.mark.parametrize(
    ("policy", "above"),
    [
        (None, 0.01),
        # torch sees matrix products only; normalising and averaging come on top.
        (tokmerge.TopR(9), 0.02),
        (tokmerge.PiToMe(9), 0.02),
        (tokmerge.Threshold([-1.0, 1.0, -1.0, 1.0]), 0.02),
    ],
)
def test_macs_are_what_torch_counts(any_model, images, policy, above):
    merged = tokmerge.patch(any_model, policy)
    macs = merged(images[:1])[1].macs.item()
    counted = counted_macs(lambda: (merged if policy else any_model)(images[:1]))
    assert counted <= macs <= (1 + above) * counted


def test_deit_small_has_the_published_cost():
    with torch.device("meta"):
        cost = tokmerge.patch(timm.create_model("deit_small_patch16_224"), None).cost((3, 224, 224))
    assert cost.total(torch.full((1, 13), 197)).item() / 1e9 == pytest.approx(4.6, abs=0.05)


def test_block_cost_by_hand():
    of_blocks = {"attn_linear": (10, 10), "mlp_linear": (20, 20), "attn_dim": 4, "head_dim": 2, "embed_dim": 4}
    cost = ViTCost(embed=1000, **of_blocks, protected=1, head=7)
    tokens = torch.tensor([[5, 3, 3]])
    plain = [5 * 10 + 2 * 25 * 4 + 3 * 20, 3 * 10 + 2 * 9 * 4 + 3 * 20]
    assert cost.blocks(tokens).tolist() == [plain]
    assert cost.total(tokens).item() == 1000 + sum(plain) + 7
    # First layer: 4 free tokens, 2 x 2 similarities of width 2; metric of 5 tokens; 5 + 3 tokens averaged.
    overhead = 2 * 2 * 2 + 5 * (4 + 2 * 2) + (5 + 3) * 4
    assert cost.blocks(tokens, tokmerge.TopR([2, 0])).tolist() == [[plain[0] + overhead, plain[1]]]
    # The tokens themselves are 4 wide and have no heads; in a layer where nothing merges nothing is averaged.
    overhead = torch.tensor([2 * 2 * 4 + 5 * 2 * 4 + (5 + 3) * 4, 1 * 1 * 4 + 3 * 2 * 4])
    assert torch.equal(cost.blocks(tokens, tokmerge.Threshold(0.9)), torch.tensor([plain]) + overhead)


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
