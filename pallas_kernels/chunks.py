"""Chunks of tokens on their way through a block of threads, and what they leave."""

from __future__ import annotations

from typing import NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic, products, shared
from pallas_kernels.mosaic import COL, ROW, TILE

CHUNK = 128
ROWS = CHUNK // 2  # One warpgroup's tokens.
EPS = 1e-12  # Added to denominators that are not 0.


class Stream(NamedTuple):
    """Chunks of several arrays on their way through shared memory, by array."""

    tokens: dict
    full: dict
    free: dict

    @staticmethod
    def scratch(buffers: dict, readers: dict | None = None) -> list:
        """What `of` takes apart; an array has two warpgroups as readers, or so many."""
        readers = {**dict.fromkeys(buffers, 2), **(readers or {})}
        slots = lambda buffer, readers: plgpu.Barrier(
            num_barriers=buffer.shape[0], num_arrivals=readers
        )
        full = plgpu.Barrier(num_barriers=sum(x.shape[0] for x in buffers.values()))
        free = [slots(buffer, readers[name]) for name, buffer in buffers.items()]
        return [*buffers.values(), full, *free]

    @classmethod
    def of(cls, names, refs) -> tuple[Stream, list]:
        """The stream, and the references that are not its own."""
        tokens = dict(zip(names, refs, strict=False))
        full, *refs = refs[len(names) :]
        first, fulls = 0, {}
        for name, x in tokens.items():
            fulls[name] = _Barriers(full, first)
            first += x.shape[0]
        free = dict(zip(names, refs, strict=False))
        return cls(tokens, fulls, free), refs[len(names) :]

    def copy(self, source, chunks):
        """Copies `source(name, n)` for each chunk, as room comes free."""

        @pl.loop(0, chunks)
        def _(n):
            self.fetch(source, n)

        self.drain(chunks)

    def fetch(self, source, n):
        """Copies `source(name, n)`, once there is room for it."""
        for name, tokens in self.tokens.items():
            stages = tokens.shape[0]
            slot = lax.rem(n, jnp.int32(stages))

            @pl.when(n >= stages)
            def _(free=self.free[name], slot=slot):
                plgpu.barrier_wait(free.at[slot])

            plgpu.copy_gmem_to_smem(
                source(name, n), tokens.at[slot], self.full[name].at[slot]
            )

    def drain(self, chunks):
        """Waits until all `chunks` that were fetched have been read.

        Only the interpreter minds if nobody does.
        """
        if not mosaic.interpreted():
            return
        for name, tokens in self.tokens.items():
            stages = tokens.shape[0]

            @pl.loop(jnp.maximum(chunks - stages, 0), chunks)
            def _(n, free=self.free[name], stages=stages):
                plgpu.barrier_wait(free.at[lax.rem(n, jnp.int32(stages))])


class _Barriers:
    """Barriers of a reference from one on: the phases of all share a register."""

    def __init__(self, ref, first):
        self._ref, self._first = ref, first

    @property
    def at(self):
        return self

    def __getitem__(self, i):
        return self._ref.at[self._first + i]


class State:
    """The state of one head: half in each warpgroup's registers, all in shared memory.

    A half is half of the rows, or of the columns where rows are few. `ref` is made by
    `scratch`. `sums_ref` takes what the keys sum up to, of which each warpgroup has
    those of its rows.
    """

    def __init__(self, ref, shape, wg, written, sums_ref=None):
        self._ref, self._written, self._sums = ref, written, sums_ref
        self._shape, self._wg = shape, wg

    @classmethod
    def rows(cls, size, columns) -> int:
        """Of a half."""
        return cls._held(size, columns)[0]

    @staticmethod
    def _held(size, columns):
        return (size // 2, columns) if size >= 2 * ROWS else (size, columns // 2)

    @classmethod
    def swizzle(cls, size, columns, dtype) -> int:
        """The widest that halves leave whole."""
        return mosaic.swizzle_of(min(size, cls._held(size, columns)[1]), dtype)

    @classmethod
    def scratch(cls, size, columns, dtype):
        """Shared memory for all of a state."""
        # The axis of 1 is for an index: see `published`.
        swizzle = cls.swizzle(size, columns, dtype)
        return mosaic.tiled((1, size, columns), dtype, swizzle)

    def published(self):
        """All of the state as it was published."""
        return self._ref.at[mosaic.again(jnp.int32(0))]

    def place(self, first_column=0):
        """This warpgroup's half, of a state that begins at `first_column`."""
        wg = mosaic.again(self._wg)
        rows, columns = self._held(*self._shape)
        if rows < self._shape[0]:
            return pl.ds(wg * rows, rows), pl.ds(first_column, columns)
        return pl.ds(0, rows), pl.ds(first_column + wg * columns, columns)

    def publish(self, state, sums=None):
        """For both warpgroups to read; both have read what was there."""
        dtype = self._ref.dtype
        half = self.published().at[*self.place()]
        shared.store(half, state.astype(dtype), self.swizzle(*self._shape, dtype))
        if sums is not None:
            self.write_sums(sums, self._sums)
        plgpu.commit_smem()
        plgpu.barrier_arrive(self._written)
        plgpu.barrier_wait(self._written)

    def write_sums(self, sums, ref):
        """This warpgroup's, or where both have all, the first's."""

        rows, _ = self.place()
        alone = rows.size < self._shape[0]

        @pl.when(alone | (self._wg == 0))
        def _():
            ref.at[rows][...] = sums

    def seen(self, queries):
        """Inner products of queries in shared memory with the published sums."""
        q = mosaic.load(queries, TILE).astype(jnp.float32)
        return (q * mosaic.along(mosaic.load(self._sums, COL), 1, q.shape)).sum(axis=1)

    def after(self, state, weights: Weights, keys, values):
        """This half after a chunk, of keys and values in shared memory."""
        _, columns = self.place()
        k = self._leaving(weights, keys).astype(keys.dtype)
        return products.accumulated(state * weights.across(), k, values.at[:, columns])

    def sums_after(self, sums, weights: Weights, keys, by=None):
        """The sums after a chunk, whose keys count for `by`, or for 1."""
        k = self._leaving(weights, keys)
        if by is not None:
            k = k * mosaic.along(by, 1, k.shape)
        return sums * weights.across() + k.sum(axis=1)

    def _leaving(self, weights: Weights, keys):
        """What a chunk's keys add, in float32, with this half's rows as rows."""
        rows, _ = self.place()
        k = mosaic.load_transposed(keys.at[:, rows])
        return k.astype(jnp.float32) * mosaic.along(weights.leaving(), 1, k.shape)


class Weights:
    """By what the tokens of one chunk weigh each other and the state.

    `transposed`, tokens see those from themselves on, and the state of those beyond.
    """

    def __init__(self, since, scale, transposed: bool):
        self._since, self._scale, self._transposed = since, scale, transposed
        self._total = since[since.shape[0] - 1]

    def within(self, first_row, shape, first_column=0):
        """What tokens from `first_row` on weigh those from `first_column` on by."""
        own = mosaic.load(self._since.at[pl.ds(first_row, shape[0])], ROW)
        age = mosaic.along(own, 0, shape)
        others = mosaic.load(self._since.at[pl.ds(first_column, shape[1])], COL)
        age = age - mosaic.along(others, 1, shape)
        i = mosaic.along(first_row + mosaic.iota(shape[0], 0), 0, shape)
        j = mosaic.along(first_column + mosaic.iota(shape[1], 1), 1, shape)
        age, seen = (-age, i <= j) if self._transposed else (age, i >= j)
        # Beyond the mask lie overflows, so it is inside the exponential.
        return jnp.exp2(jnp.where(seen, age, -jnp.inf)) * self._scale

    def entering(self, first_row, rows):
        """What tokens from `first_row` on weigh the state by that enters."""
        own = mosaic.load(self._since.at[pl.ds(first_row, rows)], ROW)
        return self._until(own) if self._transposed else self._from(own)

    def leaving(self):
        """By what each token adds to the state that leaves."""
        every = mosaic.load(self._since, COL)
        return self._from(every) if self._transposed else self._until(every)

    def across(self):
        """What the chunk weighs the state by."""
        return jnp.exp2(self._total)

    def _from(self, since):
        return jnp.exp2(since) * self._scale

    def _until(self, since):
        return jnp.exp2(self._total - since)


def inverse(total):
    """1 / total; where that is 0, 0."""
    empty = total == 0.0
    return jnp.where(empty, 0.0, 1.0 / (jnp.where(empty, 1.0, total) + EPS))


def since_of(since, batch, head, chunk):
    """One chunk's decay, in memory."""
    chunk = jnp.int32(0) if since.shape[2] == 1 else chunk
    return since.at[row_of(since, batch), head, chunk]


def row_of(ref, batch):
    """A batch's row of what may be the same for all."""
    return jnp.int32(0) if ref.shape[0] == 1 else batch
