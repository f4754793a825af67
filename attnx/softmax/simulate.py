"""What a neighborhood costs in tiles, counted before anything is run.

A kernel works on whole tiles: a speed-up over dense attention cannot exceed the share
of tiles that it skips. Counts along the axes multiply (see `tile_lists`), so any size
takes no time. NATTEN's "theoretical max" is the same count for the worst tile
(arXiv 2504.16922, section 3).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable

import numpy as np

from attnx._checks import expect
from attnx.softmax.neighborhood import Window1D, fits_word, windows
from attnx.softmax.tile_lists import query_runs

Tile = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Simulation:
    """What `simulate` counted. Printed, it says so in words.

    Attributes:
      axes: the neighborhood, one `Window1D` an axis.
      query_tile: tokens of a tile of queries along each axis.
      key_tile: tokens of a tile of keys along each axis.
      visited: tiles of keys that a tile of queries visits, on average.
      worst: the most that one visits.
      dense: how many there are in dense attention, which pads no axis.
      partial: the share of visited tiles with pairs to hide, 0 to 1.
      density: the share of pairs in visited tiles that are visible, 0 to 1.
      bound: the most that skipping tiles can speed up dense attention.
      worst_bound: the same if every tile visited as many as the worst one.
    """

    axes: tuple[Window1D, ...]
    query_tile: Tile
    key_tile: Tile
    visited: float
    worst: int
    dense: int
    partial: float
    density: float
    bound: float
    worst_bound: float

    @property
    def stride(self) -> tuple[int, ...]:
        return tuple(axis.stride for axis in self.axes)

    def __str__(self):
        def each(name):
            return _times(getattr(axis, name) for axis in self.axes)

        causal = any(axis.is_causal for axis in self.axes)
        return (
            f"{each('length')} tokens, kernel {each('kernel_size')}, "
            f"stride {each('stride')}, dilation {each('dilation')}"
            + (f", causal {each('is_causal')}" if causal else "")
            + f"\ntiles of {_times(self.query_tile)} queries visit {self.visited:.1f} "
            f"of {self.dense} tiles of {_times(self.key_tile)} keys, at most "
            f"{self.worst}\n{self.partial:.0%} of them in part; "
            f"{self.density:.0%} of their pairs visible\n"
            f"at most {self.bound:.2f} times faster than dense "
            f"({self.worst_bound:.2f} by the worst tile)"
        )


def simulate(
    shape: tuple[int, ...],
    kernel_size: int | tuple[int, ...],
    stride: int | tuple[int, ...] = 1,
    dilation: int | tuple[int, ...] = 1,
    is_causal: bool | tuple[bool, ...] = False,
    tile: Tile | tuple[Tile, Tile] | None = None,
) -> Simulation:
    """Counts the tiles that a neighborhood visits, and what that bounds.

    Args:
      shape: the axes' lengths, 1 to 3 of them.
      kernel_size: as in `neighborhood_attention`, and so the next three.
      stride: queries in a row that share a window.
      dilation: distance between the keys of a window.
      is_causal: whether later keys along the axis are hidden.
      tile: tokens of a tile along each axis, or a pair of them for queries and for
        keys; by default `best_tile`.

    Returns:
      The counts, a `Simulation`.

    Raises:
      ValueError: options or tiles that do not fit the shape.

    Example:
      FLUX at 4K, where NATTEN states 6.1 times at most:

      >>> from attnx import neighborhood
      >>> print(neighborhood.simulate((256, 256), 80, tile=((16, 16), (16, 8))))
      256 x 256 tokens, kernel 80 x 80, stride 1 x 1, dilation 1 x 1
      tiles of 16 x 16 queries visit 72.5 of 512 tiles of 16 x 8 keys, at most 84
      57% of them in part; 69% of their pairs visible
      at most 7.06 times faster than dense (6.10 by the worst tile)
    """
    axes = windows(shape, kernel_size, stride, dilation, is_causal)
    pair = _pair(best_tile(axes) if tile is None else tile, len(axes))
    return _simulation(axes, *pair)


def perfect(
    shape: tuple[int, ...],
    kernel_size: int | tuple[int, ...],
    dilation: int | tuple[int, ...] = 1,
    is_causal: bool | tuple[bool, ...] = False,
    tiles: Iterable[Tile | tuple[Tile, Tile]] | None = None,
) -> list[Simulation]:
    """Finds the strides and tiles that leave no visited tile seen in part.

    Such a neighborhood is block-sparse attention: it does no work that it throws away,
    and needs no predicate.

    Args:
      shape: the axes' lengths, 1 to 3 of them.
      kernel_size: keys attended along each axis.
      dilation: distance between the keys of a window.
      is_causal: whether later keys along the axis are hidden.
      tiles: tiles as in `simulate`; by default those of 128 tokens whose sizes are
        powers of two, none longer than it has to be.

    Returns:
      One `Simulation` for each, the best bound first, among equals the smallest
      strides, and the tiles nearest to a cube. Of strides that make the same windows
      the smallest stands for all.

    Raises:
      ValueError: options or tiles that do not fit the shape.

    Example:
      >>> from attnx import neighborhood
      >>> best = neighborhood.perfect((30, 48, 80), (18, 24, 24))[0]
      >>> best.stride, best.key_tile, round(best.bound, 1)
      ((2, 8, 8), (2, 8, 8), 11.1)
    """
    axes = windows(shape, kernel_size, 1, dilation, is_causal)
    found = []
    for tile in _candidates(axes, 128) if tiles is None else tiles:
        query_tile, key_tile = _pair(tile, len(axes))
        strides = map(_perfect_strides, axes, query_tile, key_tile)
        for strided in itertools.product(*strides):
            found.append(_simulation(strided, query_tile, key_tile))
    return sorted(
        found,
        key=lambda it: (-it.bound, math.prod(it.stride), sum(it.query_tile), it.stride),
    )


def best_tile(axes: tuple[Window1D, ...], tokens: int = 128) -> Tile:
    """The tile of `tokens` tokens with which the fewest tiles are visited.

    Its sizes are powers of two, each at most the next one from the length of a dilation
    group; where that leaves room for fewer tokens, the tile has fewer. Tiles with which
    a kernel's predicate is cheap (`TiledNeighborhood.at`) come before all others.

    Args:
      axes: from `windows`.
      tokens: a power of two.

    Returns:
      Tokens of the tile along each axis.

    Raises:
      ValueError: `tokens` is no power of two.

    Example:
      >>> from attnx import neighborhood
      >>> neighborhood.best_tile(neighborhood.windows((121, 256, 256), 11))
      (2, 8, 8)
    """
    fits = tokens >= 1 and tokens & (tokens - 1) == 0
    expect(fits, "tokens", "a power of two", tokens)

    def cost(tile):
        counts = _counts(axes, tile, tile)
        visited, full = (math.prod(getattr(c, n) for c in counts) for n in _TOTALS)
        # Among equals, fewest partial tiles, then nearest to a cube, then rows.
        return not fits_word(tile), visited, -full, sum(tile), tile

    return min(_candidates(axes, tokens), key=cost)


@dataclasses.dataclass(frozen=True)
class _Count:
    """One axis: tiles of queries with a token, what they visit, and visible pairs."""

    tiles: int
    visited: int
    full: int
    worst: int
    pairs: int


_TOTALS = ("visited", "full")


@functools.lru_cache(maxsize=1 << 14)
def _count(axis, query_size, key_size):
    runs = query_runs(axis, query_size, key_size)
    start, end = _windows(axis)
    return _Count(
        tiles=int((runs.count > 0).sum()),
        visited=int(runs.count.sum()),
        full=int(runs.full_count.sum()),
        worst=int(runs.count.max()),
        pairs=int((end - start).sum()),
    )


def _counts(axes, query_tile, key_tile):
    return tuple(map(_count, axes, query_tile, key_tile))


def _windows(axis):
    """Where the window of each token of an axis starts and ends."""
    return axis.range(*axis.split(np.arange(axis.length)), np)


def _simulation(axes, query_tile, key_tile):
    counts = _counts(axes, query_tile, key_tile)
    total = {
        field.name: math.prod(getattr(count, field.name) for count in counts)
        for field in dataclasses.fields(_Count)
    }
    tokens = math.prod(axis.length for axis in axes)
    dense_queries, dense = (
        -(-tokens // math.prod(tile)) for tile in (query_tile, key_tile)
    )
    visited = total["visited"]
    return Simulation(
        axes=axes,
        query_tile=query_tile,
        key_tile=key_tile,
        visited=visited / total["tiles"],
        worst=total["worst"],
        dense=dense,
        partial=1 - total["full"] / visited,
        density=total["pairs"] / (visited * math.prod(query_tile + key_tile)),
        bound=dense_queries * dense / visited,
        worst_bound=dense / total["worst"],
    )


def _perfect_strides(axis, query_size, key_size):
    """The axis with each stride for which no tile is visited in part."""
    found = {}
    for stride in range(1, axis.kernel_size + 1):
        strided = dataclasses.replace(axis, stride=stride)
        count = _count(strided, query_size, key_size)
        if count.full == count.visited:
            start, _ = _windows(strided)
            found.setdefault(start.tobytes(), strided)
    return list(found.values())


def _candidates(axes, tokens):
    """Tiles of `tokens` tokens, or of as many as fit."""
    longest = [
        1 << (-(-axis.length // axis.dilation) - 1).bit_length() for axis in axes
    ]
    tokens = min(tokens, math.prod(longest))  # A power of two as well.
    sizes = [[1 << i for i in range(min(n, tokens).bit_length())] for n in longest]
    return [tile for tile in itertools.product(*sizes) if math.prod(tile) == tokens]


def _pair(tile, rank):
    """The tiles of queries and of keys from either."""
    expect(isinstance(tile, tuple | list), "tile", "one tile or a pair", tile)
    paired = len(tile) == 2 and all(isinstance(one, tuple | list) for one in tile)
    query_tile, key_tile = map(tuple, tile if paired else (tile, tile))
    for one in (query_tile, key_tile):
        fits = len(one) == rank and all(isinstance(n, int) and n >= 1 for n in one)
        expect(fits, "tile", f"{rank} sizes of at least 1, or a pair of such", tile)
    return query_tile, key_tile


def _times(values):
    return " x ".join(str(value) for value in values)
