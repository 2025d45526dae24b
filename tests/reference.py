"""Plain reference: one image, one token list, Python loops. Shares no code with the package."""

import math
from dataclasses import dataclass

import torch


@dataclass
class Layer:
    """What is decided on at one layer of one image."""

    index: int
    heads: torch.Tensor  # (H, N, d) what is matched, by its mean over heads; the tokens themselves are one head
    attention: list  # the first token's to all, mean over heads
    sizes: list
    groups: list  # each token's set of originals
    protected: int

    @property
    def matches(self):
        return best_matches(self.heads, self.protected)


def best_matches(heads, protected):
    """{a: (similarity, b)} for the unprotected tokens, alternating between A and B."""
    metric = heads.mean(0)
    free = list(range(protected, metric.shape[0]))
    return {a: best for a in free[0::2] if (best := most_similar(metric, a, free[1::2]))}


def most_similar(metric, a, candidates):
    """(similarity, b); None without candidates."""
    pairs = [(torch.nn.functional.cosine_similarity(metric[a], metric[b], dim=0).item(), b) for b in candidates]
    return max(pairs, key=lambda pair: pair[0], default=None)


def largest(matches, r):
    """The r pairs (a, b) of highest score."""
    return [(a, matches[a][1]) for a in sorted(matches, key=lambda a: (-matches[a][0], a))[:r]]


def threshold_choice(thresholds):
    def decide(layer):
        tau = thresholds[layer.index]
        return {"pairs": [(a, b) for a, (c, b) in layer.matches.items() if c > tau] if tau < 1 else []}

    return decide


def top_r_choice(r):
    """The r best pairs, as many as half of the unprotected tokens at most."""
    return lambda layer: {
        "pairs": largest(layer.matches, min(r[layer.index], (len(layer.sizes) - layer.protected) // 2))
    }


def combine(tokens, sizes, groups, pairs, dropped=(), weights=None, keep_norm=False):
    """What becomes of one image's tokens: weighted means (by size), sizes and groups; survivors keep their order."""
    weights = sizes if weights is None else weights
    members = {i: [i] for i in range(len(tokens))}
    for a, b in pairs:
        members[b].append(a)
    left = [i for i in range(len(tokens)) if i not in dropped and i not in dict(pairs)]
    values = []
    for i in left:
        value = sum(tokens[j] * weights[j] for j in members[i]) / sum(weights[j] for j in members[i])
        if keep_norm and len(members[i]) > 1:
            value = value * max(tokens[j].norm() for j in members[i]) / value.norm()
        values.append(value)
    return (
        torch.stack(values),
        [sum(sizes[j] for j in members[i]) for i in left],
        [set().union(*(groups[j] for j in members[i])) for i in left],
    )


def merge_once(x, sizes, groups, decide):
    """`combine` of tokens by themselves, none of them protected."""
    return combine(x, sizes, groups, **decide(Layer(0, x[None], [], sizes, groups, 0)))


def attend(q, k, v, sizes):
    """Proportional attention of (N, H, d), head by head: (N, H d), and what the first token attends to."""
    heads, first = [], []
    for h in range(q.shape[1]):
        scores = q[:, h] @ k[:, h].T / math.sqrt(q.shape[2]) + torch.tensor(sizes, dtype=q.dtype).log()
        heads.append(scores.softmax(1) @ v[:, h])
        first.append(scores[0].softmax(0))
    return torch.cat(heads, dim=1), torch.stack(first).mean(0).tolist()


def vit_layer(block, x, sizes):
    """A timm block's attention: what it adds, its keys (H, N, d), and what the first token attends to."""
    attn, x = block.attn, block.norm1(x)
    q, k, v = attn.qkv(x).reshape(len(x), 3, attn.num_heads, attn.head_dim).unbind(1)
    q, k = attn.q_norm(q), attn.k_norm(k)
    out, first = attend(q, k, v, sizes)
    out = attn.norm(out)
    out = out if attn.gate is None else out * torch.sigmoid(attn.gate(x))
    return block.ls1(attn.proj(out)), k.transpose(0, 1), first


def tower_layer(block, x, sizes):
    attn, x = block.self_attn, block.layer_norm1(x)
    q, k, v = (part(x).view(len(x), attn.num_heads, attn.head_dim) for part in (attn.q_proj, attn.k_proj, attn.v_proj))
    out, first = attend(q, k, v, sizes)
    return attn.out_proj(out), k.transpose(0, 1), first


def run_layers(x, blocks, attention, mlp, protected, decide, feature):
    """Tokens (N, D) after all blocks, token counts before each and at the end, sizes, groups."""
    sizes, groups, counts = [1.0] * len(x), [{i} for i in range(len(x))], [len(x)]
    for index, block in enumerate(blocks):
        out, keys, first = attention(block, x, sizes)
        x = x + out
        layer = Layer(index, x[None] if feature == "tokens" else keys, first, sizes, groups, protected)
        x, sizes, groups = combine(x, sizes, groups, **decide(layer))
        x = x + mlp(block, x)
        counts.append(len(x))
    return x, counts, sizes, groups


def run(model, image, decide, feature="tokens"):
    """One image (C, H, W) through a timm ViT with merging: logits, token counts, sizes, groups.

    ``decide(layer)`` gives `combine`'s further arguments.
    """
    x = model.norm_pre(model._pos_embed(model.patch_embed(image[None])))[0]
    mlp = lambda block, x: block.ls2(block.mlp(block.norm2(x)))  # noqa: E731
    x, *rest = run_layers(x, model.blocks, vit_layer, mlp, model.num_prefix_tokens, decide, feature)
    sizes, x = rest[1], model.norm(x)
    first = 0 if model.pool_include_prefix else model.num_prefix_tokens
    # Repeating a token s times is what the log-size term, and a mean by sizes, mean.
    repeated = torch.cat([x[i : i + 1].repeat(int(sizes[i]), 1) for i in range(first, len(x))])
    if model.global_pool == "token":
        return model.forward_head(x[None])[0], *rest
    if model.global_pool == "map":
        pooled = model.attn_pool(repeated[None])
    else:
        mean, peak = repeated.mean(0), repeated.amax(0)
        pooled = {"avg": mean, "max": peak, "avgmax": 0.5 * (mean + peak)}[model.global_pool][None]
    return model.head(model.fc_norm(pooled))[0], *rest


def run_tower(tower, image, decide, layer, skip, feature="tokens"):
    """One image through a tower's first layers: features, token counts, sizes, groups of patches."""
    x, clip = tower.embeddings(image[None]), hasattr(tower, "pre_layrnorm")
    x = (tower.pre_layrnorm(x) if clip else x)[0]
    mlp = lambda block, x: block.mlp(block.layer_norm2(x))  # noqa: E731
    blocks, protected = tower.encoder.layers[:layer], max(skip, clip)
    x, counts, sizes, groups = run_layers(x, blocks, tower_layer, mlp, protected, decide, feature)
    return x[skip:], counts, sizes[skip:], [{token - skip for token in group} for group in groups[skip:]]
