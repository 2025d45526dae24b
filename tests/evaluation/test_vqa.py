import json
import re

import pandas as pd
import pytest
import tiny
import torch
from PIL import Image
from tokmerge import TopR
from tokmerge.data.questions import Question, select_questions, with_images
from tokmerge.evaluation import vqa
from tokmerge.evaluation.vqa import accuracy, normalise
from tokmerge.models import llava

# What the model is asked here: three images, seven questions.
TRUTH = {"0": "red", "1": "blue", "2": "green"}


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
        ("2:30", "2:30"),
        ("it's", "it's"),
        ("50%", "50%"),
        ("$5 & #1", "$5 & #1"),
        # A comma between digits goes, and with it every other mark, all without a space.
        ("1,000", "1000"),
        ("1,000-2,000", "10002000"),
        ("1,000 red/blue", "1000 redblue"),
        ("1, 000", "1 000"),
        # A period stays before a digit only; what stands before it does not matter.
        ("3.5", "3.5"),
        (".5", ".5"),
        ("3.", "3"),
        ("u.s.a.", "usa"),
        ("mt.5", "mt.5"),
        # At most 32 of them go.
        ("x" + "." * 34, "x.."),
        # Numbers in words, up to ten.
        ("None", "0"),
        ("zero", "0"),
        ("one two three four five six seven eight nine ten", "1 2 3 4 5 6 7 8 9 10"),
        ("eleven", "eleven"),
        ("twenty-one", "twenty 1"),
        # Articles, in any case; not inside a word.
        ("A dog and an owl on the table", "dog and owl on table"),
        ("anthem", "anthem"),
        ("the", ""),
        # Apostrophes are put back, one missing at a time.
        ("dont", "don't"),
        ("Dont", "don't"),
        ("dontt", "dontt"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("couldntve", "couldntve"),
        ("twas", "'twas"),
        ("oclock", "o'clock"),
        ("'ows'at", "'ow's'at"),
        ("yall'd've", "y'all'd've"),
        ("somebodys", "somebody's"),
        ("somebody'd", "somebodyd"),
        # Not on the list, because each is a word of its own.
        ("its", "its"),
        ("well", "well"),
        ("id", "id"),
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
    ("n", "expected"),
    # n of ten said so. Left out: one of them (n times), or another (10 - n times).
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0)],
)
def test_leave_one_out(n, expected):
    assert accuracy(
        "cat", ["cat"] * n + ["dog"] * 5 + [f"other {i}" for i in range(5 - n)] if n < 5 else ["cat"] * n + ["dog"]
    ) == pytest.approx(expected)


def test_answers_are_normalised_where_annotators_differ():
    truth = ["2", "two", "Two.", *["3"] * 7]
    assert accuracy("The two", truth) == pytest.approx(0.9)
    assert accuracy("3!", truth) == 1.0


def test_answers_are_left_alone_where_all_annotators_agree():
    assert accuracy("t-shirt", ["t-shirt"] * 10) == 1.0
    assert accuracy(" t-shirt\n", ["t-shirt"] * 10) == 1.0
    assert accuracy("yes!", ["yes"] * 10) == 0.0
    assert accuracy("Yes", ["yes"] * 10) == 0.0
    # White space is no difference between annotators.
    assert accuracy("The\tend", ["The end", "The end ", "The\nend", *["The end"] * 7]) == 1.0


def test_one_answer_stands_for_ten_that_agree():
    assert accuracy("circle", ["circle"]) == accuracy("circle", ["circle"] * 10) == 1.0
    assert accuracy("square", ["circle"]) == accuracy("square", ["circle"] * 10) == 0.0
    with pytest.raises(ValueError, match="cannot be scored"):
        accuracy("circle", [])


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
    summary = vqa.summarise_answers(table)
    assert summary == pytest.approx(
        {
            "n_questions": 4,
            "accuracy": (1 + 0 + 0.6 + 1) / 4,
            "accuracy.yes/no": 0.5,
            "accuracy.number": 0.6,
            "accuracy.other": 1.0,
        }
    )
    hidden = vqa.score([question(1, "0", "")], ["red"])
    assert hidden.accuracy.isna().all()
    with pytest.raises(ValueError, match="1 of 1 answers have no score"):
        vqa.summarise_answers(hidden)
    with pytest.raises(ValueError, match="0 of 0 answers"):
        vqa.summarise_answers(vqa.score([], []))


def test_result_file_is_the_challenges(tmp_path):
    table = vqa.score(
        [
            question(
                262148000,
                "0",
                "",
            ),
            question(1, "0", ""),
        ],
        ["down", 'say "é"'],
    )
    vqa.save_results(table, tmp_path / "out" / "vqa.json")
    content = json.loads((tmp_path / "out" / "vqa.json").read_text())
    assert content == [{"question_id": 262148000, "answer": "down"}, {"question_id": 1, "answer": 'say "é"'}]
    with pytest.raises(ValueError, match="question 1 is answered twice"):
        vqa.save_results(pd.concat([table, table[1:]]), tmp_path / "twice.json")
    assert not (tmp_path / "twice.json").exists()


@pytest.fixture
def asked():
    """Seven questions about three images, neighbours share an image."""
    colors = {"0": (200, 30, 30), "1": (30, 30, 200), "2": (30, 200, 30)}

    def image(identifier):
        canvas = Image.effect_noise((40, 40), 60 * int(identifier)).convert("RGB")
        canvas.paste(colors[identifier], (0, 0, 20, 40))
        return canvas

    photos = {i: image(i) for i in colors}
    owners = ["0", "0", "1", "1", "1", "2", "2"]
    questions = [question(10 + i, owner, "other", TRUTH[owner]) for i, owner in enumerate(owners)]
    return with_images("toy", "test", questions, photos.__getitem__)


@pytest.fixture
def machine(asked):
    """A LLaVA that knows the words of the questions, and its processor."""
    template = "USER : <image> {question} ASSISTANT :"
    texts = [template.format(question=q.text) for q in asked.questions]
    return tiny.llava(), tiny.processor([*texts, *TRUTH.values()]), template


def test_run_gives_every_answer_as_if_asked_alone(asked, machine):
    model, processor, template = machine
    merged = llava.patch(model, TopR(6), positions="first")
    options = {"template": template, "max_new_tokens": 4}
    whole = vqa.answer_questions(merged, processor, asked, batch_size=4, **options)
    assert whole.question_id.tolist() == list(range(10, 17))
    single = vqa.answer_questions(merged, processor, asked, batch_size=1, **options)
    pd.testing.assert_frame_equal(whole, single)
    rest = vqa.answer_questions(merged, processor, select_questions(asked, [5, 6]), batch_size=3, **options)
    pd.testing.assert_frame_equal(rest, whole[5:].reset_index(drop=True))
    assert (whole.macs == whole.vision_macs + whole.projector_macs + whole.prefill_macs + whole.decode_macs).all()
    assert (whole.tokens == 40).all()
    assert vqa.summarise_answers(whole)["payload_bytes"] == whole.payload_bytes.mean()

    # Answers, scored by hand: what the model says for the second question.
    pixels = processor.image_processor(images=[asked.image("0")], return_tensors="pt")["pixel_values"]
    ids = processor.tokenizer([template.format(question=asked.questions[1].text)], return_tensors="pt")["input_ids"]
    new, record = merged.generate(ids, pixels, max_new_tokens=4)
    assert processor.tokenizer.decode(new[0], skip_special_tokens=True) == whole.answer[1]
    assert record.macs[0] == whole.macs[1]
    assert record.payload_bytes[0] == whole.payload_bytes[1]


def test_run_looks_at_an_image_once_per_batch(asked, machine, monkeypatch):
    model, processor, template = machine
    merged = llava.patch(model, None)
    looked = []
    whole = merged.tower.forward
    monkeypatch.setattr(
        merged.tower, "forward", lambda images, **k: (looked.append(len(images)), whole(images, **k))[1]
    )
    vqa.answer_questions(merged, processor, asked, template=template, batch_size=4, max_new_tokens=1)
    assert looked == [2, 2]


def test_unmerged_run_says_what_the_unpatched_model_says(asked, machine):
    model, processor, template = machine
    table = vqa.answer_questions(
        llava.patch(model, None), processor, asked, template=template, batch_size=8, max_new_tokens=4
    )
    texts = [template.format(question=q.text) for q in asked.questions]
    photos = [asked.image(q.image_id) for q in asked.questions]
    batch = processor(images=photos, text=texts, padding=True, return_tensors="pt")
    out = model.generate(**batch, max_new_tokens=4, do_sample=False)[:, batch["input_ids"].shape[1] :]
    assert table.answer.tolist() == [processor.tokenizer.decode(row, skip_special_tokens=True) for row in out]


def test_answers_may_be_normalised_before_scoring(asked, machine, monkeypatch):
    model, processor, template = machine
    monkeypatch.setattr(processor.tokenizer, "decode", lambda ids, **_: "Red.")
    merged = llava.patch(model, None)
    options = {"template": template, "max_new_tokens": 1}
    assert vqa.answer_questions(merged, processor, asked, **options).accuracy.sum() == 0
    table = vqa.answer_questions(merged, processor, asked, normalised=True, **options)
    assert table.answer[0] == "red"
    assert table.accuracy.sum() == 2


def test_no_questions_are_an_empty_table(asked, machine):
    model, processor, template = machine
    table = vqa.answer_questions(llava.patch(model, None), processor, select_questions(asked, []), template=template)
    assert list(table) == list(vqa.score([], []))
    assert len(table) == 0


def test_gradients_are_off(asked, machine):
    model, processor, template = machine
    with torch.enable_grad():
        vqa.answer_questions(
            llava.patch(model.requires_grad_(), None), processor, asked, template=template, max_new_tokens=1
        )
    assert all(parameter.grad is None for parameter in model.parameters())
