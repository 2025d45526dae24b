"""The small LLaVAs that ship with the package: transformers' own class, a CLIP tower, a word-level tokenizer.

Each answers the questions of one embedded set. Its weights are safetensors, everything else (geometry, words,
prompt, recipe, accuracy) is its card, a JSON file.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tokmerge.io import paths, store
from tokmerge.io.extras import extra
from tokmerge.models.zoo import load_weights

with extra("llava"):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

TINY_LLAVAS = {
    f"{name}{taught}".replace("_", "-"): f"{name}{taught}"
    for name in ("easy_vqa_llava", "scenes_llava")
    for taught in ("", "_taught")
}
TINY_TEMPLATE = "<image> {question}"
SPECIAL = ("<pad>", "<s>", "</s>", "<image>", "<unk>")
PAD, START, END, IMAGE, UNKNOWN = range(len(SPECIAL))


def words(texts: Iterable[str]) -> list[str]:
    """The vocabulary of some texts: what stands between spaces, and punctuation by itself.

    >>> words(["is it red?", "it is"])
    ['?', 'is', 'it', 'red']
    """
    split = pre_tokenizers.Whitespace()
    return sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)})


def build_tiny_llava(geometry: Mapping[str, int], vocabulary: Sequence[str]) -> LlavaForConditionalGeneration:
    """A LLaVA with fresh weights and the `words` of a vocabulary.

    The geometry holds image_size, patch_size, width, depth and heads of the tower; text_width, text_depth and
    text_heads of the language model.
    """
    width, text_width = geometry["width"], geometry["text_width"]
    vision: Any = CLIPVisionConfig(
        image_size=geometry["image_size"], patch_size=geometry["patch_size"], hidden_size=width,
        intermediate_size=4 * width, num_hidden_layers=geometry["depth"], num_attention_heads=geometry["heads"],
        hidden_act="gelu",
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(SPECIAL) + len(vocabulary), hidden_size=text_width, intermediate_size=3 * text_width,
        num_hidden_layers=geometry["text_depth"], num_attention_heads=geometry["text_heads"],
        max_position_embeddings=512, pad_token_id=PAD, bos_token_id=START, eos_token_id=END,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE,
        image_seq_length=(geometry["image_size"] // geometry["patch_size"]) ** 2,
        vision_feature_select_strategy="default", vision_feature_layer=-2,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = END
    model.generation_config.pad_token_id = PAD
    return model


def processor(geometry: Mapping[str, int], vocabulary: Sequence[str]) -> LlavaProcessor:
    """The processor that goes with `build_tiny_llava`."""
    ids = {word: index for index, word in enumerate([*SPECIAL, *vocabulary])}
    backend = Tokenizer(models.WordLevel(ids, unk_token=SPECIAL[UNKNOWN]))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=SPECIAL[PAD], bos_token=SPECIAL[START], eos_token=SPECIAL[END],
        unk_token=SPECIAL[UNKNOWN], additional_special_tokens=[SPECIAL[IMAGE]], padding_side="left",
    )  # fmt: skip
    side = geometry["image_size"]
    images = CLIPImageProcessor(
        size={"height": side, "width": side}, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        images, tokenizer, patch_size=geometry["patch_size"], vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )  # fmt: skip


def llava_card(name: str) -> dict[str, Any]:
    """A shipped model's card: data, split, geometry, words, recipe, seed, accuracy, sha256 of its weights.

    Raises:
        ValueError: no such model ships.
    """
    if name not in TINY_LLAVAS:
        raise ValueError(f"no model {name!r} ships: use one of {', '.join(TINY_LLAVAS)}")
    return store.load_json(paths.ASSETS / "train_llava" / f"{TINY_LLAVAS[name]}.json")


def load_tiny_llava(name: str) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A shipped model and its processor, ready to evaluate.

    Raises:
        ValueError: no such model ships, or its weights do not match their card.
    """
    card = llava_card(name)
    model = build_tiny_llava(card["geometry"], card["words"])
    load_weights(model, paths.ASSETS / "train_llava" / f"{TINY_LLAVAS[name]}.safetensors", card["sha256"])
    return model.eval(), processor(card["geometry"], card["words"])
