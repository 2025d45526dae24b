import re

import pytest
import torch
from PIL import Image
from tokmerge import embedded, llava, questions, scenes, vqa

GEOMETRY = {
    "image_size": 32, "patch_size": 8, "width": 24, "depth": 3, "heads": 2, "text_width": 16, "text_depth": 2,
    "text_heads": 2,
}  # fmt: skip


def test_build_has_the_geometry_asked_for():
    model = embedded.build(GEOMETRY, ["a", "b"]).eval()
    merged = llava.patch(model, None)
    assert merged.tower.n_features == 16
    assert merged.tower.depth == 2, "features are the last hidden state but one"
    assert model.lm_head.weight.shape == (len(embedded.SPECIAL) + 2, 16)
    assert len(model.model.language_model.layers) == 2


def test_processor_and_model_agree_on_every_token():
    vocabulary = embedded.words(["what is it?", "red"])
    model, processor = embedded.build(GEOMETRY, vocabulary), embedded.processor(GEOMETRY, vocabulary)
    ids = processor.tokenizer(embedded.TEMPLATE.format(question="what is it?"))["input_ids"]
    assert ids[0] == embedded.IMAGE == model.config.image_token_id
    assert embedded.UNKNOWN not in ids
    assert [([*embedded.SPECIAL, *vocabulary])[i] for i in ids[1:]] == ["what", "is", "it", "?"]
    assert processor.tokenizer("purple")["input_ids"] == [embedded.UNKNOWN]
    assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id == embedded.END
    white = processor.image_processor(images=[Image.new("RGB", (40, 40), "white")], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(white, torch.ones(1, 3, 32, 32))


@pytest.mark.parametrize("name", embedded.NAMES)
def test_shipped_weights_match_their_card_and_answer(name):
    model, processor = embedded.load(name)
    card = embedded.card(name)
    assert not model.training
    assert sum(parameter.numel() for parameter in model.parameters()) == card["parameters"]
    assert card["test_accuracy"] >= {"easy-vqa-llava": 0.97, "scenes-llava": 0.85}[name]
    if name == "easy-vqa-llava":
        asked, least = questions.subset(questions.easy_vqa("test"), range(60)), 0.95
    else:
        asked, least = scenes.load("test", 20, source="sample").questions, 0.85
    table = vqa.run(llava.patch(model, None), processor, asked, template=embedded.TEMPLATE, max_new_tokens=3)
    assert table.accuracy.mean() >= least


def test_unknown_and_damaged_models_are_named(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="no model 'clip'"):
        embedded.load("clip")
    stem = embedded.NAMES["scenes-llava"]
    for suffix in (".json", ".safetensors"):
        content = (embedded.paths.ASSETS / f"{stem}{suffix}").read_bytes()
        (tmp_path / f"{stem}{suffix}").write_bytes(content if suffix == ".json" else content[:-1])
    monkeypatch.setattr(embedded.paths, "ASSETS", tmp_path)
    named = re.escape(str(tmp_path / f"{stem}.safetensors"))
    with pytest.raises(ValueError, match=rf"does not match its card.*git checkout -- {named}`"):
        embedded.load("scenes-llava")
