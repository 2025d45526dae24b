import copy
import dataclasses

import pytest
import reference
import tiny
import tokmerge
import torch
from PIL import Image
from tokmerge import Threshold, TopR, wire
from tokmerge.merging.calibration import Calibration
from tokmerge.models import llava
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaForConditionalGeneration, MistralConfig, Qwen2Config

KINDS = pytest.mark.parametrize("kind", tiny.KINDS)


def adaptive(model, images, **options):
    """Patched with thresholds that merge about 40 % of every layer's set A."""
    return llava.patch(model, Threshold(tiny.thresholds(model.model.vision_tower, images)), **options)


@pytest.mark.parametrize(
    ("kind", "strategy"), [("clip", "default"), ("clip", "full"), ("siglip", "full"), ("siglip", "default")]
)
@pytest.mark.parametrize("positions", llava.POSITIONS)
@pytest.mark.parametrize("cut", llava.CUTS)
def test_no_policy_is_the_unpatched_model(kind, strategy, positions, cut, images):
    model = tiny.llava(kind, strategy)
    merged = llava.patch(model, None, positions=positions, cut=cut)
    n = merged.tower.n_features
    assert n == 64 + (kind == "clip") - (strategy == "default")
    ids, mask = tiny.padded(tiny.PROMPTS, repeat=n)
    logits, record = merged(*tiny.padded(tiny.PROMPTS)[:1], images, tiny.padded(tiny.PROMPTS)[1])
    expected = model(input_ids=ids, pixel_values=images, attention_mask=mask).logits
    assert logits.shape == expected.shape
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=0)
    assert record.prompt.tolist() == mask.sum(1).tolist()
    assert record.visual.tolist() == [n] * 5

    new, record = merged.generate(
        *tiny.padded(tiny.PROMPTS)[:1], images, tiny.padded(tiny.PROMPTS)[1], max_new_tokens=8
    )
    whole = model.generate(input_ids=ids, pixel_values=images, attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert new.tolist() == whole[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize("config", [MistralConfig, Qwen2Config])
def test_other_language_models(config, images):
    model = tiny.llava(text=config(**tiny.TEXT))
    ids, mask = tiny.padded(tiny.PROMPTS, repeat=64)
    expected = model(input_ids=ids, pixel_values=images, attention_mask=mask).logits
    logits = llava.patch(model, None)(ids, images, mask)[0]
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=0)


def plain_answer(model, image, prompt, choose, choose_output, positions):
    """One image and one prompt, token by token: the scores at every position."""
    start = prompt.index(tiny.IMAGE_TOKEN)
    tower = model.model.vision_tower
    x, _, sizes, groups = reference.run_tower(tower, image, choose, 4, 1)
    x = model.model.multi_modal_projector(x)
    if choose_output is not None:
        x, _, groups = reference.combine(
            x, sizes, groups, **choose_output(reference.Layer(0, x[None], [], sizes, groups, 0))
        )
    embed = model.get_input_embeddings()
    before, behind = torch.tensor(prompt[:start]).long(), torch.tensor(prompt[start + 1 :])
    rows = torch.cat([embed(before), x, embed(behind)])
    numbers = list(range(len(rows)))
    if positions == "first":
        # Patch 0 is token 1 of the tower, after CLS.
        numbers = [*range(start), *(start + min(group) - 1 for group in groups)]
        numbers += range(start + 64, start + 64 + len(behind))
    hidden = model.model.language_model(
        inputs_embeds=rows[None], position_ids=torch.tensor([numbers]), attention_mask=torch.ones(1, len(rows))
    )
    return model.lm_head(hidden.last_hidden_state)[0]


@pytest.mark.parametrize("positions", llava.POSITIONS)
@pytest.mark.parametrize("output", [False, True])
def test_merging_equals_the_plain_implementation(positions, output, images):
    # In double precision: random weights amplify single-precision rounding from layer to layer.
    model, images = tiny.llava().double(), images.double()
    taus = tiny.thresholds(model.model.vision_tower, images)
    at_output = reference.top_r_choice([7]) if output else None
    merged = llava.patch(model, Threshold(taus), output_policy=TopR(7) if output else None, positions=positions)
    ids, mask = tiny.padded(tiny.PROMPTS)
    logits, record = merged(ids, images, mask)
    assert len(set(record.visual.tolist())) > 1, "samples must keep different token counts"
    for i, image in enumerate(images):
        expected = plain_answer(model, image, tiny.PROMPTS[i], reference.threshold_choice(taus), at_output, positions)
        assert record.prompt[i] == len(expected)
        torch.testing.assert_close(logits[i, -len(expected) :], expected, atol=1e-6, rtol=1e-6)


@KINDS
@pytest.mark.parametrize("positions", llava.POSITIONS)
@pytest.mark.parametrize("output", [None, Threshold(0.5)])
def test_a_batch_equals_its_samples_alone(kind, positions, output, images):
    merged = adaptive(tiny.llava(kind), images, positions=positions, output_policy=output)
    ids, mask = tiny.padded(tiny.PROMPTS)
    logits, record = merged(ids, images, mask)
    new, answered = merged.generate(ids, images, mask, max_new_tokens=6)
    assert len(set(record.visual.tolist())) > 1
    for i, prompt in enumerate(tiny.PROMPTS):
        one = torch.tensor([prompt])
        alone, own = merged(one, images[i : i + 1])
        torch.testing.assert_close(alone[0], logits[i, -alone.shape[1] :], atol=1e-4, rtol=0)
        text, own = merged.generate(one, images[i : i + 1], max_new_tokens=6)
        length = int(own.generated[0])
        assert text[0].tolist() == new[i, : text.shape[1]].tolist()
        for name in ("prompt", "generated", "macs", "payload_bytes", "visual", "decode_macs"):
            assert getattr(own, name)[0] == getattr(answered, name)[i], name
        assert answered.generated[i] == length


def test_generation_with_moved_positions_is_repeated_forward(images):
    merged = adaptive(tiny.llava(), images, positions="first")
    new, _ = merged.generate(torch.tensor([tiny.PROMPTS[0]]), images[1:2], max_new_tokens=5)
    prompt = list(tiny.PROMPTS[0])
    for token in new[0].tolist():
        logits, _ = merged(torch.tensor([prompt]), images[1:2], logits_to_keep=1)
        assert logits.shape == (1, 1, 64)
        assert logits[0, -1].argmax() == token
        prompt.append(token)


def test_placeholders_may_be_expanded_and_padded_on_either_side(images):
    merged = adaptive(tiny.llava(), images)
    expected = merged(*tiny.padded(tiny.PROMPTS)[:1], images, tiny.padded(tiny.PROMPTS)[1])[0]
    for side in ("left", "right"):
        for repeat in (1, 64):
            ids, mask = tiny.padded(tiny.PROMPTS, side, repeat)
            assert torch.equal(merged(ids, images, mask)[0], expected)


def test_an_answer_ends_with_its_end_of_text(images):
    model = tiny.llava()
    merged = adaptive(model, images)
    ids, mask = tiny.padded(tiny.PROMPTS)
    free = merged.generate(ids, images, mask, max_new_tokens=6)[0]
    # The third token of the first answer becomes the end of text: whatever follows it is not counted.
    model.generation_config.eos_token_id = eos = int(free[0, 2])
    _, record = merged.generate(ids, images, mask, max_new_tokens=6)
    expected = [(row.index(eos) + 1 if eos in row else 6) for row in free.tolist()]
    assert record.generated.tolist() == expected
    assert expected[0] <= 3
    passes = record.generated - 1
    assert ((record.decode_macs > 0) == (passes > 0)).all()
    model.generation_config.eos_token_id = None
    assert merged.generate(ids, images, mask, max_new_tokens=6)[1].generated.tolist() == [6] * 5


@pytest.mark.parametrize("cut", ["tower", "projector"])
@pytest.mark.parametrize("precision", wire.PRECISIONS)
@pytest.mark.parametrize("positions", llava.POSITIONS)
def test_payload_bytes_are_the_length_of_the_real_payload(cut, precision, positions, images):
    model = tiny.llava()
    merged = adaptive(model, images, cut=cut, precision=precision, positions=positions)
    sent = merged.encode_images(images)
    width = 48 if cut == "tower" else 32
    for i, payload in enumerate(sent.payloads()):
        received = wire.decode(payload)
        assert len(payload) == sent.payload_bytes[i]
        assert received.tokens.shape == (sent.tokens.lengths[i], width)
        if positions == "consecutive":
            assert received.sizes is None
        else:
            first = sent.first.split(sent.tokens.layout.counts)[i]
            assert (received.sizes - 1).tolist() == first.tolist()
            assert first.min() == 0
            assert len(set(first.tolist())) == len(first)


@pytest.mark.parametrize("positions", llava.POSITIONS)
def test_sizes_and_first_patches_travel_in_one_number(positions, images):
    merged = adaptive(tiny.llava(), images, positions=positions, weights="size")
    sent = merged.encode_images(images, source=True)
    for i, payload in enumerate(sent.payloads()):
        assert len(payload) == sent.payload_bytes[i]
        source = sent.tokens.source[i].tolist()
        for token, number in enumerate(wire.decode(payload).sizes.tolist()):
            size, first = source.count(token), source.index(token)
            assert number == (size if positions == "consecutive" else 64 * (size - 1) + first + 1)


def test_the_server_computes_with_what_quantisation_leaves(images):
    model = tiny.llava()
    ids, mask = tiny.padded(tiny.PROMPTS)
    for precision in wire.PRECISIONS:
        merged = llava.patch(model, TopR(4), precision=precision)
        sent = merged.encode_images(images)
        received = [wire.decode(payload).tokens for payload in sent.payloads()]
        again = dataclasses.replace(sent, tokens=dataclasses.replace(sent.tokens, x=torch.cat(received)))
        expected = llava.patch(model, TopR(4), precision="float32")(ids, again, mask)[0]
        # The 16-bit formats only set the payload's length: their rounding is left out.
        atol = {"float32": 1e-6, "float16": 0.02, "bfloat16": 0.15}.get(precision, 1e-4)
        torch.testing.assert_close(merged(ids, sent, mask)[0], expected, atol=atol, rtol=0)


def test_the_cheaper_cut():
    model = tiny.llava()
    assert llava.patch(model, None).cut == "projector", "the projector narrows 48 to 32"
    text = {**tiny.TEXT, "hidden_size": 48}
    wide = tiny.llava(text=type(model.config.text_config)(**text))
    assert llava.patch(wide, None).cut == "tower", "of equal widths, the cut that spares the device work"
    assert llava.patch(wide, None, output_policy=TopR(2)).cut == "projector"


def test_one_look_serves_many_questions(images):
    merged = adaptive(tiny.llava(), images, positions="first")
    sent = merged.encode_images(images, source=True)
    rows = torch.tensor([4, 0, 0, 2])
    picked = sent.pick(rows)
    prompts = [tiny.PROMPTS[i] for i in (0, 1, 2, 4)]
    ids, mask = tiny.padded(prompts)
    new, record = merged.generate(ids, picked, mask, max_new_tokens=4)
    expected, own = merged.generate(ids, images[rows], mask, max_new_tokens=4)
    assert new.tolist() == expected.tolist()
    assert record.macs.tolist() == own.macs.tolist()
    assert record.payload_bytes.tolist() == own.payload_bytes.tolist()
    assert torch.equal(picked.tokens.source, merged.encode_images(images[rows], source=True).tokens.source)
    assert torch.equal(picked.tokens.sizes, merged.encode_images(images[rows]).tokens.sizes)
    assert own.visual_tokens.tokens.source is None


def flops(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() / 2


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
        prefill = flops(lambda: ghost(inputs_embeds=x, logits_to_keep=1))
        projector = flops(lambda: ghost.model.multi_modal_projector(torch.empty(64, 48, device="meta")))
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
    ids, mask = tiny.padded(tiny.PROMPTS)
    full = llava.patch(model, None)(ids, images, mask)[1]
    merged = llava.patch(model, TopR(5))(ids, images, mask)[1]
    further = llava.patch(model, TopR(5), output_policy=TopR(6))(ids, images, mask)[1]
    for less, more in ((merged, full), (further, merged)):
        assert (less.macs < more.macs).all()
        assert (less.payload_bytes < more.payload_bytes).all()
    n, left = merged.visual, further.visual
    assert (n - left).tolist() == [6] * 5
    half = n - n // 2
    overhead = half * (n - half) * 32 + 2 * n * 32 + (n + left) * 32
    assert torch.equal(further.visual_tokens.projector_macs - merged.visual_tokens.projector_macs, overhead)
    off = llava.patch(model, TopR(5), output_policy=TopR(0))(ids, images, mask)[1]
    assert torch.equal(off.macs, merged.macs)


def test_patching_leaves_the_model_alone(images):
    model = tiny.llava()
    before = copy.deepcopy(model.state_dict())
    merged = llava.patch(model, TopR(5))
    merged(torch.tensor([tiny.PROMPTS[0]]), images[:1])
    assert llava.unpatch(merged) is model
    assert type(model) is LlavaForConditionalGeneration
    assert merged.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert merged.load_state_dict(before).missing_keys == []
    assert sum(p.numel() for p in merged.parameters()) == sum(p.numel() for p in model.parameters())
    again = llava.patch(merged, TopR(2))
    assert llava.unpatch(again) is model
    assert again.encode_images(images).layers[0].tolist() == [65, 63, 61, 59, 57]


def test_a_saved_model_is_loaded_and_merged(tmp_path, images):
    model = tiny.llava()
    model.save_pretrained(tmp_path)
    tiny.processor(["is there a cat ?"]).save_pretrained(tmp_path)
    loaded, processor = llava.load_llava(str(tmp_path))
    batch = processor(images=[Image.new("RGB", (50, 40))], text=["<image> is there a cat ?"], return_tensors="pt")
    assert (batch["input_ids"] == 3).sum() == 64
    ids, mask = tiny.padded(tiny.PROMPTS)
    for policy in (None, TopR(6)):
        expected = llava.patch(model, policy)(ids, images, mask)[0]
        torch.testing.assert_close(llava.patch(loaded, policy)(ids, images, mask)[0], expected, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="no LLaVA model"):
        llava.load_llava(str(tmp_path / "nowhere"))


def test_half_precision(images):
    model = tiny.llava().to(torch.bfloat16)
    logits, record = llava.patch(model, TopR(8))(*tiny.padded(tiny.PROMPTS)[:1], images, tiny.padded(tiny.PROMPTS)[1])
    assert logits.dtype == torch.bfloat16
    assert record.visual.tolist() == [32] * 5


def test_calibration_of_the_output(images):
    model = tiny.llava()
    sent = Calibration.of(lambda observer: llava.patch(model, None, output_policy=observer).encode_images(images))
    (tau,) = sent.thresholds([0.5])
    sent = llava.patch(tiny.llava(), None, output_policy=Threshold([tau])).encode_images(images)
    assert 64 * 5 - 83 <= len(sent.tokens.x) <= 64 * 5 - 77


def test_bad_input_is_named(images):
    model = tiny.llava()
    with pytest.raises(TypeError, match="cannot merge tokens in a Linear"):
        llava.patch(torch.nn.Linear(2, 2), None)
    with pytest.raises(TypeError, match="policy is a float"):
        llava.patch(model, 0.9)
    with pytest.raises(TypeError, match="output_policy is a float"):
        llava.patch(model, None, output_policy=0.9)
    with pytest.raises(ValueError, match="2 thresholds for a model of 1 blocks"):
        llava.patch(model, None, output_policy=Threshold([0.9, 0.9]))
    with pytest.raises(ValueError, match="5 thresholds for a model of 4 blocks"):
        llava.patch(model, Threshold([0.9] * 5))
    with pytest.raises(ValueError, match="unknown cut 'middle'"):
        llava.patch(model, None, cut="middle")
    with pytest.raises(ValueError, match="unknown positions"):
        llava.patch(model, None, positions="last")
    with pytest.raises(ValueError, match="unknown weights 'two'"):
        llava.patch(model, None, weights="two")
    with pytest.raises(ValueError, match="unknown precision 'int3'"):
        llava.patch(model, None, precision="int3")
    with pytest.raises(ValueError, match="needs cut='projector'"):
        llava.patch(model, None, output_policy=TopR(1), cut="tower")
    with pytest.raises(TypeError, match=r"features of layers \[-2, -1\]"):
        llava.patch(tiny.llava(vision_feature_layer=[-2, -1]), None)
    model.config.text_config.model_type = "gpt2"
    with pytest.raises(TypeError, match="language model 'gpt2'"):
        llava.patch(model, None)

    merged = llava.patch(tiny.llava(), None, positions="first")
    for prompt, found in (([1, 5], 0), ([3, 5, 3], 2), ([3, 3, 5], 2)):
        with pytest.raises(ValueError, match=f"prompt 1 has {found} image placeholders"):
            merged(torch.tensor([[1, 3, 4][: len(prompt)], prompt]), images[:2])
    with pytest.raises(ValueError, match="1 prompts for 2 images"):
        merged(torch.tensor([[1, 3]]), images[:2])
    with pytest.raises(ValueError, match="prompt 1 ends with the image"):
        merged.generate(torch.tensor([[1, 3, 4], [1, 4, 3]]), images[:2])
    with pytest.raises(RuntimeError, match="eval"):
        merged.train()(torch.tensor([[1, 3]]), images[:1])


def test_the_public_patch_still_names_its_model():
    with pytest.raises(TypeError, match="timm VisionTransformer"):
        tokmerge.patch(tiny.llava(), None)
