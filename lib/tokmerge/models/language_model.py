"""The language model of a LLaVA, run layer by layer: two things its own forward has no place for.

*Weighed tokens.* A merged visual token stands for s patches. With the sizes known, attention in every layer is
softmax_j(q_i.k_j / sqrt(d) + log s_j), as in the tower: the token counts as often as the patches would have.
A language model that compares and counts needs that; one that looks for things does well without.

*Pruning.* FastV (Chen et al., 2403.06764), written anew: after its first layers, only the visual tokens that the
last prompt token attends to most are kept, for the remaining layers and for their cache.

Without either this is the model's own greedy generation. Only layers, norm, rotary embedding and head are called.

Prompts that begin alike, as questions about one image do, may have their beginning read once (`read_beginnings`).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tokmerge.io.extras import extra

with extra("llava"):
    from transformers import DynamicCache

from tokmerge.models.configuration import Pruning


class Prompts(NamedTuple):
    """B left-padded prompts."""

    x: Tensor  #: (B, S, D) embeddings, hidden states later on; of the last places only where others have been read
    there: Tensor  #: (B, S) bool, False where padded
    positions: Tensor  #: (B, S) int64
    visual: Tensor  #: (B, S) bool, which are the image's tokens
    weight: Tensor  #: (B, S) log of the patches each counts for

    @classmethod
    def padded(cls, rows: Sequence[Sequence[Tensor]]) -> "Prompts":
        """Of each prompt its embeddings (S, D), positions (S,), which are visual (S,) and weights (S,)."""
        x, positions, visual, weight = zip(*rows, strict=True)
        there = [torch.ones_like(row, dtype=torch.bool) for row in positions]
        columns = (x, there, positions, visual, weight)
        return cls(*(pad_sequence(list(part), batch_first=True, padding_side="left") for part in columns))

    def bias(self, queries: int) -> Tensor:
        """(B, 1, queries, S) what is added to the attention scores of the last positions."""
        n, least = self.there.shape[1], torch.finfo(self.x.dtype).min
        keys = self.weight.masked_fill(~self.there, least)
        later = torch.ones(queries, n, dtype=torch.bool, device=keys.device).triu(n - queries + 1)
        return keys[:, None, None, :].masked_fill(later, least)

    def take(self, index: Tensor, there: Tensor) -> "Prompts":
        """The places ``index`` (B, S') of every prompt, those of them that are ``there``."""
        x = self.x.gather(1, index[..., None].expand(-1, -1, self.x.shape[2]))
        return Prompts(x, there, *(part.gather(1, index) for part in self[2:]))

    def then(self, x: Tensor) -> "Prompts":
        """One more token each: x (B, D). Its position comes after the largest so far."""
        after = self.positions.masked_fill(~self.there, -1).amax(1, keepdim=True) + 1
        true = torch.ones_like(after, dtype=torch.bool)
        new = (x[:, None], true, after, ~true, torch.zeros_like(self.weight[:, :1]))
        return Prompts(*(torch.cat(pair, 1) for pair in zip(self, new, strict=True)))


def read(model: Any, prompts: Prompts, pruning: Pruning | None = None, cache: DynamicCache | None = None) -> Prompts:
    """A LLaVA's language model on prompts: their last hidden states, without the pruned visual tokens.

    The cache gets the keys and values of every layer; it has those of the places that ``prompts.x`` leaves out.
    """
    window, n = getattr(model.config.text_config, "sliding_window", None), prompts.there.shape[1]
    if window and n > window:
        raise ValueError(f"a prompt of {n} tokens exceeds the sliding window of {window}")
    cache = DynamicCache() if cache is None else cache
    before = prompts
    for index in range(len(model.model.language_model.layers)):
        if pruning is not None and index == pruning.layer:
            prompts = _prune(model, before, prompts, pruning, cache)
        before, prompts = prompts, prompts._replace(x=_layer(model, index, prompts, prompts.x, cache))
    return prompts._replace(x=model.model.language_model.norm(prompts.x))


def read_beginnings(model: Any, beginnings: Prompts, rest: Prompts, owner: Tensor) -> tuple[Prompts, DynamicCache]:
    """Read what prompts begin with, once for all that share it.

    Args:
        model: the LLaVA.
        beginnings: n of them.
        rest: what follows, of B prompts.
        owner: (B,) int64, the beginning of each.

    Returns:
        The B prompts, of which ``rest.x`` is still to be read, and the cache for that.
    """
    cache = DynamicCache()
    read(model, beginnings, cache=cache)
    cache.batch_select_indices(owner)
    pairs = zip(beginnings[1:], rest[1:], strict=True)
    return Prompts(rest.x, *(torch.cat([first[owner], second], 1) for first, second in pairs)), cache


def generate_answers(
    model: Any, prompts: Prompts, max_new_tokens: int, pruning: Pruning | None, cache: DynamicCache | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Greedy answers: (B, longest) int64 new tokens, padded after the end of text.

    And (B,) how many of them there are, end of text included; (B, vocabulary) scores of the first. Arguments as in
    `read`; ``max_new_tokens`` is the longest answer.
    """
    cache, layers = cache or DynamicCache(), model.model.language_model.layers
    left = read(model, prompts, pruning, cache)
    first = scores = model.lm_head(left.x[:, -1])
    # Layers before the pruning go on with all tokens, those after it with what is left.
    split = len(layers) if pruning is None else pruning.layer
    ends, pad, new = ends_of_text(model), model.generation_config.pad_token_id or 0, []
    done = torch.zeros_like(first[:, 0], dtype=torch.bool)
    generated = torch.zeros_like(done, dtype=torch.int64)
    while True:
        token = scores.argmax(1).masked_fill(done, pad)
        new.append(token)
        generated = generated + ~done
        done = done | torch.isin(token, ends)
        if len(new) == max_new_tokens or done.all():
            return torch.stack(new, 1), generated, first
        x = model.get_input_embeddings()(token)
        prompts, left = prompts.then(x), left.then(x)
        x = x[:, None]
        for index in range(len(layers)):
            x = _layer(model, index, prompts if index < split else left, x, cache)
        scores = model.lm_head(model.model.language_model.norm(x)[:, -1])


def ends_of_text(model: Any) -> Tensor:
    """Tokens that end an answer, int64."""
    ends = model.generation_config.eos_token_id
    return torch.tensor([] if ends is None else ends, dtype=torch.int64, device=model.device).flatten()


def _layer(model: Any, index: int, prompts: Prompts, x: Tensor, cache: DynamicCache) -> Tensor:
    """One layer on the last places x (B, Q, D) of the prompts."""
    language, queries = model.model.language_model, x.shape[1]
    positions = prompts.positions[:, -queries:]
    return language.layers[index](
        x, attention_mask=prompts.bias(queries), position_ids=positions, past_key_values=cache, use_cache=True,
        position_embeddings=language.rotary_emb(x, position_ids=positions),
    )  # fmt: skip


def _prune(model: Any, before: Prompts, after: Prompts, pruning: Pruning, cache: DynamicCache) -> Prompts:
    """What is left after a layer, given what went into it."""
    attention = last_attention(model, pruning.layer - 1, before, cache)
    rank = attention.masked_fill(~after.visual, -1.0).argsort(dim=1, descending=True, stable=True).argsort(1)
    keep = after.there & (~after.visual | (rank < pruning.left(after.visual.sum(1))[:, None]))
    # Padding on the left again, what stays in its order.
    index = keep.long().argsort(dim=1, stable=True)[:, -int(keep.sum(1).max()) :]
    return after.take(index, keep.gather(1, index))


def last_attention(model: Any, index: int, prompts: Prompts, cache: Any) -> Tensor:
    """(B, S) what each prompt's last token attends to in a layer, mean over heads; given is what goes into it."""
    layer, keys = model.model.language_model.layers[index], cache.layers[index].keys
    x, attn = prompts.x[:, -1:], layer.self_attn
    query = attn.q_proj(layer.input_layernorm(x)).view(len(x), -1, 1, attn.head_dim)
    cos, sin = model.model.language_model.rotary_emb(x, position_ids=prompts.positions[:, -1:])
    low, high = query.chunk(2, dim=-1)
    query = query * cos[:, None] + torch.cat([-high, low], dim=-1) * sin[:, None]
    keys = keys.repeat_interleave(query.shape[1] // keys.shape[1], dim=1)
    return ((query @ keys.mT) * attn.scaling + prompts.bias(1)).float().softmax(-1).mean(1)[:, 0]
