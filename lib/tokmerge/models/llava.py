"""Merging in transformers' LlavaForConditionalGeneration: the image reaches the language model in fewer tokens.

    device   vision tower, merging layer by layer (`tokmerge.models.vision_tower`)
             projector, then merging once more if asked for       (where the cut is "projector")
    ---      wire: the tokens at the cut
    server   projector                                            (where the cut is "tower")
             prompt with one placeholder per surviving token, left padded; language model

Every sample keeps its own number of visual tokens. The language model's layers are run as they are
(`tokmerge.models.language_model`); neither its class nor its weights nor its methods are touched.

*Positions.* "consecutive": the prompt is numbered as it is read. "first": a merged token takes the position of
the first patch it stands for, and the text after the image goes on where it would without merging. The server
then needs those positions.

*Weights.* "one": to the language model every visual token is one token. "size": it counts as often as the patches
it stands for would have, by the logarithm of their number in the attention scores. The server then needs sizes.

*Precision.* The server computes with what int8 and int4 leave of the values; the 16-bit formats, whose rounding
changes no answer, only set the length of the payload.
"""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from tokmerge import wire
from tokmerge.io.extras import extra
from tokmerge.merging.matching import Policy
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


class MergedLlava(MergedModel):
    """A LLaVA that merges visual tokens as its policies say. Made by `patch`.

    Attributes:
        model: the wrapped model, unchanged.
        tower: its vision tower, with the policy of the layers.
        cut: where the payload is taken, "tower" or "projector".
        output_policy, positions, precision, weights, pruning: as of `patch`.
    """

    def __init__(
        self, model: LlavaForConditionalGeneration, tower: vision_tower.MergedTower, output_policy: Policy | None,
        positions: str, cut: str, precision: str, weights: str, pruning: Pruning | None,
    ) -> None:  # fmt: skip
        super().__init__(model)
        self.tower, self.output_policy, self.positions, self.cut = tower, output_policy, positions, cut
        self.precision, self.weights, self.pruning = precision, weights, pruning
        self.cost = LanguageCost.of(model)

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
        self, input_ids: Tensor, images: Tensor | VisualTokens, attention_mask: Tensor | None = None,
        logits_to_keep: int = 0,
    ) -> tuple[Tensor, LlavaRecord]:  # fmt: skip
        """Scores of the next token at every position, left padded.

        Args:
            input_ids: (B, S), in every row one run of image placeholders: a single one, or as many as an
                unmerged image has tokens.
            images: (B, C, H, W), or what `encode_images` made of them.
            attention_mask: (B, S), 0 where ``input_ids`` are padding, on either side; None for no padding.
            logits_to_keep: how many last positions to score; 0 for all.

        Returns:
            logits (B, longest, vocabulary), aligned to the right, of the tokens that are not pruned, and the record.

        Raises:
            RuntimeError: the model is in training mode.
            ValueError: a row without, or with another number of placeholders; images of the wrong shape or number.
        """
        prompts, record = self._prompts(input_ids, images, attention_mask)
        left = language_model.read(self.model, prompts, self.pruning)
        return self.model.lm_head(left.x[:, -logits_to_keep:]), record

    def generate(
        self, input_ids: Tensor, images: Tensor | VisualTokens, attention_mask: Tensor | None = None,
        max_new_tokens: int = 16,
    ) -> tuple[Tensor, LlavaRecord]:  # fmt: skip
        """Answer greedily: (B, longest answer) int64 new tokens, padded after the end of text, and the record.

        Arguments and errors as of `forward`; a prompt must not end with the image unless positions are consecutive.
        """
        prompts, record = self._prompts(input_ids, images, attention_mask)
        if self.positions == "first" and (ends := prompts.visual[:, -1]).any():
            # Generation counts on from the last position, which here need not be the image's end.
            row = int(ends.int().argmax())
            raise ValueError(f"prompt {row} ends with the image: positions='first' needs text after it")
        new, scores = language_model.generate_answers(self.model, prompts, max_new_tokens, self.pruning)
        eos = self.model.generation_config.eos_token_id
        ends = torch.isin(new, torch.tensor([] if eos is None else eos, dtype=new.dtype, device=new.device))
        generated = ((ends.cumsum(1) - ends.long()) == 0).sum(1)
        decode_macs = self.cost.decode(record.prompt, record.left, self._pruned, generated)
        return new, replace(record, generated=generated, decode_macs=decode_macs, scores=scores)

    @property
    def _pruned(self) -> int:
        """Layers of the language model after the pruning."""
        return 0 if self.pruning is None else self.cost.depth - self.pruning.layer

    def _prompts(
        self, input_ids: Tensor, images: Tensor | VisualTokens, attention_mask: Tensor | None
    ) -> tuple[Prompts, LlavaRecord]:
        """What the language model reads, and the record."""
        self.check_inference()
        sent = images if isinstance(images, VisualTokens) else self.encode_images(images)
        if len(input_ids) != len(sent):
            raise ValueError(f"{len(input_ids)} prompts for {len(sent)} images")
        visual = sent.tokens.x
        if self.precision in ("int8", "int4"):
            visual = wire.quantise(visual.float(), self.precision).to(visual.dtype)
        if self.cut == "tower":
            visual = self.model.model.multi_modal_projector(visual)
        counts, embed = sent.tokens.layout.counts, self.model.get_input_embeddings()
        firsts = [None] * len(counts) if sent.first is None else sent.first.split(counts)
        embeds, positions, is_visual, weights = [], [], [], []
        sizes = sent.sizes if sent.weighed else torch.ones_like(sent.sizes)
        weight = sizes.to(self.model.dtype).log().split(counts)
        for row, (tokens, first) in enumerate(zip(visual.split(counts), firsts, strict=True)):
            ids = input_ids[row] if attention_mask is None else input_ids[row][attention_mask[row].bool()]
            start, end = self._placeholders(ids, row)
            embeds.append(torch.cat([embed(ids[:start]), tokens.to(self.model.dtype), embed(ids[end:])]))
            here = torch.arange(len(embeds[-1]), device=ids.device)
            is_visual.append((here >= start) & (here < start + len(tokens)))
            weights.append(torch.zeros_like(here, dtype=self.model.dtype).masked_scatter_(is_visual[-1], weight[row]))
            if first is not None:
                tail = here[: len(ids) - end] + start + self.tower.n_features
                here = torch.cat([here[:start], first + start, tail])
            positions.append(here)
        prompt = torch.tensor([len(row) for row in positions], device=input_ids.device)
        there = [torch.ones_like(row, dtype=torch.bool) for row in positions]
        columns = (embeds, there, positions, is_visual, weights)
        prompts = Prompts(*(pad_sequence(rows, batch_first=True, padding_side="left") for rows in columns))
        n, zeros = sent.tokens.lengths, torch.zeros_like(prompt)
        left = prompt if self.pruning is None else prompt - n + self.pruning.left(n)
        prefill_macs = self.cost.prefill(prompt, left, self._pruned)
        return prompts, LlavaRecord(sent, prompt, left, zeros, prefill_macs, zeros)

    def _placeholders(self, ids: Tensor, row: int) -> tuple[int, int]:
        """Where the run of placeholders starts and ends."""
        places = (ids == self.model.config.image_token_id).nonzero().flatten().tolist()
        n = self.tower.n_features
        if len(places) not in (1, n) or any(b - a != 1 for a, b in pairwise(places)):
            form = f"one image per prompt, as a single placeholder or {n} in a row"
            raise ValueError(f"prompt {row} has {len(places)} image placeholders: {form}")
        return places[0], places[-1] + 1


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
    check_policy("output_policy", output_policy, 1)
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
    return MergedLlava(model, tower, output_policy, positions, cut, precision, weights, pruning).train(model.training)


def patch_llava(model: nn.Module, configuration: Configuration) -> MergedLlava:
    """`patch` with a configuration's options; one of a vision transformer has a policy and a precision only."""
    if not isinstance(configuration, LlavaConfiguration):
        configuration = LlavaConfiguration(configuration.policy, configuration.precision)
    # A LLaVA is cut where its tower or its projector ends.
    options = {name: value for name, value in vars(configuration).items() if name not in ("policy", "split_layer")}
    return patch(model, configuration.policy, **options)


def unpatch(merged: MergedLlava) -> LlavaForConditionalGeneration:
    """The model as it was before `patch`."""
    return merged.model


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
