"""What other models make of the text: marks to measure a language model against.

All are in nats per byte of the validation text, learnt from the training text, or for
a compressor, the bytes that the validation text adds to the compressed training text.
"""

from __future__ import annotations

import bz2
import lzma
import math
from collections.abc import Callable

import numpy as np

# What `measure` gives (`python -m models anchors`), which takes ten seconds.
ANCHORS = {"bigram": 2.357, "best n-gram": 1.339, "xz": 1.358, "bz2": 1.289}


def measure(train: np.ndarray, validation: np.ndarray) -> dict[str, float]:
    """Measures every anchor on a split of a text, uint8 arrays."""
    ngrams = witten_bell(train, validation, max_order=7)
    preset = 9 | lzma.PRESET_EXTREME
    return {
        "bigram": ngrams[1],
        "best n-gram": min(ngrams),
        "xz": compressed(train, validation, lambda x: lzma.compress(x, preset=preset)),
        "bz2": compressed(train, validation, bz2.compress),
    }


def witten_bell(
    train: np.ndarray, validation: np.ndarray, max_order: int
) -> list[float]:
    """Measures n-gram models for n = 1 to `max_order`, at most 8.

    Each order interpolates with the one below by Witten and Bell's rule (IEEE Trans.
    Inf. Theory 37(4), 1991, method C): a context seen `total` times with `kinds`
    different successors gives `(count + kinds * lower) / (total + kinds)`.
    """
    text = np.concatenate([train, validation])
    probability = np.full(len(validation), 1 / 256)
    losses = []
    for order in range(1, max_order + 1):
        grams, counts = np.unique(_grams(train, order), return_counts=True)
        contexts, first = np.unique(grams >> 8, return_index=True)
        totals = np.add.reduceat(counts, first)
        kinds = np.diff(np.append(first, len(grams)))

        asked = _grams(text[len(train) - order + 1 :], order)
        count = _lookup(grams, counts, asked)
        total = _lookup(contexts, totals, asked >> 8)
        kind = _lookup(contexts, kinds, asked >> 8)
        mixed = (count + kind * probability) / np.maximum(total + kind, 1)
        probability = np.where(total > 0, mixed, probability)
        losses.append(float(-np.log(probability).mean()))
    return losses


def compressed(
    train: np.ndarray, validation: np.ndarray, compress: Callable[[bytes], bytes]
) -> float:
    """Measures what a compressor adds for the validation text after the training."""
    before = compress(train.tobytes())
    after = compress(train.tobytes() + validation.tobytes())
    return (len(after) - len(before)) * 8 * math.log(2) / len(validation)


def _grams(text: np.ndarray, order: int) -> np.ndarray:
    """Every run of `order` bytes as one uint64, its last byte the lowest."""
    grams = np.zeros(len(text) - order + 1, np.uint64)
    for i in range(order):
        grams = (grams << 8) | text[i : i + len(grams)]
    return grams


def _lookup(keys: np.ndarray, values: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """The values of sorted keys, 0 for those that are not there."""
    index = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
    return np.where(keys[index] == asked, values[index], 0)
