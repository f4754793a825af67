"""Chunked linear attention on Hopper: one kernel for the forward and each gradient.

One block of threads walks the chunks of one head. The state stays in the registers of
two warpgroups, in float32, and is copied to shared memory once a chunk, where matrix
products can read it. A third warpgroup copies the tokens of the chunks ahead.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic
from pallas_kernels.mosaic import COL, ROW, TILE

CHUNK = 128
ROWS = CHUNK // 2  # One warpgroup's tokens.
# Of the state, what one block of threads holds.
_COLUMNS, _ELEMENTS = 128, 128 * 128


class Weights(NamedTuple):
    """What remains of a token, float32.

    The first axes are `[B or 1, N]`, and the tokens those of all chunks, or of one if
    every chunk is alike.

    Attributes:
      within: token i weighs token j of its chunk by `2 ** (within[i] - within[j])`.
      entering: by what each token weighs the state that enters its chunk.
      leaving: by what it adds to the state that leaves.
      across: `[B or 1, N, chunks or 1]`, by what a chunk weighs the entering state.
      scale: `[B or 1]`, a factor on what tokens of one chunk see of each other.
    """

    within: jax.Array
    entering: jax.Array
    leaving: jax.Array
    across: jax.Array
    scale: jax.Array


def linear_scan(
    query: jax.Array | None,
    key: jax.Array,
    value: jax.Array,
    state: jax.Array,
    weights: Weights,
    *,
    transposed: bool,
) -> tuple[jax.Array | None, jax.Array]:
    """`sum_j weight(i, j) (query_i . key_j) value_j` over the tokens j up to i.

    Heads of each array divide N, the number of heads of `state`.

    Args:
      query: `[B, T, *, H]`, T a multiple of `CHUNK`; None if states alone are wanted.
      key: `[B, T, *, H]`.
      value: `[B, T, *, V]`.
      state: what enters each piece of the sequence, float32 `[B, N, pieces, H, V]`;
        the pieces are equally long, a multiple of `CHUNK`.
      weights: for `transposed` those of the transposed sum.
      transposed: sums over the tokens from i on; states enter from the right.

    Returns:
      The sums `[B, T, N, V]`, in value's dtype, and what leaves each piece, as `state`.
    """
    batch, heads, pieces, size, value_size = state.shape
    length, dtype = key.shape[1], key.dtype
    chunks = length // CHUNK // pieces
    columns = min(value_size, _COLUMNS, _ELEMENTS // size)
    splits = value_size // columns
    swizzle = State.swizzle(size, columns, dtype)
    stages = min(2 if size < 256 else 1, chunks)  # what shared memory has room for
    inputs = {"query": query, "key": key, "value": value}
    inputs = {name: x for name, x in inputs.items() if x is not None}
    shape = (ROWS, CHUNK)

    def body(*refs):
        tokens_g = dict(zip(inputs, refs, strict=False))
        state_g, *rest = refs[len(inputs) :]
        weights_g, rest = Weights(*rest[: len(weights)]), rest[len(weights) :]
        if query is not None:
            out_g, *rest = rest
        last_g, *local = rest
        stream, local = Stream.of(inputs, local)
        tokens_s, fulls, frees = stream
        state_s, out_s, read, written = local
        h, part, b = (lax.axis_index(axis) for axis in ("h", "part", "b"))
        wg = lax.axis_index("wg")
        piece, split = (
            lax.div(part, jnp.int32(splits)),
            lax.rem(part, jnp.int32(splits)),
        )
        first_column = split * columns

        def chunk_of(n):
            return piece * chunks + (chunks - 1 - n if transposed else n)

        look_up = LookUp(weights_g, b, h, CHUNK)

        def consume():
            plgpu.set_max_registers(240, action="increase")
            first_row = wg * ROWS
            held = State(state_s, (size, columns), wg, written, look_up)
            own_g = (b, h, piece, *held.place(first_column))
            state = mosaic.load(state_g.at[*own_g], TILE)
            if query is not None:
                held.publish(state)

            def outputs(chunk, slot):
                q = tokens_s["query"].at[slot, pl.ds(first_row, ROWS)]
                plgpu.barrier_wait(fulls["query"].at[slot])
                scores = mosaic.product(q, mosaic.transposed(tokens_s["key"].at[slot]))
                decay = look_up.within(chunk, first_row, shape, transposed)
                p = (scores * decay).astype(dtype)
                out = mosaic.product(q, state_s)
                entering = look_up("entering", chunk, ROW, first_row, ROWS)
                out = out * mosaic.along(entering, 0, out.shape)
                plgpu.barrier_arrive(read)
                plgpu.barrier_wait(fulls["value"].at[slot])
                return mosaic.accumulated(out, p, tokens_s["value"].at[slot])

            def write(out, chunk, slot):
                rows = pl.ds(first_row, ROWS)
                staged = (
                    out_s.at[rows]
                    if out_s is not None
                    else (tokens_s["query"].at[slot, rows])
                )
                if out_s is not None:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                staged[...] = out.astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(
                    staged,
                    out_g.at[
                        b,
                        pl.ds(chunk * CHUNK + first_row, ROWS),
                        h,
                        pl.ds(first_column, columns),
                    ],
                )
                if out_s is None:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(frees["query"].at[slot])

            def step(n, state):
                slot = lax.rem(n, jnp.int32(stages))
                chunk = chunk_of(n)
                plgpu.barrier_wait(fulls["key"].at[slot])
                if query is not None:
                    out = outputs(chunk, slot)
                else:
                    plgpu.barrier_wait(fulls["value"].at[slot])
                k, v = (tokens_s[name].at[slot] for name in ("key", "value"))
                state = held.after(state, chunk, k, v)
                plgpu.barrier_arrive(frees["key"].at[slot])
                plgpu.barrier_arrive(frees["value"].at[slot])
                if query is not None:
                    plgpu.barrier_wait(read)
                    held.publish(state)
                    write(out, chunk, slot)
                return state

            state = lax.fori_loop(0, chunks, step, state)
            last_g.at[*own_g][...] = state
            plgpu.wait_smem_to_gmem(0)

        def produce():
            plgpu.set_max_registers(24, action="decrease")

            def source(name, n):
                gmem = tokens_g[name]
                tokens = pl.ds(chunk_of(n) * CHUNK, CHUNK)
                head = lax.div(h, jnp.int32(heads // gmem.shape[2]))
                if name == "value":
                    return gmem.at[b, tokens, head, pl.ds(first_column, columns)]
                return gmem.at[b, tokens, head]

            mosaic.by_one_warp(lambda: stream.copy(source, chunks, stages))

        pl.when(wg < 2)(consume)
        pl.when(wg == 2)(produce)

    widths = {"query": size, "key": size, "value": columns}
    outputs = [jax.ShapeDtypeStruct(state.shape, jnp.float32)]
    if query is not None:
        out = jax.ShapeDtypeStruct((batch, length, heads, value_size), dtype)
        outputs.insert(0, out)
    staged = query is not None and size != columns
    results = mosaic.call(
        body,
        (*inputs.values(), state, *weights),
        tuple(outputs),
        scratch=[
            *Stream.scratch(
                {name: (CHUNK, widths[name]) for name in inputs}, dtype, swizzle, stages
            ),
            mosaic.tiled((size, columns), dtype, swizzle)
            if query is not None
            else None,
            mosaic.tiled((CHUNK, columns), dtype, swizzle) if staged else None,
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=2),
        ],
        grid=(heads, pieces * splits, batch),
        grid_names=("h", "part", "b"),
        num_threads=3,
        thread_name="wg",
        kernel_name="linear_scan" + "_transposed" * transposed,
    )
    return (None, *results) if query is None else results


class Stream(NamedTuple):
    """Chunks of several arrays on their way through shared memory, by array."""

    tokens: dict
    full: dict
    free: dict

    @staticmethod
    def scratch(shapes: dict, dtype, swizzle: int, stages: int, readers=None) -> list:
        """What `of` takes apart; `readers` are the warpgroups that read each array."""
        readers = readers or dict.fromkeys(shapes, 2)
        slots = functools.partial(plgpu.Barrier, num_barriers=stages)
        tokens = [mosaic.tiled((stages, *x), dtype, swizzle) for x in shapes.values()]
        full = [slots() for _ in shapes]
        return [*tokens, *full, *(slots(num_arrivals=readers[x]) for x in shapes)]

    @classmethod
    def of(cls, names, refs) -> tuple[Stream, list]:
        """The stream, and the references that are not its own."""
        count = len(names)
        parts = [refs[i * count : (i + 1) * count] for i in range(3)]
        stream = cls(*(dict(zip(names, part, strict=True)) for part in parts))
        return stream, refs[3 * count :]

    def copy(self, source, chunks, stages):
        """Copies `source(name, n)` for each chunk, as room comes free."""

        @pl.loop(0, chunks)
        def _(n):
            slot = lax.rem(n, jnp.int32(stages))
            for name, tokens in self.tokens.items():

                @pl.when(n >= stages)
                def _(free=self.free[name]):
                    plgpu.barrier_wait(free.at[slot])

                plgpu.copy_gmem_to_smem(
                    source(name, n), tokens.at[slot], self.full[name].at[slot]
                )

        @pl.loop(chunks - stages, chunks)
        def _(n):
            for free in self.free.values():
                plgpu.barrier_wait(free.at[lax.rem(n, jnp.int32(stages))])


class State:
    """The state of one head: half in each warpgroup's registers, all in shared memory.

    A half is half of the rows, or of the columns where rows are few.
    """

    def __init__(self, ref, shape, wg, written, look_up: LookUp):
        self._ref, self._written, self._look_up = ref, written, look_up
        rows, columns = self._held(*shape)
        self._rows = pl.ds(wg * rows if rows < shape[0] else 0, rows)
        self._first_column = wg * columns if columns < shape[1] else 0
        self._columns = columns

    @staticmethod
    def _held(size, columns):
        return (size // 2, columns) if size >= 2 * ROWS else (size, columns // 2)

    @classmethod
    def swizzle(cls, size, columns, dtype) -> int:
        """The widest that halves leave whole."""
        return mosaic.swizzle_of(min(size, cls._held(size, columns)[1]), dtype)

    def place(self, first_column=0):
        """This warpgroup's half, of a state that begins at `first_column`."""
        return self._rows, pl.ds(first_column + self._first_column, self._columns)

    def publish(self, state):
        """For both warpgroups to read; both have read what was there."""
        self._ref.at[*self.place()][...] = state.astype(self._ref.dtype)
        plgpu.commit_smem()
        plgpu.barrier_arrive(self._written)
        plgpu.barrier_wait(self._written)

    def after(self, state, chunk, keys, values):
        """This half after a chunk, of keys and values in shared memory."""
        rows, columns = self.place()
        k = mosaic.load_transposed(keys.at[:, rows])
        leaving = self._look_up("leaving", chunk, COL)
        k = k.astype(jnp.float32) * mosaic.along(leaving, 1, k.shape)
        state = state * self._look_up.across(chunk)
        return mosaic.accumulated(state, k.astype(keys.dtype), values.at[:, columns])


class LookUp:
    """The weights of one head, chunk by chunk."""

    def __init__(self, weights: Weights, batch, head, chunk_size: int):
        self._weights, self._batch, self._head = weights, batch, head
        self._chunk_size = chunk_size
        self._scale = weights.scale[self._row(weights.scale)]

    def __call__(self, name, chunk, layout, start=0, count=None):
        """A vector of one chunk's tokens from `start` on."""
        ref, size = getattr(self._weights, name), self._chunk_size
        start = start if ref.shape[2] == size else chunk * size + start
        tokens = pl.ds(start, count or size)
        return mosaic.load(ref.at[self._row(ref), self._head, tokens], layout)

    def within(self, chunk, first_row, shape, transposed):
        """What tokens from `first_row` on weigh the chunk's tokens by."""
        own = self("within", chunk, ROW, first_row, shape[0])
        age = mosaic.along(own, 0, shape)
        age = age - mosaic.along(self("within", chunk, COL), 1, shape)
        i = mosaic.along(first_row + mosaic.iota(shape[0], 0), 0, shape)
        j = mosaic.along(mosaic.iota(shape[1], 1), 1, shape)
        seen = i <= j if transposed else i >= j
        # Beyond the mask lie overflows, so it is inside the exponential.
        return jnp.exp2(jnp.where(seen, age, -jnp.inf)) * self._scale

    def across(self, chunk):
        """What a chunk weighs the state by that enters it."""
        ref = self._weights.across
        chunk = jnp.int32(0) if ref.shape[2] == 1 else chunk
        return ref[self._row(ref), self._head, chunk]

    def _row(self, ref):
        return jnp.int32(0) if ref.shape[0] == 1 else self._batch
