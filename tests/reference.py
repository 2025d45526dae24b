"""Plain reference: one image, one token list, Python loops. Shares no code with the package."""

import math

import torch


def threshold_choice(thresholds):
    def choose(layer, pairs):
        return [a for a, (c, _) in pairs.items() if c > thresholds[layer]] if thresholds[layer] < 1 else []

    return choose


def top_r_choice(r):
    def choose(layer, pairs):
        return sorted(pairs, key=lambda a: (-pairs[a][0], a))[: r[layer]]

    return choose


def attention(attn, x, sizes):
    """One image's proportional attention, head by head; returns output (N, D) and keys (H, N, d)."""
    n = len(x)
    qkv = attn.qkv(x).reshape(n, 3, attn.num_heads, attn.head_dim)
    heads, keys = [], []
    for h in range(attn.num_heads):
        q, k, v = attn.q_norm(qkv[:, 0, h]), attn.k_norm(qkv[:, 1, h]), qkv[:, 2, h]
        weights = torch.softmax(q @ k.T / math.sqrt(attn.head_dim) + torch.tensor(sizes, dtype=x.dtype).log(), dim=1)
        heads.append(weights @ v)
        keys.append(k)
    out = attn.norm(torch.cat(heads, dim=1))
    if attn.gate is not None:
        out = out * torch.sigmoid(attn.gate(x))
    return attn.proj(out), torch.stack(keys)


def best_matches(keys, protected):
    """{a: (similarity, b)} for the unprotected tokens, alternating between A and B.

    keys: (H, N, d), matched by their mean over heads; the tokens themselves are one head.
    """
    metric = keys.mean(0)
    free = list(range(protected, metric.shape[0]))
    set_a, set_b = free[0::2], free[1::2]
    pairs = {}
    for a in set_a:
        best = None
        for b in set_b:
            c = torch.nn.functional.cosine_similarity(metric[a], metric[b], dim=0).item()
            if best is None or c > best[0]:
                best = (c, b)
        if best is not None:
            pairs[a] = best
    return pairs


def merge_tokens(tokens, sizes, groups, pairs, chosen):
    """Size-weighted means; survivors keep their order."""
    totals = [t * s for t, s in zip(tokens, sizes, strict=True)]
    sizes, groups = list(sizes), [set(g) for g in groups]
    for a in chosen:
        b = pairs[a][1]
        totals[b] = totals[b] + tokens[a] * sizes[a]
        sizes[b] += sizes[a]
        groups[b] |= groups[a]
    keep = [i for i in range(len(tokens)) if i not in set(chosen)]
    return [totals[i] / sizes[i] for i in keep], [sizes[i] for i in keep], [groups[i] for i in keep]


def embed(model, image):
    return model.norm_pre(model._pos_embed(model.patch_embed(image[None])))[0]


def run(model, image, choose, feature="tokens"):
    """One image (C, H, W) through a timm ViT with merging.

    Returns logits, token counts entering each block and after the last, sizes, and each token's set of originals.
    """
    x = embed(model, image)
    sizes, groups, counts = [1.0] * len(x), [{i} for i in range(len(x))], [len(x)]
    for layer, block in enumerate(model.blocks):
        out, keys = attention(block.attn, block.norm1(x), sizes)
        x = x + block.ls1(out)
        pairs = best_matches(x[None] if feature == "tokens" else keys, model.num_prefix_tokens)
        chosen = choose(layer, pairs)
        tokens, sizes, groups = merge_tokens(list(x), sizes, groups, pairs, chosen)
        x = torch.stack(tokens)
        x = x + block.ls2(block.mlp(block.norm2(x)))
        counts.append(len(x))
    x = model.norm(x)
    first = 0 if model.pool_include_prefix else model.num_prefix_tokens
    if model.global_pool == "token":
        logits = model.forward_head(x[None])[0]
    elif model.global_pool == "map":
        # Repeating a token s times is what the log-size term means.
        repeated = torch.cat([x[i : i + 1].repeat(int(sizes[i]), 1) for i in range(first, len(x))])
        logits = model.head(model.fc_norm(model.attn_pool(repeated[None])))[0]
    else:
        repeated = torch.cat([x[i : i + 1].repeat(int(sizes[i]), 1) for i in range(first, len(x))])
        mean, peak = repeated.mean(0), repeated.amax(0)
        pooled = {"avg": mean, "max": peak, "avgmax": 0.5 * (mean + peak)}[model.global_pool]
        logits = model.head(model.fc_norm(pooled[None]))[0]
    return logits, counts, sizes, groups


def run_tower(tower, image, choose, layer, skip, feature="tokens"):
    """One image through the tower, token by token: features, token counts, sizes and each token's patches."""
    x = tower.embeddings(image[None])
    x = (tower.pre_layrnorm(x) if hasattr(tower, "pre_layrnorm") else x)[0]
    first = max(skip, hasattr(tower, "pre_layrnorm"))
    sizes, groups, counts = [1.0] * len(x), [{i} for i in range(len(x))], [len(x)]
    for index, block in enumerate(tower.encoder.layers[:layer]):
        attn, normed = block.self_attn, block.layer_norm1(x)
        heads, keys = [], []
        for h in range(attn.num_heads):
            part = slice(h * attn.head_dim, (h + 1) * attn.head_dim)
            q, k, v = (p(normed)[:, part] for p in (attn.q_proj, attn.k_proj, attn.v_proj))
            weights = torch.softmax(q @ k.T / math.sqrt(attn.head_dim) + torch.tensor(sizes, dtype=x.dtype).log(), 1)
            heads.append(weights @ v)
            keys.append(k)
        x = x + attn.out_proj(torch.cat(heads, dim=1))
        pairs = best_matches(x[None] if feature == "tokens" else torch.stack(keys), first)
        tokens, sizes, groups = merge_tokens(list(x), sizes, groups, pairs, choose(index, pairs))
        x = torch.stack(tokens)
        x = x + block.mlp(block.layer_norm2(x))
        counts.append(len(x))
    return x[skip:], counts, sizes[skip:], groups[skip:]
