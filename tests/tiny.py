"""Small random models of transformers' real classes, and a word-level processor for them."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
    SiglipVisionModel,
)

TOWER = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 3,
    "image_size": 32,
    "patch_size": 4,
}
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "pad_token_id": 0,
}
KINDS = {"clip": (CLIPVisionModel, CLIPVisionConfig), "siglip": (SiglipVisionModel, SiglipVisionConfig)}
IMAGE_TOKEN = 3


def spread(model, scale=1.5):
    """Random weights whose tokens are as spread out as a trained model's."""
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                embedding = "position_embedding" in name or "embed_tokens" in name
                parameter.normal_(0, 0.3 if embedding else scale * parameter[0].numel() ** -0.5)
    return model.eval().requires_grad_(False)


def tower(kind="clip", **overrides):
    model, config = KINDS[kind]
    return spread(model(config(**{**TOWER, **overrides})))


def llava(kind="clip", strategy=None, text=None, **overrides):
    """A LLaVA with a tower of 64 patches and a two-layer Llama (or the text config given)."""
    config = LlavaConfig(
        vision_config=KINDS[kind][1](**TOWER),
        text_config=text or LlamaConfig(**TEXT),
        image_token_index=IMAGE_TOKEN,
        image_seq_length=64,
        vision_feature_select_strategy=strategy or ("default" if kind == "clip" else "full"),
        **overrides,
    )
    model = spread(LlavaForConditionalGeneration(config))
    model.generation_config.eos_token_id = model.config.text_config.eos_token_id
    model.generation_config.pad_token_id = 0
    return model


def processor(texts, side=32):
    """Words of ``texts`` as tokens after <pad> <s> </s> <image> <unk>; images resized to a square."""
    special = ["<pad>", "<s>", "</s>", "<image>", "<unk>"]
    split = pre_tokenizers.Whitespace()
    words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text.replace("<image>", ""))})
    vocabulary = {word: i for i, word in enumerate([*special, *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = split
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="left",
    )
    size = {"height": side, "width": side}
    images = CLIPImageProcessor(size=size, do_center_crop=False)
    return LlavaProcessor(
        images, tokenizer, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
