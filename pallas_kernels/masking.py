"""Whom a block of threads visits, and who sees whom there."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic
from pallas_kernels.mosaic import COL, ROW
from pallas_kernels.predicate import KEY, QUERY, Predicate

# Rows of one warpgroup's share of a tile: the least that wgmma takes.
ROWS = 64


class Lists(NamedTuple):
    """Blocks visited by each block of the other side, partial ones first.

    `indices` is int32 `[B or 1, N or K or 1, blocks, slots]`; `counts` and
    `partial_counts` lack the last axis.
    """

    indices: jax.Array
    counts: jax.Array
    partial_counts: jax.Array


@dataclasses.dataclass(frozen=True)
class Masking:
    """Who sees whom: block sizes of the lists, and the predicate of partial blocks."""

    query_block: int
    key_block: int
    predicate: Predicate | None

    def looked_up_by(self, side: str) -> list[int]:
        """Which of the looked up arrays are so by queries or by keys."""
        lookups = self.predicate.lookups if self.predicate else ()
        return [i for i, lookup in enumerate(lookups) if lookup.by == side]


def looked_up_at(ref, where, tokens):
    """What some tokens of a batch and a head look up, of one array."""
    at = (
        jnp.int32(0) if size == 1 else index
        for size, index in zip(ref.shape, where, strict=False)
    )
    return ref.at[(*at, tokens)]


class Visits:
    """One block's row of the lists, read as it is walked."""

    def __init__(self, lists, batch, head, heads, row):
        indices, counts, partial_counts = lists
        self._row = (
            jnp.int32(0) if indices.shape[0] == 1 else batch,
            lax.div(head, jnp.int32(heads // indices.shape[1])),
            row,
        )
        self._indices = indices
        self._counts, self._partial_counts = counts, partial_counts

    @property
    def count(self):
        return self._counts[self._row]

    @property
    def partial_count(self):
        return self._partial_counts[self._row]

    def block(self, j):
        return self._indices[(*self._row, j)]


class Sees:
    """The predicate on one warpgroup's tile of queries (rows) against keys.

    With `query_axis` 1 the tile is transposed: keys are the rows. A thread then holds a
    quarter of the queries' words, each of which 32 threads hold: `prepare` makes two or
    four a thread and passes them through `words`, shared memory of the warpgroup's own
    for the predicate's words of all queries of a tile.
    """

    def __init__(
        self, predicate, looked_up, where, fixed, shape, query_axis=0, words=None
    ):
        self._predicate, self._shape = predicate, shape
        self._looked_up, self._where = looked_up, where
        self._query_axis, self._words = query_axis, words
        self._iota = [mosaic.iota(size, axis) for axis, size in enumerate(shape)]
        self._fixed = fixed
        # What the rows look up is the same for every tile they meet.
        self._rows = {
            i: self._load(i, sum(fixed), 0, ROW)
            for i, lookup in enumerate(predicate.lookups)
            if lookup.by == (KEY if query_axis else QUERY)
        }

    def prepare(self, start, offset):
        """Makes the words of the tile that is asked about next.

        The threads of the warpgroup must have met since they last asked.
        """
        if self._words is None:
            return
        iota = mosaic.again(mosaic.iota(self._shape[1], 0))
        words = self._predicate.make_words(
            self._arguments(start, offset + iota),
            self._values(lambda i: (self._load(i, start + offset, 1, ROW), 1)),
            self._shape,
        )
        for i, word in enumerate(words):
            self._words.at[i][...] = word
        plgpu.commit_smem()

    def __call__(self, start, offset, looked_up=None):
        """Against the tile that begins at `start + offset`, `start` a block's.

        What its columns look up is loaded from the `looked_up` of shared memory, by
        number, if these are given.
        """

        def of_column(i):
            if looked_up is None:
                return self._load(i, start + offset, 1, COL), 1
            return mosaic.load(looked_up[i], COL), 1

        words = []
        if self._words is not None:
            count = self._words.shape[0]
            words = [(mosaic.load(self._words.at[i], COL), 1) for i in range(count)]
        return self._predicate(
            self._arguments(start, offset + self._iota[1]),
            self._values(of_column),
            self._shape,
            words,
        )

    def _arguments(self, start, index):
        sides = [
            ((self._fixed[0], None), (self._fixed[1] + self._iota[0], 0)),
            ((start, None), (index, 1)),
        ]
        if self._query_axis:
            sides.reverse()
        batch, head = self._where
        batch = lax.rem(batch, jnp.int32(self._predicate.batch))
        return [(x, None) for x in (batch, head)] + [x for s in sides for x in s]

    def _values(self, of_column):
        """What is looked up; `of_column(i)` is so along the columns."""
        values = []
        for i, lookup in enumerate(self._predicate.lookups):
            if lookup.by is None:
                one = looked_up_at(self._looked_up[i], self._where, jnp.int32(0))
                values.append((one[...], None))
            elif i in self._rows:
                values.append((self._rows[i], 0))
            else:
                values.append(of_column(i))
        return values

    def _load(self, i, start, axis, layout):
        tokens = pl.ds(start, self._shape[axis])
        return mosaic.load(
            looked_up_at(self._looked_up[i], self._where, tokens), layout
        )
