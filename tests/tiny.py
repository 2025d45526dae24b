"""Small random models of transformers' real classes, and the shipped models' processor for them."""

import torch
import transformers as hf
from tokmerge.merging.calibration import Calibration
from tokmerge.models import tiny_llava
from tokmerge.models.vision_tower import patch_tower
from torch.nn.utils.rnn import pad_sequence

TOWER = {
    "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 5, "num_attention_heads": 3, "image_size": 32,
    "patch_size": 4,
}  # fmt: skip
TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
KINDS = {"clip": (hf.CLIPVisionModel, hf.CLIPVisionConfig), "siglip": (hf.SiglipVisionModel, hf.SiglipVisionConfig)}
# Of `tiny_llava.build_tiny_llava`.
GEOMETRY = {
    "image_size": 32, "patch_size": 8, "width": 24, "depth": 3, "heads": 2, "text_width": 16, "text_depth": 2,
    "text_heads": 2,
}  # fmt: skip
IMAGE_TOKEN = 3
PROMPTS = [[1, 10, 3, 11, 12], [1, 3, 20, 21, 22, 23, 24], [1, 30, 31, 32, 3, 33], [3, 40], [1, 50, 51, 3, 52]]


def spread(model):
    """Random weights whose tokens are as spread out as a trained model's."""
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                embedding = "position_embedding" in name or "embed_tokens" in name
                parameter.normal_(0, 0.3 if embedding else 1.5 * parameter[0].numel() ** -0.5)
    return model.eval().requires_grad_(False)


def tower(kind="clip"):
    model, config = KINDS[kind]
    return spread(model(config(**TOWER)))


def llava(kind="clip", strategy=None, text=None, **overrides):
    """A LLaVA with a tower of 64 patches and a two-layer Llama (or the text config given)."""
    config = hf.LlavaConfig(
        vision_config=KINDS[kind][1](**TOWER),
        text_config=text or hf.LlamaConfig(**TEXT),
        image_token_index=IMAGE_TOKEN,
        image_seq_length=64,
        vision_feature_select_strategy=strategy or ("default" if kind == "clip" else "full"),
        **overrides,
    )
    model = spread(hf.LlavaForConditionalGeneration(config))
    model.generation_config.eos_token_id = model.config.text_config.eos_token_id
    model.generation_config.pad_token_id = 0
    return model


def processor(texts):
    """Words of ``texts`` as tokens after <pad> <s> </s> <image> <unk>; images resized to 32 x 32."""
    words = tiny_llava.words(text.replace("<image>", "") for text in texts)
    return tiny_llava.processor(TOWER, words)


def thresholds(model, images, patch=patch_tower):
    """Thresholds that merge about 40 % of every layer's set A."""
    calibration = Calibration.of(lambda observer: patch(model, observer)(images))
    return calibration.thresholds([0.4] * len(calibration.quantiles))


def padded(prompts, side="left", repeat=1):
    """(B, S) ids and mask; each placeholder ``repeat`` times."""
    rows = [[token for i in row for token in [i] * (repeat if i == IMAGE_TOKEN else 1)] for row in prompts]
    ids, mask = (
        pad_sequence([torch.tensor(row) for row in part], batch_first=True, padding_side=side)
        for part in (rows, [[1] * len(row) for row in rows])
    )
    return ids, mask


IDS, MASK = padded(PROMPTS)
