"""Tiles of rows that chose one block, made of a bit for each pair of row and block.

Where each pair is in its row and in its column follows from counting bits: nothing is
sorted, and of what is as large as all pairs only the lists are written.
"""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp

from attnx._tree import tree_class
from attnx.select.bits import counts, ranks, ranks_in_columns, running_sum, unpack
from attnx.select.tiles import Run, bounds_of, of_blocks
from pallas_kernels.turns import PROCESSORS

# Tiles that attend to long blocks are served by one or two blocks of threads a
# multiprocessor; what a run has beyond equal parts would take as long as one for each.
_EVEN = 2 * PROCESSORS


@tree_class(meta=("count", "slots", "tile"))
class Marks:
    """Which blocks each row chose, and how many rows fill a tile.

    Attributes:
      words: uint32 `[B, N, T, W]`, the chosen of n blocks, as `bits.pack` gives them.
      count: n.
      slots: pairs that a head may choose, at most.
      tile: rows of a tile.
    """

    words: jax.Array
    count: int
    slots: int
    tile: int

    @property
    def heads(self) -> int:
        return self.words.shape[1]

    # Outside of jit one program, and not some hundred small ones.
    @functools.partial(jax.jit, static_argnames=("shares", "num_rows", "per_row"))
    def runs(
        self, shares: tuple[int, ...], *, num_rows: int, per_row: None = None
    ) -> list[Run]:
        """As `Tiles.runs`. All runs have one list of places, each row its part of it.

        A place is that in its own run.
        """
        marked = unpack(self.words, self.count)
        # Each block leaves at most one tile unfilled.
        most = max(1, (self.slots + self.count * (self.tile - 1)) // self.tile)
        bounds = bounds_of(shares, most, _EVEN)
        place, sizes = ranks_in_columns(marked)
        tiles = -(-sizes // self.tile)
        stops = jnp.cumsum(tiles, -1)
        place += ((stops - tiles) * self.tile)[..., None, :]
        block, used = of_blocks(stops, most)

        row = jnp.arange(num_rows, dtype=jnp.int32)[:, None]
        index = _written(marked, place, row, most * self.tile, num_rows)
        inside = place
        for start, stop in itertools.pairwise(bounds[:-1]):
            step = (stop - start) * self.tile
            inside = inside - jnp.where(place >= stop * self.tile, step, 0)
        each = counts(self.words)
        first = running_sum(each) - each
        number = first[..., None] + ranks(self.words, self.count)
        inside = _written(marked, number, inside, self.slots, 0)
        runs, begin = [], first
        for start, stop in itertools.pairwise(bounds):
            end = first + (marked & (place < stop * self.tile)).sum(-1)
            run = Run(
                index[:, :, start * self.tile : stop * self.tile],
                inside,
                begin,
                end,
                block[:, :, start:stop],
                used[:, :, start:stop],
            )
            runs.append(run)
            begin = end
        return runs


def _written(marked, at, value, size, fill):
    """`value` where it is marked, written `at` places of lists, `[B, N, size]`."""
    batch, heads = marked.shape[:2]
    each = jnp.arange(batch * heads, dtype=jnp.int32) * size
    at = at + each.reshape(batch, heads, 1, 1)
    at = jnp.where(marked, at, batch * heads * size).reshape(-1)
    value = jnp.broadcast_to(value, marked.shape).reshape(-1)
    written = jnp.full(batch * heads * size, fill, jnp.int32)
    written = written.at[at].set(value, mode="drop", unique_indices=True)
    return written.reshape(batch, heads, size)
