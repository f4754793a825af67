"""How many tiles a block of threads serves in turn, and in which order."""

from __future__ import annotations

import numpy as np
from jax.typing import ArrayLike

from attnx._checks import is_traced
from pallas_kernels.turns import PROCESSORS, in_order, loads

# How short lists are that leave time between tiles, and what a block of threads takes
# to begin and to end, in blocks of keys: a window's nine took a tenth less without it.
_SHORT = 4
_BESIDE = 0.85
# The share of a head's tiles that may be served out of order, and to what share of the
# time that has to lead. Neighbours, served together, share what the cache holds.
_FEW, _GAIN = 0.25, 0.98
# Tiles of gathered rows in turn at most: the numbers of all are in shared memory.
_GATHERED = 32


def tiles_in_turn(
    costs: np.ndarray | None, total: int, *, slots: int, alike: bool = False
) -> tuple[int, int]:
    """Tiles for each block of threads, and how many of a head are served last.

    A tile is begun while the one before it ends. Where lists are known and come to
    about the same, one block of threads is left for each multiprocessor, and where they
    are alike but not known, one or a few. Others are better balanced by blocks that
    start as others end; where lists are short, these serve a few.

    Args:
      costs: of each tile, `[B, N, tiles]`, or None where not known.
      total: B times N times tiles.
      slots: the most blocks that a tile may visit.
      alike: whether tiles visit about as many, if any.
    """
    if costs is not None:
        tiles = -(-total // PROCESSORS)
        apart = (costs.sum() + _BESIDE * total) / PROCESSORS + costs.max() / 2
        # A window lists less for the first tiles of a head.
        first = int((costs < costs.max()).all((0, 1)).argmin())
        few = first if first <= costs.shape[-1] * _FEW else 0
        plain, late = (loads(in_order(costs, x), tiles).max() for x in (0, few))
        if min(plain, late) < apart:
            return tiles, few if late < _GAIN * plain else 0

    def cost(count):
        """Of all tiles, where a block of threads adds half a tile of its own."""
        return -(-total // (count * PROCESSORS)) * (count + 0.5)

    if slots <= _SHORT:
        return min((1, 2, 4, 8), key=cost), 0
    if alike:
        rounds = -(-total // (PROCESSORS * _GATHERED))
        return -(-total // (PROCESSORS * rounds)), 0
    return 1, 0


def tile_costs(
    counts: ArrayLike, shape: tuple[int, int], tiles: int
) -> np.ndarray | None:
    """How many blocks each tile visits, `[B, N, tiles]`, or None where not known.

    Args:
      counts: of the lists, int `[B or 1, N or K or 1, blocks]`.
      shape: B and N.
      tiles: in a block.
    """
    if is_traced(counts):
        return None
    counts = np.repeat(np.asarray(counts), tiles, -1)
    batch, heads = shape
    counts = np.repeat(counts, heads // counts.shape[1], 1)
    return np.broadcast_to(counts, (batch, *counts.shape[1:]))
