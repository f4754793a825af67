"""Tiles filled with the queries that chose one block, and where each of them went."""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# How often a run is longer than what it may be shortened by.
_LONG = 8


class Run(NamedTuple):
    """Neighbouring tiles, and the parts of each row in them.

    Attributes:
      index: int32 `[B, N, M]`, the row in each place of the run.
      place: int32 `[B, N, P]`, the place of each pair in the run, M where in none.
      first: int32 `[B, N, T]`, each row's first pair of the run; None where every row
        has as many pairs.
      stop: int32 `[B, N, T]`, the first pair that is not the row's or not of the run.
      block: int32 `[B, N, n]`, which block each tile attends to.
      used: int32 `[B, N, n]`, whether it is in use, 0 or 1.
    """

    index: jax.Array
    place: jax.Array
    first: jax.Array | None
    stop: jax.Array | None
    block: jax.Array
    used: jax.Array


class Tiles(NamedTuple):
    """Pairs of rows and blocks `[B, N, P]`, and tiles of rows that chose one block.

    A place is one row of a tile: of M places each pair has one.

    Attributes:
      owner: int32 `[B, N, P]`, the row of each pair.
      pair: int32 `[B, N, M]`, the pair in each place, P where none.
      block: int32 `[B, N, n]`, which block each tile attends to.
      used: int32 `[B, N, n]`, whether it is in use, 0 or 1.
    """

    owner: jax.Array
    pair: jax.Array
    block: jax.Array
    used: jax.Array

    def places(self) -> jax.Array:
        """The place of each pair, int32 `[B, N, P]`, M where it has none."""
        size, places = self.owner.shape[2], self.pair.shape[2]

        def find(pair):
            each = jnp.arange(len(pair), dtype=jnp.int32)[:, None] * size
            at = jnp.where(pair < size, each + pair, len(pair) * size)
            place = jnp.arange(places, dtype=jnp.int32)
            place = jnp.broadcast_to(place, pair.shape).reshape(-1)
            found = jnp.full(len(pair) * size, places, jnp.int32)
            found = found.at[at.reshape(-1)].set(
                place, mode="drop", unique_indices=True
            )
            return found.reshape(-1, size)

        return _by_batch(find, self.pair)

    def owners(self, num_rows: int, per_row: int | None) -> jax.Array:
        """The row in each place, int32 `[B, N, M]`, `num_rows` where none."""
        if per_row is not None:
            row = self.pair // per_row
        else:
            take = functools.partial(jnp.take, mode="clip")
            row = jax.vmap(jax.vmap(take))(self.owner, self.pair)
        return jnp.where(self.pair < self.owner.shape[2], row, num_rows)

    @property
    def heads(self) -> int:
        return self.block.shape[1]

    # Outside of jit one program, and not some hundred small ones.
    @functools.partial(jax.jit, static_argnames=("shares", "num_rows", "per_row"))
    def runs(
        self, shares: tuple[int, ...], *, num_rows: int, per_row: int | None
    ) -> list[Run]:
        """Runs that are such shares of all tiles, of so many rows and pairs of each."""
        count = self.block.shape[2]
        tile = self.pair.shape[2] // count
        index, place = self.owners(num_rows, per_row), self.places()
        bounds = bounds_of(shares, count)
        pairs = None
        if per_row is None:
            stops = np.array(bounds[1:], np.int32) * tile
            find = functools.partial(_pairs_of_rows, stops=stops, num_rows=num_rows)
            pairs = _by_batch(find, self.owner, place)
        runs = []
        for i, (first, stop) in enumerate(itertools.pairwise(bounds)):
            size = (stop - first) * tile
            inside = place - first * tile
            run = Run(
                index[:, :, first * tile : stop * tile],
                jnp.where((inside >= 0) & (inside < size), inside, size),
                *(None, None) if pairs is None else (x[:, i] for x in pairs),
                self.block[:, :, first:stop],
                self.used[:, :, first:stop],
            )
            runs.append(run)
        return runs


def plan_tiles(rows, blocks, *, count, tile):
    """Sorts the pairs of `[B, N, P]` by block and fills `Tiles`."""
    plan = functools.partial(_plan, count=count, tile=tile)
    return Tiles(rows, *_by_batch(plan, blocks))


def bounds_of(shares, count, even=1):
    """Where runs begin and end that are about such shares of so many tiles.

    Long ones, but for the last, are multiples of `even`.
    """
    total = sum(shares)
    bounds = (count * x // total for x in itertools.accumulate(shares[:-1]))
    if count * min(shares) >= _LONG * even * total:
        bounds = (bound - bound % even for bound in bounds)
    return sorted({0, *bounds, count})


def of_blocks(stops, most):
    """The block of each of so many tiles, and whether it is in use: `[..., most]`.

    Those of a block end before `stops`, `[..., n]`.
    """
    index = jnp.arange(most, dtype=jnp.int32)
    block = (stops[..., None, :] <= index[:, None]).sum(-1, dtype=jnp.int32)
    used = (index < stops[..., -1:]).astype(jnp.int32)
    return jnp.minimum(block, stops.shape[-1] - 1), used


def _by_batch(fn, *arrays):
    """`fn` of each row of the batch, where one needs no look-ups by row."""
    if len(arrays[0]) == 1:
        return jax.tree.map(lambda x: x[None], fn(*(x[0] for x in arrays)))
    return jax.vmap(fn)(*arrays)


@functools.partial(jax.jit, static_argnames=("count", "tile"))
def _plan(blocks, *, count, tile):
    """`Tiles` of `[N, P]`, all lists as one.

    Then every look-up is in one long array, which the compiler fuses with what is
    around it, and the device sorts it faster than many short ones.
    """
    lists, pairs = blocks.shape
    each = jnp.arange(lists, dtype=jnp.int32)[:, None]
    number = each * (count + 1) + blocks
    number = number.reshape(-1)
    if lists * (count + 1) <= 1 << 16:
        number = number.astype(jnp.uint16)
    order = jnp.argsort(number, stable=True).astype(jnp.int32)
    number = number[order].astype(jnp.int32)
    sizes = _run_lengths(number, lists * (count + 1)).reshape(lists, -1)[:, :count]
    first = jnp.cumsum(sizes, 1) - sizes + each * pairs
    stops = jnp.cumsum(-(-sizes // tile), 1)
    starts = stops + -sizes // tile
    # Each block leaves at most one tile unfilled.
    most = max(1, (pairs + count * (tile - 1)) // tile)

    block, used = of_blocks(stops, most)
    index = jnp.arange(most, dtype=jnp.int32)
    start, size, begin = (
        x.reshape(-1)[each * count + block] for x in (starts, sizes, first)
    )
    offset = (index - start) * tile
    left = jnp.where(used > 0, size - offset, 0)[..., None]
    inside = jnp.arange(tile, dtype=jnp.int32)
    place = jnp.clip((begin + offset)[..., None] + inside, 0, lists * pairs - 1)
    pair = jnp.where(inside < left, order[place] - each[..., None] * pairs, pairs)
    return pair.reshape(lists, -1), block, used


def _pairs_of_rows(owner, place, *, stops, num_rows):
    """Where each row's pairs in each run begin and end, two `[runs, N, T]`.

    Those of a row are in the order of their blocks, and so of their places: the ones
    in a run, of places before its stop, follow each other.
    """
    lists, runs = len(owner), len(stops)
    run = (place[..., None] >= stops).sum(-1, dtype=jnp.int32)
    number = run * lists + jnp.arange(lists, dtype=jnp.int32)[:, None]
    number = number * num_rows + owner
    size = runs * lists * num_rows
    number = jnp.where((owner < num_rows) & (run < runs), number, size)
    number = number.reshape(-1)
    pair = jnp.broadcast_to(jnp.arange(owner.shape[-1], dtype=jnp.int32), owner.shape)
    edge, changes = jnp.ones(1, bool), number[1:] != number[:-1]

    def write(where, pair):
        """Rows without pairs keep a 0 from which they go to 0."""
        at = jnp.where(jnp.concatenate(where), number, size)
        found = jnp.zeros(size, jnp.int32)
        found = found.at[at].set(pair.reshape(-1), mode="drop", unique_indices=True)
        return found.reshape(runs, lists, num_rows)

    return write((edge, changes), pair), write((changes, edge), pair + 1)


def _run_lengths(ordered, count):
    """How often each of 0 ... count - 1 comes in numbers that are in order."""
    pairs = ordered.shape[0]
    is_first = jnp.concatenate([jnp.array([True]), ordered[1:] != ordered[:-1]])
    # A few thousand writes at most, where a sum of ones would add all pairs.
    number = jnp.where(is_first, ordered, count + 1)
    first = jnp.full(count + 1, pairs, jnp.int32)
    index = jnp.arange(pairs, dtype=jnp.int32)
    first = first.at[number].set(index, mode="drop", unique_indices=True)
    # A number that does not come begins where the next one does.
    return jnp.diff(jax.lax.cummin(first, reverse=True))
