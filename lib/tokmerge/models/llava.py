"""Merging in transformers' LlavaForConditionalGeneration: the image reaches the language model in fewer tokens.

    device   vision tower, merging layer by layer (`tokmerge.models.vision_tower`)
             projector, then merging once more if asked for       (where the cut is "projector")
    ---      wire: the tokens at the cut
    server   projector                                            (where the cut is "tower")
             prompt with one placeholder per surviving token, left padded; language model

Every image keeps its own number of visual tokens, and a prompt may hold several images or none. The language model's
layers are run as they are (`tokmerge.models.language_model`); neither its class nor its weights nor its methods are
touched. Answers are greedy: whatever else the model's generation_config or a call asks for is refused.

*Positions.* "consecutive": the prompt is numbered as it is read. "first": a merged token takes the position of
the first patch it stands for, and the text after the image goes on where it would without merging. The server
then needs those positions.

*Weights.* "one": to the language model every visual token is one token. "size": it counts as often as the patches
it stands for would have, by the logarithm of their number in the attention scores. The server then needs sizes.

*Precision.* The server computes with what int8 and int4 leave of the values; the 16-bit formats, whose rounding
changes no answer, only set the length of the payload.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from tokmerge import wire
from tokmerge.io.extras import extra
from tokmerge.merging.matching import Policy, needed_by
from tokmerge.models import language_model, vision_tower
from tokmerge.models.configuration import Configuration, LlavaConfiguration, Pruning
from tokmerge.models.cost import LanguageCost, linear_macs
from tokmerge.models.language_model import Prompts
from tokmerge.models.merged import MergedModel, check_policy
from tokmerge.models.visual_tokens import LlavaRecord, VisualTokens, first_patches, merge_output

with extra("llava"):
    from transformers import AutoProcessor, LlavaForConditionalGeneration

CUTS = ("cheaper", "tower", "projector")
POSITIONS = ("consecutive", "first")
WEIGHTS = ("one", "size")
# Language models whose matrix products `LanguageCost` counts.
LANGUAGE_MODELS = ("llama", "mistral", "qwen2")
# Greedy generation, in transformers' terms; whatever a cache does to the speed, it changes no answer.
GREEDY: dict[str, Any] = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0}


class MergedLlava(MergedModel):
    """A LLaVA that merges visual tokens as its policies say. Made by `patch`.

    Attributes:
        model: the wrapped model, unchanged.
        tower: its vision tower, with the policy of the layers.
        cut: where the payload is taken, "tower" or "projector".
        output_policy, positions, precision, weights, pruning: as of `patch`.
    """

    tower: vision_tower.MergedTower

    def __init__(
        self, model: LlavaForConditionalGeneration, tower: vision_tower.MergedTower, output_policy: Policy | None,
        positions: str, cut: str, precision: str, weights: str, pruning: Pruning | None,
    ) -> None:  # fmt: skip
        super().__init__(model)
        # No part of this module: the wrapped model has its weights.
        self.__dict__["tower"] = tower
        self.output_policy, self.positions, self.cut = output_policy, positions, cut
        self.precision, self.weights, self.pruning = precision, weights, pruning
        self.cost = LanguageCost.of(model)

    def passed_over(self) -> list[nn.Module]:
        return [*super().passed_over(), self.model.model, self.model.model.language_model]

    def encode_images(self, images: Tensor, source: bool = False) -> VisualTokens:
        """What the device does: (B, C, H, W) images, as the vision tower takes them, to the tokens that are sent."""
        numbered = self.positions == "first"
        tokens, record = self.tower(images, source=source or numbered)
        projector = self.model.model.multi_modal_projector
        projector_macs = tokens.lengths * linear_macs(projector)
        if self.cut == "projector":
            tokens = tokens.with_x(projector(tokens.x))
            if self.output_policy is not None:
                tokens, overhead = merge_output(tokens, self.output_policy)
                projector_macs = projector_macs + overhead
        first = first_patches(tokens) if numbered else None
        if not source:
            tokens = replace(tokens, source=None)
        weighed, n = self.weights == "size", self.tower.n_features
        return VisualTokens(tokens, first, weighed, n, self.precision, record.tokens, record.macs, projector_macs)

    def forward(
        self, input_ids: Tensor, pixel_values: Tensor | VisualTokens | None = None,
        attention_mask: Tensor | None = None, logits_to_keep: int = 0,
    ) -> tuple[Tensor, LlavaRecord]:  # fmt: skip
        """Scores of the next token at every position, left padded.

        Args:
            input_ids: (B, S); an image is a single placeholder, or as many as an unmerged image has tokens.
            pixel_values: (images, C, H, W) in the order of their placeholders, or what `encode_images` made of them;
                None for none.
            attention_mask: (B, S), 0 where ``input_ids`` are padding, on either side; None for no padding.
            logits_to_keep: how many last positions to score; 0 for all.

        Returns:
            logits (B, longest, vocabulary), aligned to the right, of the tokens that are not pruned, and the record.

        Raises:
            RuntimeError: the model is in training mode, or a hook would be ignored.
            ValueError: placeholders that are not those of the images; images of the wrong shape.
        """
        rows, _, record = self._prompts(input_ids, pixel_values, attention_mask)
        left = language_model.read(self.model, Prompts.padded(rows), self.pruning)
        return self.model.lm_head(left.x[:, -logits_to_keep:]), record

    def generate(
        self, input_ids: Tensor, pixel_values: Tensor | VisualTokens | None = None,
        attention_mask: Tensor | None = None, max_new_tokens: int = 16, use_cache: bool = True,
        alike: Tensor | None = None, **greedy: Any,
    ) -> tuple[Tensor, LlavaRecord]:  # fmt: skip
        """Answer greedily: (B, longest answer) int64 new tokens, padded after the end of text, and the record.

        Arguments and errors as of `forward`. Without a mask, padding is found by the model's pad_token_id, as
        transformers does. A prompt must not end with an image unless positions are consecutive. ``use_cache`` changes
        nothing; ``greedy`` are options in `GREEDY`, which say so where the model's generation_config asks for more.
        ``alike``, (B,): prompts of the same number have the same image and the same text up to its end, which is read
        once, to the same answers within rounding (of pruned ones it is read for each: the question says what goes).
        """
        self._check_greedy(greedy)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}: at least 1 is needed")
        pad = self.model.generation_config.pad_token_id
        if attention_mask is None and pad is not None and pad not in language_model.ends_of_text(self.model).tolist():
            attention_mask = (input_ids != pad).long()
        rows, after, record = self._prompts(input_ids, pixel_values, attention_mask)
        last = [row for row, (end, columns) in enumerate(zip(after, rows, strict=True)) if end == len(columns[0])]
        if self.positions == "first" and last:
            # Generation counts on from the last position, which here need not be the image's end.
            raise ValueError(f"prompt {last[0]} ends with the image: positions='first' needs text after it")
        if alike is None or self.pruning is not None or last or not all(after):
            prompts, cache = Prompts.padded(rows), None
        else:
            prompts, cache = self._read_alike(rows, after, alike)
        new, generated, scores = language_model.generate_answers(
            self.model, prompts, max_new_tokens, self.pruning, cache
        )
        decode_macs = self.cost.decode(record.prompt, record.left, self._pruned, generated)
        return new, replace(record, generated=generated, decode_macs=decode_macs, scores=scores)

    def _read_alike(self, rows: list[list[Tensor]], after: list[int], alike: Tensor) -> tuple[Prompts, Any]:
        """The prompts, and a cache of what they have up to the end of their images, read once where it is alike."""
        parts = [[part.tensor_split([end]) for part in row] for row, end in zip(rows, after, strict=True)]
        begins, rest = ([[both[at] for both in row] for row in parts] for at in (0, 1))
        firsts: dict[int, int] = {}
        for row, number in enumerate(alike.tolist()):
            first = firsts.setdefault(number, row)
            (one, _, visual, _), (other, _, theirs, _) = begins[row], begins[first]
            # Rows of a large projector may differ by rounding, by where they stand in the batch; words never do.
            slack = 0.01 * other.abs().amax(1, keepdim=True) * theirs[:, None]
            if not torch.equal(visual, theirs) or ((one - other).abs() > slack).any():
                raise ValueError(f"prompts {first} and {row} are not alike up to the end of their image")
        places = {number: place for place, number in enumerate(firsts)}
        owner = torch.tensor([places[number] for number in alike.tolist()], device=self.model.device)
        some = Prompts.padded([begins[row] for row in firsts.values()])
        return language_model.read_beginnings(self.model, some, Prompts.padded(rest), owner)

    def _check_greedy(self, given: Mapping[str, Any]) -> None:
        if unknown := sorted(set(given) - set(GREEDY)):
            raise TypeError(f"generate() has no option {', '.join(unknown)}")
        for name, value in GREEDY.items():
            asked = given.get(name, getattr(self.model.generation_config, name, None))
            if asked not in (None, value):
                where = "asked for" if name in given else "in the model's generation_config"
                raise ValueError(f"{name}={asked!r} is {where}: merged models answer greedily, pass {name}={value!r}")

    @property
    def _pruned(self) -> int:
        """Layers of the language model after the pruning."""
        return 0 if self.pruning is None else self.cost.depth - self.pruning.layer

    def _prompts(
        self, input_ids: Tensor, pixel_values: Tensor | VisualTokens | None, attention_mask: Tensor | None
    ) -> tuple[list[list[Tensor]], list[int], LlavaRecord]:
        """Rows of `Prompts.padded`, the place of each after its last image (0 without one), and the record."""
        self.check_ready()
        if pixel_values is None:
            pixel_values = torch.empty(0, *self.tower.image_shape, dtype=self.model.dtype, device=input_ids.device)
        sent = pixel_values if isinstance(pixel_values, VisualTokens) else self.encode_images(pixel_values)
        there = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        prompts = [ids[mask.bool()] for ids, mask in zip(input_ids, there, strict=True)]
        spans = [self._placeholders(ids) for ids in prompts]
        owner = [row for row, own in enumerate(spans) for _ in own]
        if len(owner) != len(sent):
            form = f"an image is a single placeholder, or {self.tower.n_features} in a row"
            raise ValueError(f"the prompts have placeholders for {len(owner)} images, {len(sent)} are given: {form}")
        images, embed = self._image_parts(sent), self.model.get_input_embeddings()
        rows, ends = list[list[Tensor]](), list[int]()
        for ids, own in zip(prompts, spans, strict=True):
            parts: list[tuple[Tensor, ...]] = []
            at = position = 0
            for start, end in [*own, (len(ids), len(ids))]:
                text, nothing = ids[at:start], torch.zeros(start - at, device=ids.device)
                numbers = position + torch.arange(len(text), device=ids.device)
                parts.append((embed(text), numbers, nothing.bool(), nothing.to(self.model.dtype)))
                at, position = end, position + len(text)
                if start < end:
                    x, numbers, weight, taken = next(images)
                    parts.append((x, position + numbers, torch.ones_like(numbers, dtype=torch.bool), weight))
                    position += taken
            rows.append([torch.cat(column) for column in zip(*parts, strict=True)])
            ends.append(len(rows[-1][0]) - len(parts[-1][0]))
        prompt = torch.tensor([len(row[0]) for row in rows], device=input_ids.device)
        n = torch.stack([row[2].sum() for row in rows])
        left = prompt if self.pruning is None else prompt - n + self.pruning.left(n)
        owners, zeros = torch.tensor(owner, dtype=torch.int64, device=prompt.device), torch.zeros_like(prompt)
        prefill_macs = self.cost.prefill(prompt, left, self._pruned)
        return rows, ends, LlavaRecord(sent, owners, prompt, left, zeros, prefill_macs, zeros)

    def _image_parts(self, sent: VisualTokens) -> Iterator[tuple[Tensor, Tensor, Tensor, int]]:
        """Of every image its tokens as the language model reads them, places, weights, and places that it takes up."""
        visual, counts = sent.tokens.x, sent.tokens.layout.counts
        if self.precision in ("int8", "int4"):
            visual = wire.quantise(visual.float(), self.precision).to(visual.dtype)
        if self.cut == "tower":
            visual = self.model.model.multi_modal_projector(visual)
        sizes = sent.sizes if sent.weighed else torch.ones_like(sent.sizes)
        places = sent.tokens.layout.position if sent.first is None else sent.first
        columns = (visual.to(self.model.dtype), places, sizes.to(self.model.dtype).log())
        for x, place, weight in zip(*(column.split(counts) for column in columns), strict=True):
            yield x, place, weight, len(x) if sent.first is None else self.tower.n_features

    def _placeholders(self, ids: Tensor) -> list[tuple[int, int]]:
        """Where the placeholders of every image start and end."""
        spans, at, n = list[tuple[int, int]](), 0, self.tower.n_features
        for is_image, run in groupby((ids == self.model.config.image_token_id).tolist()):
            length = len(list(run))
            if is_image:
                each = 1 if length % n else n
                spans += [(start, start + each) for start in range(at, at + length, each)]
            at += length
        return spans


def patch(
    model: nn.Module, policy: Policy | None, *, output_policy: Policy | None = None, positions: str = "consecutive",
    cut: str = "cheaper", precision: str = "float16", weights: str = "one", pruning: Pruning | None = None,
) -> MergedLlava:  # fmt: skip
    """Attach merge policies to a LLaVA, or replace those a patched one has.

    Args:
        model: transformers' LlavaForConditionalGeneration with a CLIP or SigLIP tower, or a patched one.
        policy: what merges in the tower, with one entry per layer that is run; None for nothing.
        output_policy: what merges in the projector's output, before it is sent (`merge_output`).
        positions: "consecutive" or "first".
        cut: where the tokens are sent, after the "tower" or the "projector". "cheaper" is after the tower
            unless the projector narrows the tokens or its output merges.
        precision: of the token values in the payload, one of `tokmerge.wire.PRECISIONS`.
        weights: what a visual token counts for in the language model, "one" or "size".
        pruning: of visual tokens inside the language model.

    Raises:
        TypeError: the model or a policy is of an unsupported kind.
        ValueError: a policy does not fit, an unknown option, or merging after a cut.
    """
    if isinstance(model, MergedLlava):
        model = model.model
    if not isinstance(model, LlavaForConditionalGeneration):
        raise TypeError(
            f"cannot merge tokens in a {type(model).__name__}: a transformers LlavaForConditionalGeneration is needed"
        )
    config: Any = model.config
    if config.text_config.model_type not in LANGUAGE_MODELS:
        counted = ", ".join(LANGUAGE_MODELS)
        raise TypeError(f"language model {config.text_config.model_type!r}: only {counted} are counted")
    layer = config.vision_feature_layer
    if not isinstance(layer, int):
        raise TypeError(f"features of layers {layer}: merged tokens of one layer only are supported")
    options = {"cut": CUTS, "positions": POSITIONS, "precision": wire.PRECISIONS, "weights": WEIGHTS}
    for (name, known), value in zip(options.items(), (cut, positions, precision, weights), strict=True):
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}: use one of {', '.join(known)}")
    check_policy("output_policy", output_policy, 1, has_class_token=False, classifies=False)
    if output_policy is not None and cut == "tower":
        raise ValueError("cut='tower' sends tokens before the projector: merging its output needs cut='projector'")
    if cut == "cheaper":
        narrows = config.text_config.hidden_size < config.vision_config.hidden_size
        cut = "projector" if narrows or output_policy is not None else "tower"
    # transformers cuts the first token off whatever the tower is, so for a tower without CLS a patch.
    skip = 1 if config.vision_feature_select_strategy == "default" else 0
    tower = vision_tower.patch_tower(model.model.vision_tower, policy, layer=layer, skip=skip)
    depth = config.text_config.num_hidden_layers
    if pruning is not None and pruning.layer >= depth:
        raise ValueError(f"{pruning}: the language model has {depth} layers, and at least one has to come after it")
    tower.wants_places = output_policy is not None and "places" in needed_by(output_policy)
    return MergedLlava(model, tower, output_policy, positions, cut, precision, weights, pruning)


def patch_llava(model: nn.Module, configuration: Configuration) -> MergedLlava:
    """`patch` with a configuration's options; one of a vision transformer has a policy and a precision only."""
    if not isinstance(configuration, LlavaConfiguration):
        configuration = LlavaConfiguration(configuration.policy, configuration.precision)
    # A LLaVA is cut where its tower or its projector ends.
    options = {name: value for name, value in vars(configuration).items() if name not in ("policy", "split_layer")}
    return patch(model, configuration.policy, **options)


def load_llava(
    name: str, device: str | torch.device = "cpu", dtype: str = "auto"
) -> tuple[LlavaForConditionalGeneration, Any]:
    """A LLaVA and its processor, ready to evaluate.

    Args:
        name: local folder, or hub name such as ``"llava-hf/llava-1.5-7b-hf"``.
        device: where the model goes.
        dtype: of its weights, such as "float16"; "auto" for the one they were saved in.

    Raises:
        ValueError: there is no such model.
    """
    try:
        model = LlavaForConditionalGeneration.from_pretrained(name, dtype=dtype)
        processor = AutoProcessor.from_pretrained(name)
    except OSError as error:
        raise ValueError(f"no LLaVA model {name!r}: a local folder or a name on the hub is needed ({error})") from error
    model.to(torch.device(device))  # type: ignore[arg-type]
    return model.eval(), processor
