import pytest
import torch
from PIL import Image
from tiny import GEOMETRY
from tokmerge.data import questions, scenes
from tokmerge.data.easy_vqa import load_easy_vqa
from tokmerge.evaluation import vqa
from tokmerge.models import llava, tiny_llava


def test_processor_and_model_agree_on_every_token():
    vocabulary = tiny_llava.words(["what is it?", "red"])
    model, processor = tiny_llava.build_tiny_llava(GEOMETRY, vocabulary), tiny_llava.processor(GEOMETRY, vocabulary)
    ids = processor.tokenizer(tiny_llava.TINY_TEMPLATE.format(question="what is it?"))["input_ids"]
    assert ids[0] == tiny_llava.IMAGE == model.config.image_token_id
    assert tiny_llava.UNKNOWN not in ids
    assert [([*tiny_llava.SPECIAL, *vocabulary])[i] for i in ids[1:]] == ["what", "is", "it", "?"]
    assert processor.tokenizer("purple")["input_ids"] == [tiny_llava.UNKNOWN]
    assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id == tiny_llava.END
    white = processor.image_processor(images=[Image.new("RGB", (40, 40), "white")], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(white, torch.ones(1, 3, 32, 32))


@pytest.mark.parametrize("name", tiny_llava.TINY_LLAVAS)
def test_shipped_weights_match_their_card_and_answer(name):
    model, processor = tiny_llava.load_tiny_llava(name)
    card = tiny_llava.llava_card(name)
    assert not model.training
    assert sum(parameter.numel() for parameter in model.parameters()) == card["parameters"]
    assert card["test_accuracy"] >= {"easy-vqa-llava": 0.97, "scenes-llava": 0.85}[name.removesuffix("-taught")]
    if name.startswith("easy-vqa"):
        asked, least = questions.select_questions(load_easy_vqa("test"), range(60)), 0.95
    else:
        asked, least = scenes.load_scenes("test", 20, source="sample").questions, 0.85
    table = vqa.answer_questions(
        llava.patch(model, None), processor, asked, template=tiny_llava.TINY_TEMPLATE, max_new_tokens=3
    )
    assert table.accuracy.mean() >= least
