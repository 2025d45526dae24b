"""What is bypassed is refused, and state goes where modules go."""

import pytest
import tiny
import tokmerge
import torch
from conftest import build
from timm.models.vision_transformer import VisionTransformer
from tokmerge.models import llava, vision_tower
from torch import nn

WRAPPED = [tokmerge.patch(build(), None), vision_tower.patch_tower(tiny.tower(), None), llava.patch(tiny.llava(), None)]


@pytest.mark.parametrize("merged", WRAPPED, ids=lambda merged: type(merged).__name__)
def test_state_travels_under_the_models_own_names_wherever_the_wrapper_is(merged):
    own = merged.model.state_dict()
    for outer, prefix in ((merged, ""), (nn.Sequential(merged), "0."), (nn.DataParallel(merged), "module.")):
        state = outer.state_dict()
        assert list(state) == [prefix + name for name in own]
        changed = {name: torch.zeros_like(value) for name, value in state.items()}
        assert str(outer.load_state_dict(changed)) == "<All keys matched successfully>"
        assert all((value == 0).all() for value in merged.model.state_dict().values())
        outer.load_state_dict(state)
    both = nn.ModuleDict({"first": merged, "second": nn.Linear(2, 2)})
    assert str(both.load_state_dict(both.state_dict())) == "<All keys matched successfully>"


def hook(*_):
    raise AssertionError("nobody runs this")


@pytest.mark.parametrize("where", ["", "blocks", "blocks.1", "blocks.2.attn", "blocks.0.attn.attn_drop"])
@pytest.mark.parametrize("how", ["forward_hook", "forward_pre_hook", "full_backward_hook", "own"])
def test_a_hook_or_forward_that_would_not_run_is_refused(images, where, how):
    model = build()
    merged, module = tokmerge.patch(model, None), model.get_submodule(where)
    if how == "own":
        module.forward = hook
    else:
        getattr(module, f"register_{how}")(hook)
    with pytest.raises(RuntimeError, match=f"{where or 'the model'} has a hook or a forward of its own"):
        merged(images)


def test_hooks_on_what_is_called_run_once_and_counting_runs_none(images):
    model, calls = build(), []
    for name in ("blocks.1.mlp", "patch_embed", "patch_embed.proj", "head"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    tokmerge.patch(model, tokmerge.TopR(3))(images)[1].macs.sum()
    assert sorted(calls) == ["blocks.1.mlp", "head", "patch_embed", "patch_embed.proj"]


def test_training_of_the_model_inside_is_noticed(images):
    model = build()
    merged = tokmerge.patch(model, None)
    for module in (model, model.blocks[2]):
        module.train()
        with pytest.raises(RuntimeError, match=r"call \.eval\(\) first"):
            merged(images)
        merged.eval()
    merged(images)


class Other(VisionTransformer):
    def forward_features(self, x, attn_mask=None):
        return super().forward_features(x) + 1


def test_an_overridden_forward_is_refused():
    with pytest.raises(TypeError, match=r"Other\.forward_features is not VisionTransformer's own"):
        tokmerge.patch(Other(img_size=32, patch_size=4, embed_dim=48, depth=1, num_heads=3), None)
    model = build("no_cls_avg")
    model.forward_head = lambda x: x
    with pytest.raises(TypeError, match="forward_head is not VisionTransformer's"):
        tokmerge.patch(model, None)


def test_a_new_head_costs_what_it_costs(images):
    model = build()
    merged = tokmerge.patch(model, None)
    before = merged(images)[1].macs
    model.reset_classifier(1000)
    model.eval()
    assert (merged(images)[1].macs - before == (1000 - 10) * 48).all()


class LowRank(nn.Module):
    """As adapters wrap a layer."""

    def __init__(self, base):
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(48, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def test_adapters_are_counted_and_what_cannot_be_counted_is_refused(images):
    model = build()
    plain = tokmerge.patch(model, None)(images)[1].macs
    model.blocks[1].attn.qkv = LowRank(model.blocks[1].attn.qkv).eval()
    merged = tokmerge.patch(model, None)
    assert (merged(images)[1].macs - plain == 65 * (48 * 2 + 2 * 144)).all()
    torch.testing.assert_close(merged(images)[0], model(images), atol=1e-5, rtol=0)
    model.blocks[0].mlp.fc1 = nn.Conv1d(1, 1, 1)
    with pytest.raises(TypeError, match=r"cost of mlp\.fc1, a Conv1d, is not known"):
        tokmerge.patch(model, None)


def test_a_class_is_no_policy_and_no_model():
    with pytest.raises(TypeError, match="policy is the class Threshold: use a policy such as"):
        tokmerge.patch(build(), tokmerge.Threshold)
    with pytest.raises(TypeError, match="cannot merge tokens in the class VisionTransformer"):
        tokmerge.patch(VisionTransformer, None)


def test_an_empty_batch_gives_empty_results():
    for kind in ("cls", "no_cls_avg", "max", "map"):
        model = build(kind)
        logits, record = tokmerge.patch(model, tokmerge.Threshold(0.5))(torch.empty(0, 3, 32, 32))
        assert logits.shape == model(torch.empty(0, 3, 32, 32)).shape
        assert (record.tokens.shape, record.macs.shape, record.payload_bytes.shape) == ((0, 5), (0,), (0,))
