"""Merging on a CPU in one compiled loop, where numba is installed (``pip install 'tokmerge[fast]'``).

The layers of one image are small, and calls take most of their time: this is one call for two dozen of torch's and
numpy's. What comes out is the same to the bit.
"""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

INSTALLED = find_spec("numba") is not None


def serves(values: Tensor) -> bool:
    """Whether the loop takes these: float32 on a CPU, which nobody differentiates."""
    return INSTALLED and values.dtype == torch.float32 and values.device.type == "cpu" and not values.requires_grad


def merge_pairs(
    scores: Tensor, values: Tensor, sizes: Tensor, lengths: Tensor, first: int, above: float | Tensor,
    most: int | Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Take the most similar pairs, and average them.

    Args:
        scores: (B, A, b) similarities of each image's sets A and B, those beyond its end -inf.
        values, sizes: (T, D) and (T,) of the packed tokens.
        lengths: (B,) tokens of each image.
        first: leading ones that never merge.
        above, most: as of `tokmerge.merging.matching.Matches.take`.

    Returns:
        Values and sizes of the tokens that are left, (B,) how many each image has, and (T,) where every token now is.
    """
    limits = above[:, 0].numpy() if isinstance(above, Tensor) else np.array([above], np.float32)
    most = len(values) if most is None else most
    numbers = most[:, 0].numpy() if isinstance(most, Tensor) else np.array([most])
    found = _loop()(scores.numpy(), values.numpy(), sizes.numpy(), lengths.numpy(), first, limits, numbers)
    merged, added, left, row = map(torch.from_numpy, found)
    return merged, added, left, row


@cache
def _loop() -> Callable[..., Any]:
    """`_merge_pairs` as machine code, kept on disk where that can be written to."""
    from numba import njit

    try:
        return njit(cache=True, nogil=True)(_merge_pairs)
    except RuntimeError:
        return njit(nogil=True)(_merge_pairs)


def _merge_pairs(scores: Any, values: Any, sizes: Any, lengths: Any, first: int, above: Any, most: Any) -> Any:
    (n_images, n, width), (n_rows, columns) = scores.shape, values.shape
    # As integers in the order of the numbers the largest is found many at a time; a NaN is larger than all else.
    magnitude, infinity = np.int32(0x7FFFFFFF), np.int32(0x7F800000)
    bits, keys = scores.view(np.int32), np.empty(width, np.int32)
    best, similarity = np.empty(n, np.int64), np.empty(n, np.float32)
    src, dst = np.empty(n_images * n, np.int64), np.empty(n_images * n, np.int64)
    left, count, start = lengths.copy(), 0, first
    for image in range(n_images):
        # One for all images, or one for each.
        limit, number = above[min(image, len(above) - 1)], most[min(image, len(most) - 1)]
        in_a = (lengths[image] - first + 1) // 2
        for a in range(in_a):
            largest = -magnitude
            for b in range(width):
                bit = bits[image, a, b]
                key = magnitude if bit & magnitude > infinity else bit ^ ((bit >> 31) & magnitude)
                # Zero is zero, whatever its sign.
                keys[b] = key = max(key, np.int32(0)) if key == -1 else key
                largest = max(largest, key)
            place = 0
            while keys[place] != largest:
                place += 1
            best[a], similarity[a] = place, scores[image, a, place]
        chosen = similarity[:in_a] > limit
        if chosen.sum() > number:
            among = np.flatnonzero(chosen)
            order = np.argsort(-similarity[among], kind="mergesort")
            chosen[among[order[number:]]] = False
        for a in range(in_a):
            if chosen[a]:
                src[count], dst[count] = start + 2 * a, start + 2 * best[a] + 1
                count += 1
        left[image] -= chosen.sum()
        start += lengths[image]

    alive, received = np.ones(n_rows, np.bool_), np.zeros(n_rows, np.float64)
    for i in range(count):
        alive[src[i]] = False
        received[dst[i]] += sizes[src[i]]
    total, row = sizes + received.astype(np.float32), np.empty(n_rows, np.int64)
    for old in range(n_rows):
        row[old] = (row[old - 1] if old else -1) + alive[old]
    n_left = n_rows - count
    merged, added = np.empty((n_left, columns), np.float32), np.empty(n_left, np.float32)
    for old in range(n_rows):
        if alive[old]:
            added[row[old]] = total[old]
            for column in range(columns):
                merged[row[old], column] = values[old, column]
    for i in range(count):
        own = sizes[dst[i]] / total[dst[i]]
        for column in range(columns):
            merged[row[dst[i]], column] = values[dst[i], column] * own
    for i in range(count):
        sent = sizes[src[i]] / total[dst[i]]
        for column in range(columns):
            merged[row[dst[i]], column] += values[src[i], column] * sent
        row[src[i]] = row[dst[i]]
    return merged, added, left, row
