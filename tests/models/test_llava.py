import copy
import dataclasses
from functools import partial

import checks
import pytest
import tiny
import torch
import transformers
from PIL import Image
from tiny import IDS, MASK
from tokmerge import Threshold, TopR, wire
from tokmerge.models import llava
from tokmerge.models.language_model import Pruning
from transformers import MistralConfig, Qwen2Config

POSITIONS = pytest.mark.parametrize("positions", llava.POSITIONS)


def adaptive(model, images, **options):
    """Patched with thresholds that merge about 40 % of every layer's set A."""
    return llava.patch(model, Threshold(tiny.thresholds(model.model.vision_tower, images)), **options)


@pytest.mark.parametrize(
    ("kind", "strategy", "text"),
    [
        *((kind, strategy, None) for kind in tiny.KINDS for strategy in ("default", "full")),
        *(("clip", "default", text) for text in (MistralConfig, Qwen2Config)),
    ],
)
@POSITIONS
@pytest.mark.parametrize("cut", llava.CUTS)
def test_no_policy_is_the_unpatched_model(kind, strategy, text, positions, cut, images):
    model = tiny.llava(kind, strategy, text and text(**tiny.TEXT))
    merged = llava.patch(model, None, positions=positions, cut=cut)
    n = merged.tower.n_features
    assert n == 64 + (kind == "clip") - (strategy == "default")
    ids, mask = tiny.padded(tiny.PROMPTS, repeat=n)
    logits, record = merged(IDS, images, MASK)
    expected = model(input_ids=ids, pixel_values=images, attention_mask=mask).logits
    assert logits.shape == expected.shape
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=0)
    assert record.prompt.tolist() == mask.sum(1).tolist()
    assert record.visual.tolist() == [n] * 5

    new, record = merged.generate(IDS, images, MASK, max_new_tokens=8)
    whole = model.generate(input_ids=ids, pixel_values=images, attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert new.tolist() == whole[:, ids.shape[1] :].tolist()


@POSITIONS
@pytest.mark.parametrize(
    ("kind", "text", "options"),
    [
        *((kind, None, {"output_policy": output}) for kind in tiny.KINDS for output in (None, Threshold(0.5))),
        *(("clip", text, {"pruning": Pruning(1, 0.2), "weights": "size"}) for text in (None, Qwen2Config)),
    ],
)
def test_a_batch_equals_its_samples_alone(kind, text, options, positions, images):
    merged = adaptive(tiny.llava(kind, text=text and text(**tiny.TEXT)), images, positions=positions, **options)
    logits, record = merged(IDS, images, MASK)
    new, answered = merged.generate(IDS, images, MASK, max_new_tokens=6)
    assert len(set(record.visual.tolist())) > 1
    for i, prompt in enumerate(tiny.PROMPTS):
        one = torch.tensor([prompt]), images[i : i + 1]
        alone, _ = merged(*one)
        torch.testing.assert_close(alone[0], logits[i, -alone.shape[1] :], atol=1e-4, rtol=0)
        answer, own = merged.generate(*one, max_new_tokens=6)
        assert answer[0].tolist() == new[i, : answer.shape[1]].tolist()
        torch.testing.assert_close(own.scores[0], answered.scores[i], atol=1e-4, rtol=0)
        for name in ("prompt", "left", "generated", "visual", "prefill_macs", "decode_macs", "macs", "payload_bytes"):
            assert getattr(own, name)[0] == getattr(answered, name)[i], name


def test_generation_with_moved_positions_is_repeated_forward(images):
    merged = adaptive(tiny.llava(), images, positions="first")
    new, _ = merged.generate(torch.tensor([tiny.PROMPTS[0]]), images[1:2], max_new_tokens=5)
    prompt = list(tiny.PROMPTS[0])
    for token in new[0].tolist():
        logits, _ = merged(torch.tensor([prompt]), images[1:2], logits_to_keep=1)
        assert logits.shape == (1, 1, 64)
        assert logits[0, -1].argmax() == token
        prompt.append(token)


@pytest.mark.parametrize("options", [{}, {"positions": "first", "weights": "size"}, {"output_policy": Threshold(0.5)},
                                     {"pruning": Pruning(1, 0.5)}], ids=str)  # fmt: skip
def test_what_questions_have_alike_is_read_once(options, images):
    model = tiny.llava()
    merged = adaptive(model, images, **options)
    asked = [[1, 7, tiny.IMAGE_TOKEN, *question] for question in ([9, 4], [9, 4, 8, 5], [6], [11, 13, 12], [8, 8])]
    (ids, mask), alike = tiny.padded(asked), torch.tensor([7, 7, 3, 7, 3])
    seen, read = merged.encode_images(images[:2]).pick(torch.tensor([0, 0, 1, 0, 1])), []
    model.model.language_model.layers[0].register_forward_hook(
        lambda _, given, out: read.append(given[0][..., 0].numel())
    )
    one_by_one, each = merged.generate(ids, seen, mask, max_new_tokens=6)
    without, read[:] = sum(read), []
    shared, record = merged.generate(ids, seen, mask, max_new_tokens=6, alike=alike)
    assert shared.tolist() == one_by_one.tolist()
    torch.testing.assert_close(record.scores, each.scores, atol=1e-4, rtol=0)
    assert torch.equal(record.macs, each.macs), "each is charged for a look of its own"
    assert (sum(read) == without) == ("pruning" in options)
    if "pruning" not in options:
        assert sum(read) < 0.75 * without
        with pytest.raises(ValueError, match="prompts 1 and 2 are not alike up to the end of their image"):
            merged.generate(ids, seen, mask, max_new_tokens=6, alike=torch.tensor([0, 1, 1, 0, 2]))


def test_what_is_alike_may_differ_by_rounding(images):
    model = tiny.llava()
    merged = adaptive(model, images, cut="tower")
    ids, mask = tiny.padded([[1, 7, tiny.IMAGE_TOKEN, 9, 4], [1, 7, tiny.IMAGE_TOKEN, 6]])
    seen = merged.encode_images(images[:1]).pick(torch.tensor([0, 0]))
    expected = merged.generate(ids, seen, mask, alike=torch.tensor([0, 0]))[0]
    model.model.multi_modal_projector.register_forward_hook(
        lambda _, given, out: out * (1 + 1e-6 * torch.arange(len(out))[:, None])
    )
    assert torch.equal(merged.generate(ids, seen, mask, alike=torch.tensor([0, 0]))[0], expected)
    # Words are told apart beside an image of much larger values.
    model.model.multi_modal_projector.register_forward_hook(lambda _, given, out: 1e6 * out)
    ids[1, 1] = 8
    with pytest.raises(ValueError, match="prompts 0 and 1 are not alike"):
        merged.generate(ids, seen, mask, alike=torch.tensor([0, 0]))


def test_placeholders_may_be_expanded_and_padded_on_either_side(images):
    merged = adaptive(tiny.llava(), images)
    expected = merged(IDS, images, MASK)[0]
    for side, repeat in (("left", 64), ("right", 1), ("right", 64)):
        ids, mask = tiny.padded(tiny.PROMPTS, side, repeat)
        assert torch.equal(merged(ids, images, mask)[0], expected)


def test_an_answer_ends_with_its_end_of_text(images):
    model = tiny.llava()
    answer = partial(adaptive(model, images).generate, IDS, images, MASK, max_new_tokens=6)
    free = answer()[0]
    # The third token of the first answer becomes the end of text: whatever follows it is not counted.
    model.generation_config.eos_token_id = eos = int(free[0, 2])
    record = answer()[1]
    expected = [(row.index(eos) + 1 if eos in row else 6) for row in free.tolist()]
    assert record.generated.tolist() == expected
    assert expected[0] <= 3
    assert ((record.decode_macs > 0) == (record.generated > 1)).all()
    model.generation_config.eos_token_id = None
    assert answer()[1].generated.tolist() == [6] * 5


@pytest.mark.parametrize(("cut", "width"), [("tower", 48), ("projector", 32)])
@pytest.mark.parametrize("precision", wire.PRECISIONS)
@POSITIONS
@pytest.mark.parametrize("weights", llava.WEIGHTS)
def test_payloads_hold_tokens_and_in_one_number_sizes_and_first_patches(
    cut, width, precision, positions, weights, images
):
    merged = adaptive(tiny.llava(), images, cut=cut, precision=precision, positions=positions, weights=weights)
    sent = merged.encode_images(images, source=True)
    for i, payload in enumerate(sent.payloads()):
        received, source = wire.decode(payload), sent.tokens.source[i].tolist()
        assert len(payload) == sent.payload_bytes[i]
        assert received.tokens.shape == (sent.tokens.lengths[i], width)
        size = [source.count(token) if weights == "size" else 1 for token in range(len(received.tokens))]
        first = [source.index(token) if positions == "first" else None for token in range(len(received.tokens))]
        if (positions, weights) == ("consecutive", "one"):
            assert received.sizes is None
        elif positions == "consecutive":
            assert received.sizes.tolist() == size
        else:
            assert received.sizes.tolist() == [64 * (s - 1) + f + 1 for s, f in zip(size, first, strict=True)]


def test_the_server_computes_with_what_quantisation_leaves(images):
    model = tiny.llava()
    for precision in wire.PRECISIONS:
        merged = llava.patch(model, TopR(4), precision=precision)
        sent = merged.encode_images(images)
        received = [wire.decode(payload).tokens for payload in sent.payloads()]
        again = dataclasses.replace(sent, tokens=dataclasses.replace(sent.tokens, x=torch.cat(received)))
        expected = llava.patch(model, TopR(4), precision="float32")(IDS, again, MASK)[0]
        # The 16-bit formats only set the payload's length: their rounding is left out.
        atol = {"float32": 1e-6, "float16": 0.02, "bfloat16": 0.15}.get(precision, 1e-4)
        torch.testing.assert_close(merged(IDS, sent, MASK)[0], expected, atol=atol, rtol=0)


def test_the_cheaper_cut():
    model = tiny.llava()
    assert llava.patch(model, None).cut == "projector", "the projector narrows 48 to 32"
    wide = tiny.llava(text=MistralConfig(**{**tiny.TEXT, "hidden_size": 48}))
    assert llava.patch(wide, None).cut == "tower", "of equal widths, the cut that spares the device work"
    assert llava.patch(wide, None, output_policy=TopR(2)).cut == "projector"


def test_macs_equal_torchs_count(images):
    model = tiny.llava()
    merged = llava.patch(model, None)
    ids = torch.tensor([tiny.PROMPTS[0]])
    _, record = merged.generate(ids, images[:1], max_new_tokens=5)
    assert record.generated.tolist() == [5]
    ghost = copy.deepcopy(model).to("meta")
    n = int(record.prompt[0])
    with torch.no_grad():
        x = torch.empty(1, n, 32, device="meta")
        prefill = checks.counted_macs(lambda: ghost(inputs_embeds=x, logits_to_keep=1))
        projector = checks.counted_macs(lambda: ghost.model.multi_modal_projector(torch.empty(64, 48, device="meta")))
    assert record.prefill_macs[0] == pytest.approx(prefill, rel=0.002)
    assert record.visual_tokens.projector_macs[0] == projector
    # The passes after the prefill, each with one token more behind it.
    per_token = 2 * merged.cost.linear + merged.cost.head
    assert record.decode_macs[0] == sum(per_token + 2 * (n + t) * 2 * merged.cost.attn_dim for t in range(1, 5))
    sent = record.visual_tokens
    total = sent.vision_macs + sent.projector_macs + record.prefill_macs + record.decode_macs
    assert torch.equal(record.macs, total)


def test_merging_costs_less_and_sends_less(images):
    model = tiny.llava()
    full, merged, further = (
        llava.patch(model, policy, output_policy=output)(IDS, images, MASK)[1]
        for policy, output in ((None, None), (TopR(5), None), (TopR(5), TopR(6)))
    )
    for less, more in ((merged, full), (further, merged)):
        assert (less.macs < more.macs).all()
        assert (less.payload_bytes < more.payload_bytes).all()
    n, left = merged.visual, further.visual
    assert (n - left).tolist() == [6] * 5
    half = n - n // 2
    overhead = half * (n - half) * 32 + 2 * n * 32 + (n + left) * 32
    assert torch.equal(further.visual_tokens.projector_macs - merged.visual_tokens.projector_macs, overhead)


def test_patching_leaves_the_model_alone_and_again_replaces_the_policy(images):
    model = tiny.llava()
    patch = partial(llava.patch, policy=TopR(5))
    checks.leaves_model_alone(model, patch, lambda merged: merged(IDS, images, MASK))
    again = llava.patch(patch(model), TopR(2))
    assert again.encode_images(images).layers[0].tolist() == [65, 63, 61, 59, 57]


def test_a_saved_model_is_loaded_and_merged(tmp_path, images):
    model = tiny.llava()
    model.save_pretrained(tmp_path)
    tiny.processor(["is there a cat ?"]).save_pretrained(tmp_path)
    loaded, processor = llava.load_llava(str(tmp_path))
    batch = processor(images=[Image.new("RGB", (50, 40))], text=["<image> is there a cat ?"], return_tensors="pt")
    assert (batch["input_ids"] == 3).sum() == 64
    for policy in (None, TopR(6)):
        expected = llava.patch(model, policy)(IDS, images, MASK)[0]
        torch.testing.assert_close(llava.patch(loaded, policy)(IDS, images, MASK)[0], expected, atol=1e-6, rtol=0)


def test_half_precision(images):
    model = tiny.llava().to(torch.bfloat16)
    logits, record = llava.patch(model, TopR(8))(IDS, images, MASK)
    assert logits.dtype == torch.bfloat16
    assert logits[:, -1].isfinite().all()
    assert record.visual.tolist() == [32] * 5


def changed(**text):
    """A LLaVA whose language model is said to be another."""
    model = tiny.llava()
    vars(model.config.text_config).update(text)
    return model


def ask(rows, images, **options):
    return llava.patch(tiny.llava(), None, **options).generate(torch.tensor(rows), images[:2])


def answer(**options):
    return llava.patch(tiny.llava(), None).generate(IDS, torch.zeros(5, 3, 32, 32), MASK, **options)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda patch, _: llava.patch(torch.nn.Linear(2, 2), None), TypeError, "cannot merge tokens in a Linear"),
        (lambda patch, _: llava.patch(changed(model_type="gpt2"), None), TypeError, "language model 'gpt2'"),
        (
            lambda patch, _: llava.patch(tiny.llava(vision_feature_layer=[-2, -1]), None),
            TypeError,
            r"layers \[-2, -1\]",
        ),
        (lambda patch, _: patch(None, output_policy=0.9), TypeError, "output_policy is a float"),
        (lambda patch, _: patch(None, output_policy=Threshold([0.9] * 2)), ValueError, "2 thresholds .* of 1 blocks"),
        (lambda patch, _: patch(None, output_policy=TopR(1), cut="tower"), ValueError, "needs cut='projector'"),
        (lambda patch, _: patch(None, cut="middle"), ValueError, "unknown cut 'middle'"),
        (lambda patch, _: patch(None, weights="two"), ValueError, "unknown weights 'two'"),
        (lambda patch, _: patch(None, precision="int3"), ValueError, "unknown precision 'int3'"),
        (lambda patch, _: patch(None, pruning=Pruning(1, 0.0)), ValueError, "keep is a share"),
        (lambda patch, _: patch(None, pruning=Pruning(0, 0.5)), ValueError, "layer at least 1"),
        (lambda patch, _: patch(None, pruning=Pruning(2, 0.5)), ValueError, "has 2 layers"),
        (lambda patch, images: llava.patch(changed(sliding_window=30), None)(IDS, images), ValueError, "window of 30"),
        (lambda patch, images: patch(None)(IDS[:1], images), ValueError, "placeholders for 1 images, 5 are given"),
        (lambda patch, images: patch(None).train()(IDS, images), RuntimeError, "eval"),
        (lambda _, images: ask([[1, 3], [1, 5]], images), ValueError, "placeholders for 1 images, 2 are given"),
        (lambda _, images: ask([[1, 3, 4], [3, 5, 3]], images), ValueError, "placeholders for 3 images, 2 are given"),
        (
            lambda _, images: ask([[3, 4], [4, 3]], images, positions="first"),
            ValueError,
            "prompt 1 ends with the image",
        ),
        (lambda *_: answer(num_beams=4), ValueError, "num_beams=4 is asked for: merged models answer greedily"),
        (lambda *_: answer(num_return_sequences=2), ValueError, "num_return_sequences=2 is asked for"),
        (lambda *_: answer(repetition_penalty=1.2), ValueError, "repetition_penalty=1.2 is asked for"),
        (lambda *_: answer(do_sample=True), ValueError, "do_sample=True is asked for"),
        (lambda *_: answer(max_new_tokens=0), ValueError, "max_new_tokens is 0: at least 1"),
        (lambda *_: answer(temperature=0.5), TypeError, "no option temperature"),
    ],
)
def test_bad_input_is_named(make, error, message, images):
    with pytest.raises(error, match=message):
        make(partial(llava.patch, tiny.llava()), images)


def theirs(model, ids, images, mask, **options):
    return model.generate(input_ids=ids, pixel_values=images, attention_mask=mask, max_new_tokens=5, **options)


def test_prompts_hold_several_images_or_none_and_take_what_the_processor_gives(images):
    model, n = tiny.llava(), 64
    merged, image = llava.patch(model, None), tiny.IMAGE_TOKEN
    rows = [[1, image, image, 9], [1, 30, 31, 8], [image, 5, image, 6, image, 7]]
    single, mask = tiny.padded(rows)
    ids, full = tiny.padded(rows, repeat=n)
    new, record = merged.generate(input_ids=single, pixel_values=images, attention_mask=mask, max_new_tokens=5)
    whole = theirs(model, ids, images, full, do_sample=False)
    assert new.tolist() == whole[:, ids.shape[1] :].tolist()
    assert record.visual.tolist() == [2 * n, 0, 3 * n]
    assert record.prompt.tolist() == full.sum(1).tolist()
    # Expanded placeholders of neighbouring images are told apart by their number.
    assert torch.equal(merged.generate(ids, images, full, 5)[0], new)
    text, _ = merged.generate(torch.tensor([[1, 30, 31, 8]]), max_new_tokens=5)
    assert text[0].tolist() == new[1].tolist()


def test_several_images_merge_each_by_itself(images):
    merged = adaptive(tiny.llava(), images)
    both, record = merged(torch.tensor([[1, 3, 7, 3, 9]]), images[:2])
    each = [merged(torch.tensor([[1, 3, 9]]), images[i : i + 1])[1] for i in range(2)]
    assert record.visual.item() == sum(one.visual.item() for one in each)
    assert record.payload_bytes.item() == sum(one.payload_bytes.item() for one in each)
    assert record.vision_macs.item() == sum(one.vision_macs.item() for one in each)
    assert both.shape[1] == record.prompt.item() == record.visual.item() + 3


def test_padding_without_a_mask_is_found_as_transformers_does(images):
    model = tiny.llava()
    ids, _ = tiny.padded(tiny.PROMPTS, repeat=64)
    expected = theirs(model, ids, images, None, do_sample=False)[:, ids.shape[1] :]
    assert llava.patch(model, None).generate(ids, images, max_new_tokens=5)[0].tolist() == expected.tolist()


def test_what_a_generation_config_asks_for_is_not_ignored(images):
    model = tiny.llava()
    merged = llava.patch(model, None)
    model.generation_config.repetition_penalty = 1.1
    with pytest.raises(ValueError, match=r"repetition_penalty=1.1 is in the model's generation_config"):
        merged.generate(IDS, images, MASK)
    plain = merged.generate(IDS, images, MASK, 5, repetition_penalty=1.0, use_cache=False)[0]
    ids, mask = tiny.padded(tiny.PROMPTS, repeat=64)
    whole = theirs(model, ids, images, mask, do_sample=False, repetition_penalty=1.0, use_cache=False)
    assert plain.tolist() == whole[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize("name", ["LlavaNextForConditionalGeneration", "LlavaOnevisionForConditionalGeneration"])
def test_llavas_of_other_kinds_are_refused(name):
    other = torch.nn.Module.__new__(getattr(transformers, name))
    with pytest.raises(TypeError, match=f"cannot merge tokens in a {name}: a transformers LlavaForConditional"):
        llava.patch(other, None)
