import json
import re

import numpy as np
import pandas as pd
import pytest
import tiny
from PIL import Image
from tokmerge import TopR
from tokmerge.data.questions import Question, select_questions, with_images
from tokmerge.evaluation import vqa
from tokmerge.evaluation.vqa import accuracy, normalise
from tokmerge.models import llava, vision_tower

# What the model is asked here: three images, seven questions.
TRUTH = {"0": "red", "1": "blue", "2": "green"}
TEMPLATE = "USER : <image> {question} ASSISTANT :"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        # Punctuation between two letters leaves a space, beside a space it goes.
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("t-shirt", "t shirt"),
        ("wow!", "wow"),
        ("red, white", "red white"),
        ("red,white", "red white"),
        # The first mark stands beside a space, the second does not: each is judged by the answer as it was.
        ("a-b, c", "b c"),
        ("x-y -z", "xy z"),
        # Every mark of the list.
        *((f"x{mark}y", "x y") for mark in ';/[]"{}()=+\\_-><@`,?!'),
        # Marks that are not on it stay: 2:30 is a time, it's a contraction.
        ("2:30 it's 50% $5 & #1", "2:30 it's 50% $5 & #1"),
        # A comma between digits goes, and with it every other mark, all without a space.
        ("1,000", "1000"),
        ("1,000-2,000", "10002000"),
        ("1,000 red/blue", "1000 redblue"),
        ("1, 000", "1 000"),
        # A period stays before a digit only; what stands before it does not matter. At most 32 of them go.
        ("3.5 .5 3. u.s.a. mt.5", "3.5 .5 3 usa mt.5"),
        ("x" + "." * 34, "x.."),
        # Numbers in words, up to ten.
        ("None zero one two three four five six seven eight nine ten", "0 0 1 2 3 4 5 6 7 8 9 10"),
        ("eleven twenty-one", "eleven twenty 1"),
        # Articles, in any case; not inside a word.
        ("A dog and an owl on the table anthem", "dog and owl on table anthem"),
        ("the", ""),
        # Apostrophes are put back, one missing at a time.
        ("dont Dont couldnt've couldn'tve twas oclock", "don't don't couldn't've couldn't've 'twas o'clock"),
        ("'ows'at yall'd've somebodys somebody'd", "'ow's'at y'all'd've somebody's somebodyd"),
        ("dontt couldntve", "dontt couldntve"),
        # Not on the list, because each is a word of its own.
        ("its well id", "its well id"),
        # White space.
        ("  two \n\t dogs ", "2 dogs"),
        ("", ""),
    ],
)
def test_normalisation(answer, expected):
    assert normalise(answer) == expected


def test_contractions_are_the_evaluators():
    # 120 entries, less two that change nothing (let's, she's) and four with capitals, which never match.
    assert len(vqa.CONTRACTIONS) == 114
    assert all(re.sub("'", "", key) == re.sub("'", "", form) for key, form in vqa.CONTRACTIONS.items())


@pytest.mark.parametrize(
    ("answer", "truth", "expected"),
    [
        # n of ten said so. Left out: one of them (n times), or another (10 - n times).
        *(("cat", ["cat"] * n + list("abcde") + ["dog"] * (5 - n), 0.3 * n) for n in range(4)),
        ("cat", ["cat"] * 4 + ["dog"] * 6, 1.0),
        ("cat", ["cat"] * 9 + ["dog"], 1.0),
        # Answers are normalised where annotators differ.
        ("The two", ["2", "two", "Two.", *["3"] * 7], 0.9),
        ("3!", ["2", "two", "Two.", *["3"] * 7], 1.0),
        # And left alone where all agree.
        ("t-shirt", ["t-shirt"] * 10, 1.0),
        (" t-shirt\n", ["t-shirt"] * 10, 1.0),
        ("yes!", ["yes"] * 10, 0.0),
        ("Yes", ["yes"] * 10, 0.0),
        # White space is no difference between annotators.
        ("The\tend", ["The end", "The end ", "The\nend", *["The end"] * 7], 1.0),
        # One answer stands for ten that agree.
        *(("circle", ["circle"] * n, 1.0) for n in (1, 10)),
        *(("square", ["circle"] * n, 0.0) for n in (1, 10)),
    ],
)
def test_accuracy_is_the_evaluators(answer, truth, expected):
    assert accuracy(answer, truth) == pytest.approx(expected)


def question(i, image, answer_type, *answers):
    return Question(i, image, f"what color is shape {i}?", answers, answer_type, "color")


def test_breakdown_by_answer_type():
    asked = [
        question(7, "0", "yes/no", "yes"),
        question(8, "0", "yes/no", "no"),
        question(9, "1", "number", *["2"] * 2, *["3"] * 8),
        question(5, "2", "other", "red"),
    ]
    table = vqa.score(asked, ["yes", "yes", "two", "red"])
    assert table.question_id.tolist() == [7, 8, 9, 5]
    assert table.image_id.tolist() == ["0", "0", "1", "2"]
    by_type = {"accuracy.yes/no": 0.5, "accuracy.number": 0.6, "accuracy.other": 1.0}
    expected = {"n_questions": 4, "accuracy": (1 + 0 + 0.6 + 1) / 4, **by_type}
    assert vqa.summarise_answers(table) == pytest.approx(expected)


def test_what_has_no_answers_is_not_scored():
    hidden = vqa.score([question(1, "0", "")], ["red"])
    assert hidden.accuracy.isna().all()
    for call, message in (
        (lambda: accuracy("circle", []), "cannot be scored"),
        (lambda: vqa.summarise_answers(hidden), "1 of 1 answers have no score"),
        (lambda: vqa.summarise_answers(vqa.score([], [])), "0 of 0 answers"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_result_file_is_the_challenges(tmp_path):
    table = vqa.score([question(262148000, "0", ""), question(1, "0", "")], ["down", 'say "é"'])
    vqa.save_results(table, tmp_path / "out" / "vqa.json")
    content = json.loads((tmp_path / "out" / "vqa.json").read_text())
    assert content == [{"question_id": 262148000, "answer": "down"}, {"question_id": 1, "answer": 'say "é"'}]
    with pytest.raises(ValueError, match="question 1 is answered twice"):
        vqa.save_results(pd.concat([table, table[1:]]), tmp_path / "twice.json")
    assert not (tmp_path / "twice.json").exists()


@pytest.fixture
def asked():
    """Seven questions about three images, neighbours share an image."""
    noise = np.random.default_rng(0)
    photos = {i: Image.fromarray(noise.integers(0, 256, (40, 40, 3), np.uint8)) for i in TRUTH}
    questions = [question(10 + i, owner, "other", TRUTH[owner]) for i, owner in enumerate("0011122")]
    return with_images("toy", "test", questions, photos.__getitem__)


@pytest.fixture
def machine(asked):
    """A LLaVA that knows the words of the questions, and its processor."""
    return tiny.llava(), tiny.processor([*(prompt(question) for question in asked.questions), *TRUTH.values()])


def prompt(question):
    return TEMPLATE.format(question=question.text)


def answer(machine, asked, policy=None, max_new_tokens=4, **options):
    model, processor = machine
    merged = llava.patch(model, policy, positions="first")
    return vqa.answer_questions(merged, processor, asked, template=TEMPLATE, max_new_tokens=max_new_tokens, **options)


def test_run_gives_every_answer_as_if_asked_alone(asked, machine):
    whole = answer(machine, asked, TopR(6), batch_size=4)
    assert whole.question_id.tolist() == list(range(10, 17))
    pd.testing.assert_frame_equal(whole, answer(machine, asked, TopR(6), batch_size=1))
    rest = answer(machine, select_questions(asked, [5, 6]), TopR(6), batch_size=3)
    pd.testing.assert_frame_equal(rest, whole[5:].reset_index(drop=True))
    assert (whole.macs == whole.vision_macs + whole.projector_macs + whole.prefill_macs + whole.decode_macs).all()
    assert (whole.tokens == 40).all()
    assert vqa.summarise_answers(whole)["payload_bytes"] == whole.payload_bytes.mean()

    # By hand: what the model says to the second question, and what that takes.
    model, processor = machine
    pixels = processor.image_processor(images=[asked.image("0")], return_tensors="pt")["pixel_values"]
    ids = processor.tokenizer([prompt(asked.questions[1])], return_tensors="pt")["input_ids"]
    new, record = llava.patch(model, TopR(6), positions="first").generate(ids, pixels, max_new_tokens=4)
    text = processor.tokenizer.decode(new[0], skip_special_tokens=True)
    assert (text, record.macs[0], record.payload_bytes[0]) == (whole.answer[1], whole.macs[1], whole.payload_bytes[1])


def test_run_looks_at_an_image_once_per_batch(asked, machine, monkeypatch):
    looked, real = [], vision_tower.MergedTower.forward
    monkeypatch.setattr(
        vision_tower.MergedTower, "forward", lambda self, x, **k: looked.append(len(x)) or real(self, x, **k)
    )
    answer(machine, asked, batch_size=4)
    assert looked == [2, 2]


def test_gradients_are_off(asked, machine):
    model, processor = machine
    (batch,) = vqa.question_batches(processor, asked, TEMPLATE, 8)
    _, record = vqa.answer_batch(llava.patch(model.requires_grad_(), None), processor, batch, 4)
    assert not record.scores.requires_grad


def test_unmerged_run_says_what_the_unpatched_model_says(asked, machine):
    (model, processor), table = machine, answer(machine, asked, batch_size=8)
    photos = [asked.image(q.image_id) for q in asked.questions]
    batch = processor(images=photos, text=[prompt(q) for q in asked.questions], padding=True, return_tensors="pt")
    out = model.generate(**batch, max_new_tokens=4, do_sample=False)[:, batch["input_ids"].shape[1] :]
    assert table.answer.tolist() == [processor.tokenizer.decode(row, skip_special_tokens=True) for row in out]


def test_answers_may_be_normalised_before_scoring(asked, machine, monkeypatch):
    monkeypatch.setattr(machine[1].tokenizer, "decode", lambda ids, **_: "Red.")
    assert answer(machine, asked).accuracy.sum() == 0
    table = answer(machine, asked, normalised=True)
    assert table.answer[0] == "red"
    assert table.accuracy.sum() == 2


def test_no_questions_are_an_empty_table(asked, machine):
    table = answer(machine, select_questions(asked, []))
    assert list(table) == list(vqa.score([], []))
    assert len(table) == 0


def test_the_prompt_is_the_models_own():
    assert vqa.prompt_template(tiny.processor(["red"])) == vqa.LLAVA_TEMPLATE
    processor = tiny.processor(["red"])
    processor.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }} {% for c in m.content %}"
        "{{ '<image>' if c.type == 'image' else c.text }}{% endfor %}<|im_end|>{% endfor %}{a}<|im_start|>assistant"
    )
    said = vqa.prompt_template(processor).format(question="is it {red}?")
    assert said == f"<|im_start|>user <image>is it {{red}}?\n{vqa.SHORT}<|im_end|>{{a}}<|im_start|>assistant"
