"""Which tiles a neighborhood visits, without a map of all pairs of tiles.

The windows of neighbouring queries overlap and move one way. So along an axis the tiles
that a tile of queries visits are a run, and those it sees whole are a run inside it;
over the axes both are boxes. Four numbers for each tile of each axis say it all, and
the program counts its lists out of them: work and memory follow the visited tiles.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from attnx.softmax.block_mask import BlockMask
from attnx.softmax.neighborhood import TiledNeighborhood, Window1D, tile_grid


@dataclasses.dataclass(frozen=True)
class Runs:
    """Tiles along one axis that each tile visits, all int32 `[dilation, tiles]`.

    Both runs are numbers of tiles of the same dilation group. The second lies inside
    the first. A tile of padding alone visits nothing.

    Attributes:
      first: where the run of visited tiles starts.
      count: its length.
      full_first: where the run of those with every pair visible starts.
      full_count: its length.
    """

    first: np.ndarray
    count: np.ndarray
    full_first: np.ndarray
    full_count: np.ndarray

    @classmethod
    def of(cls, first, stop, full_first, full_stop) -> Runs:
        count = np.maximum(stop - first, 0)
        full_count = np.where(count > 0, np.maximum(full_stop - full_first, 0), 0)
        first = np.where(count > 0, first, 0)
        full_first = np.where(full_count > 0, full_first, first)
        arrays = (first, count, full_first, full_count)
        return cls(*(x.astype(np.int32) for x in arrays))


def query_runs(axis: Window1D, query_size: int, key_size: int) -> Runs:
    """The tiles of `key_size` keys that each tile of `query_size` queries visits."""
    return Runs.of(*_edges(axis, query_size, key_size))


def key_runs(axis: Window1D, query_size: int, key_size: int) -> Runs:
    """The transpose: the tiles of queries that visit each tile of keys."""
    first, stop, full_first, full_stop = _edges(axis, query_size, key_size)
    keys = np.arange(tile_grid((axis,), (key_size,))[0])
    rows = []
    for group in range(axis.dilation):
        length = -(-axis.group_length(group, np) // query_size)
        # No edge of a run moves back from one tile of queries to the next.
        rows.append(
            [
                np.searchsorted(edge[group, :length], keys, "right")
                for edge in (stop, first, full_stop, full_first)
            ]
        )
    return Runs.of(*np.stack(rows, 1))


def tile_lists(axes: tuple[Window1D, ...], tile: tuple[int, ...]) -> BlockMask:
    """The block lists of a neighborhood for tokens in the order of `to_tiles`.

    A block is one tile against another. Tiles of padding alone visit nothing; for all
    others the lists are those of `BlockMask.from_mask` for the mask in tile order, made
    with work and memory in proportion to the visited tiles.

    Args:
      axes: from `windows`.
      tile: tokens of a tile along each axis.

    Returns:
      The lists, `[1, 1, tiles, most visited by one]`.

    Example:
      >>> from attnx.softmax.neighborhood import windows
      >>> lists = tile_lists(windows((64, 64), 9), (8, 8))
      >>> lists.indices.shape, int(lists.counts.max())
      ((1, 1, 64, 9), 9)
    """
    indices, counts, partial_counts = _lists(axes, tile, query_runs)
    names = (field.name for field in dataclasses.fields(Window1D))
    shape, *options = (tuple(getattr(axis, name) for axis in axes) for name in names)
    tokens = math.prod(tile)
    return BlockMask(
        indices,
        counts,
        partial_counts,
        TiledNeighborhood(shape, *options, tile=tile),
        query_len=indices.shape[2] * tokens,
        key_len=indices.shape[2] * tokens,
        block_size=(tokens, tokens),
    )


def transposed_tile_lists(
    axes: tuple[Window1D, ...], tile: tuple[int, ...]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The transpose of `tile_lists`: the tiles of queries that visit a tile of keys.

    Args:
      axes: from `windows`.
      tile: tokens of a tile along each axis.

    Returns:
      Int32 arrays as in `BlockMask`, keys in the place of queries: the numbers of the
      tiles of queries `[1, 1, tiles, slots]`, those seen in part before those seen
      whole; how many there are `[1, 1, tiles]`; how many of them are seen in part.
    """
    return _lists(axes, tile, key_runs)


def _edges(axis, query_size, key_size):
    """Where the runs of `query_runs` start and stop; none moves back."""
    group, block = np.indices((axis.dilation, *tile_grid((axis,), (query_size,))))
    low = block * query_size
    length = axis.group_length(group, np)
    # Queries of padding ask for nothing.
    high = np.minimum(low + query_size, length) - 1
    (low_start, low_end), (high_start, high_end) = (
        axis.range(group, x, np) for x in (low, high)
    )
    first, stop = low_start // key_size, -(-high_end // key_size)
    full_first, full_stop = -(-high_start // key_size), low_end // key_size
    return first, np.where(low < length, stop, first), full_first, full_stop


def _lists(axes, tile, runs):
    runs = [runs(axis, size, size) for axis, size in zip(axes, tile, strict=True)]
    slots = max(1, math.prod(int(run.count.max()) for run in runs))
    spread = [_spread(len(runs), i, run.count) for i, run in enumerate(runs)]
    count = math.prod(spread)
    full = [_spread(len(runs), i, run.full_count) for i, run in enumerate(runs)]
    # Known without a device, so that tiles can be dealt out while a call is traced.
    counts = (x.reshape(1, 1, -1) for x in (count, count - math.prod(full)))
    return _expand([dataclasses.astuple(run) for run in runs], slots), *counts


def _spread(rank, axis, x):
    """Places `[groups, tiles]` among the axes [*groups, *tiles, slot]."""
    shape = [1] * (2 * rank + 1)
    shape[axis], shape[rank + axis] = x.shape
    return x.reshape(shape)


@functools.partial(jax.jit, static_argnums=1)
def _expand(runs, slots):
    """The indices of all tiles from the runs of each axis, by arithmetic alone."""
    spread = functools.partial(_spread, len(runs))
    groups, grid = zip(*(run[0].shape for run in runs), strict=True)
    runs = [[spread(axis, x) for x in run] for axis, run in enumerate(runs)]
    count = math.prod(run[1] for run in runs)
    partial_count = count - math.prod(run[3] for run in runs)
    slot = jnp.arange(slots, dtype=jnp.int32)
    is_full = slot >= partial_count
    digits = _nth(slot - jnp.where(is_full, partial_count, 0), is_full, runs)
    index = 0
    for axis in range(len(runs)):
        index = index * groups[axis] + spread(axis, _column(groups[axis], grid[axis]))
    for digit, size in zip(digits, grid, strict=True):
        index = index * size + digit
    index = jnp.where(slot < count, index, 0)
    shape = (1, 1, math.prod(groups) * math.prod(grid), slots)
    return jnp.broadcast_to(index, (*groups, *grid, slots)).reshape(shape)


def _nth(n, is_full, runs):
    """The position along each axis of the n-th tile, in row-major order, of a box.

    Of the inner box where `is_full`, else of the outer box without the inner.
    """
    digits, inside = [], ~is_full
    for axis, (first, _, full_first, full_count) in enumerate(runs):
        rest = runs[axis + 1 :]
        plane = math.prod((run[1] for run in rest), start=np.int32(1))
        full_plane = math.prod((run[3] for run in rest), start=np.int32(1))
        # Planes before the inner box are whole, those through it lack its part, those
        # after it are whole again.
        before = (full_first - first) * plane
        through = full_count * (plane - full_plane)
        is_through = inside & (before <= n) & (n < before + through)
        is_past = inside & (before + through <= n)
        start = jnp.where(is_full | is_through, full_first, first)
        start = jnp.where(is_past, full_first + full_count, start)
        n = n - jnp.where(is_through, before, jnp.where(is_past, before + through, 0))
        size = jnp.where(is_through, plane - full_plane, plane)
        size = jnp.maximum(jnp.where(is_full, full_plane, size), 1)
        plane_number = jax.lax.div(*jnp.broadcast_arrays(n, size))
        digits.append(start + plane_number)
        n = n - plane_number * size
        inside = is_through
    return digits


def _column(groups, tiles):
    """The number of its group for each tile."""
    return np.broadcast_to(np.arange(groups, dtype=np.int32)[:, None], (groups, tiles))
