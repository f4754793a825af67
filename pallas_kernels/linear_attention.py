"""Chunked linear attention on Hopper: one kernel for the forward and each gradient.

One block of threads walks the chunks of one head. The state stays in the registers of
two warpgroups, in float32, and is copied to shared memory once a chunk, where matrix
products can read it. A third warpgroup copies the tokens of the chunks ahead.
"""

from __future__ import annotations

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
EPS = 1e-12  # Added to denominators that are not 0.
# Of a sum with float32's 24 bits, tokens that weigh less than this to the last one's 1
# are not seen, unless they are 2^24 times as large.
_FORGOTTEN = -48.0


class Decay(NamedTuple):
    """What remains of earlier tokens, float32.

    Attributes:
      since: base-2 logarithm of the decay from the start of its chunk to each token,
        its own included, `[B or 1, N, chunks or 1, chunk size]`.
      scale: on the queries, `[B or 1]`.
    """

    since: jax.Array
    scale: jax.Array


class Counted(NamedTuple):
    """That keys are summed as well, as by one more column of values, float32.

    Attributes:
      state: the sums that enter each piece, `[B, N, pieces, H]`.
      by: what each key counts for, `[B, N, T]`; None for 1, and then the output is
        divided by what the column comes to.
    """

    state: jax.Array
    by: jax.Array | None


class Offset(NamedTuple):
    """One more column of queries, for which all keys have 1, float32.

    Attributes:
      column: `[B, N, T]`.
      row: one more row of the states that enter the chunks, `[B, N, chunks, V]`.
    """

    column: jax.Array
    row: jax.Array


def linear_scan(
    query: jax.Array | None,
    key: jax.Array,
    value: jax.Array,
    state: jax.Array,
    decay: Decay,
    counted: Counted | None = None,
    offset: Offset | None = None,
    *,
    pieces: int,
    transposed: bool = False,
    keep_states: bool = False,
    return_state: bool = True,
) -> tuple:
    """`sum_j weight(i, j) (query_i . key_j) value_j` over the tokens j up to i.

    Heads of each array divide N, the number of heads of `state`.

    Args:
      query: `[B, T, *, H]`, T a multiple of `CHUNK`; None if states alone are wanted.
      key: `[B, T, *, H]`.
      value: `[B, T, *, V]`.
      state: what enters each piece, float32 `[B or 1, N, pieces, H, V]`. With fewer
        pieces the first ones are summed (the last, if transposed), and for states
        alone; these leave out chunks that the decay forgets before the piece ends.
      decay: by chunks of `CHUNK`.
      counted: sums of keys to make as well. With queries, it divides.
      offset: of queries.
      pieces: equal parts of the sequence, of whole chunks, served side by side.
      transposed: sums over the tokens from i on; states enter from the right.
      keep_states: also returns the states that enter the chunks. For H V of at most
        `128 * 128`.
      return_state: whether what leaves each piece is wanted; if not, None is in its
        place.

    Returns:
      The sums `[B, T, N, V]`, in value's dtype, and what leaves each piece, as `state`.
      With `counted` also the sums that leave each piece, and with queries too the
      denominators `[B, N, T]` and the sums that enter each chunk `[B, N, chunks, H]`.
      With `keep_states` also the states, `[B, N, chunks, H, V]` in value's dtype.
    """
    _, heads, served, size, value_size = state.shape
    batch, length, dtype = *key.shape[:2], key.dtype
    chunks = length // CHUNK // pieces
    first_piece = pieces - served if transposed else 0
    columns = min(value_size, _COLUMNS, _ELEMENTS // size)
    splits = value_size // columns
    swizzle = State.swizzle(size, columns, dtype)
    stages = min(2 if size < 256 else 1, chunks)  # what shared memory has room for
    inputs = {"query": query, "key": key, "value": value}
    inputs = {name: x for name, x in inputs.items() if x is not None}
    divides = counted is not None and query is not None
    numbers = [x for x in (counted and counted.by, offset and offset.column)]
    numbers = [x for x in numbers if x is not None]
    others = [x for x in (counted and counted.state, offset and offset.row)]
    others = [x for x in others if x is not None]
    skipped = []
    if query is None:
        parts = slice(first_piece, first_piece + served)
        skip = _forgotten(decay, pieces, chunks, stages, transposed)[..., parts]
        skipped = [skip]
        state = jnp.where(skip[..., None, None] > 0, 0.0, state)
        if counted:
            others[0] = jnp.where(skip[..., None] > 0, 0.0, others[0])

    # The copying warpgroup has more addresses to keep with one more array.
    roomy = size * columns < _ELEMENTS
    consumer, producer = (232, 40) if numbers and roomy else (240, 24)

    def body(*refs):
        tokens_g = dict(zip(inputs, refs, strict=False))
        state_g, since_g, scale_g, *rest = refs[len(inputs) :]
        if numbers:
            tokens_g["number"], *rest = rest
        if others:
            other_g, *rest = rest
        if skipped:
            skipped_g, *rest = rest
        if query is not None:
            out_g, *rest = rest
        if return_state:
            last_g, *rest = rest
        if counted:
            sums_g, *rest = rest
        if divides:
            total_g, entered_g, *rest = rest
        if keep_states:
            states_g, *rest = rest
        stream, local = Stream.of(tuple(buffers), rest)
        tokens_s, fulls, frees = stream
        state_s, sums_s, out_s, read, written = local
        h, part, b = (lax.axis_index(axis) for axis in ("h", "part", "b"))
        wg = lax.axis_index("wg")
        place = lax.div(part, jnp.int32(splits))
        piece = first_piece + place
        first_column = lax.rem(part, jnp.int32(splits)) * columns

        first = skipped_g[row_of(skipped_g, b), h, place] if skipped else 0

        def chunk_of(n):
            n = first + n
            return piece * chunks + (chunks - 1 - n if transposed else n)

        def consume():
            plgpu.set_max_registers(consumer, action="increase")
            first_row = wg * ROWS
            scale = scale_g[row_of(scale_g, b)]
            held = State(state_s, (size, columns), wg, written, sums_s)
            own_g = (h, place, *held.place(first_column))
            state = mosaic.load(state_g.at[row_of(state_g, b), *own_g], TILE)
            sums = None
            if counted:
                sums = mosaic.load(other_g.at[b, h, place, own_g[-2]], ROW)
            if query is not None:
                held.publish(state, sums)

            def outputs(weights, slot, chunk):
                # Vectors come as late as they can: registers are few.
                rows = pl.ds(first_row, ROWS)
                q = tokens_s["query"].at[slot, rows]
                number = lambda: mosaic.load(tokens_s["number"].at[slot, rows], ROW)
                if offset:
                    plgpu.barrier_wait(fulls["number"].at[slot])
                plgpu.barrier_wait(fulls["query"].at[slot])
                scores = mosaic.product(q, mosaic.transposed(tokens_s["key"].at[slot]))
                if offset:
                    scores = scores + mosaic.along(number(), 0, scores.shape)
                p = scores * weights.within(first_row, (ROWS, CHUNK))
                if divides:
                    total = p.sum(axis=1)
                p = p.astype(dtype)
                entering = weights.entering(first_row, ROWS)
                if divides:
                    total = total + entering * held.seen(q)
                if offset:
                    row = other_g.at[b, h, chunk, pl.ds(first_column, columns)]
                    row = mosaic.load(row, COL)
                out = mosaic.product(q, state_s)
                if offset:
                    column = mosaic.along(number(), 0, out.shape)
                    out = out + column * mosaic.along(row, 1, out.shape)
                out = out * mosaic.along(entering, 0, out.shape)
                if keep_states:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(read)
                plgpu.barrier_wait(fulls["value"].at[slot])
                out = mosaic.accumulated(out, p, tokens_s["value"].at[slot])
                if divides:
                    out = out * mosaic.along(inverse(total), 0, out.shape)
                    rows = pl.ds(chunk * CHUNK + first_row, ROWS)
                    total_g.at[b, h, rows][...] = total
                return out

            def write(out, chunk, slot):
                rows = pl.ds(first_row, ROWS)
                # The queries have been read: their place takes the output.
                alone = out_s is None
                staged = (tokens_s["query"].at[slot] if alone else out_s).at[rows]
                if not alone:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                staged[...] = out.astype(dtype)
                plgpu.commit_smem()
                rows = pl.ds(chunk * CHUNK + first_row, ROWS)
                place = (b, rows, h, pl.ds(first_column, columns))
                plgpu.copy_smem_to_gmem(staged, out_g.at[*place])
                if alone:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(frees["query"].at[slot])

            def step(n, carry):
                state, sums = carry
                slot = lax.rem(n, jnp.int32(stages))
                chunk = chunk_of(n)
                if keep_states:

                    @pl.when(wg == 0)
                    def _():
                        plgpu.copy_smem_to_gmem(state_s, states_g.at[b, h, chunk])

                plgpu.barrier_wait(fulls["since"].at[slot])
                plgpu.barrier_wait(fulls["key"].at[slot])
                weights = Weights(tokens_s["since"].at[slot], scale, transposed)
                k, v = (tokens_s[name].at[slot] for name in ("key", "value"))
                if divides:
                    held.write_sums(sums, entered_g.at[b, h, chunk])
                if counted:  # While there are registers for it.
                    number = None
                    if numbers:
                        plgpu.barrier_wait(fulls["number"].at[slot])
                        number = mosaic.load(tokens_s["number"].at[slot], COL)
                    sums = held.sums_after(sums, weights, k, number)
                if query is not None:
                    out = outputs(weights, slot, chunk)
                else:
                    plgpu.barrier_wait(fulls["value"].at[slot])
                state = held.after(state, weights, k, v)
                for name in frees:
                    if name != "query":
                        plgpu.barrier_arrive(frees[name].at[slot])
                if query is not None:
                    plgpu.barrier_wait(read)
                    held.publish(state, sums)
                    write(out, chunk, slot)
                return state, sums

            state, sums = lax.fori_loop(0, chunks - first, step, (state, sums))
            if return_state:
                last_g.at[b, *own_g][...] = state
            if counted:
                held.write_sums(sums, sums_g.at[b, h, place])
            plgpu.wait_smem_to_gmem(0)

        def produce():
            plgpu.set_max_registers(producer, action="decrease")

            def source(name, n):
                chunk = chunk_of(n)
                if name == "since":
                    return since_of(since_g, b, h, chunk)
                gmem = tokens_g[name]
                tokens = pl.ds(chunk * CHUNK, CHUNK)
                if name == "number":
                    return gmem.at[b, h, tokens]
                head = lax.div(h, jnp.int32(heads // gmem.shape[2]))
                if name == "value":
                    return gmem.at[b, tokens, head, pl.ds(first_column, columns)]
                return gmem.at[b, tokens, head]

            mosaic.by_one_warp(lambda: stream.copy(source, chunks - first, stages))

        pl.when(wg < 2)(consume)
        pl.when(wg == 2)(produce)

    widths = {"query": size, "key": size, "value": columns}
    buffers = {
        name: mosaic.tiled((stages, CHUNK, widths[name]), dtype, swizzle)
        for name in inputs
    }
    buffers["since"] = plgpu.SMEM((stages, CHUNK), jnp.float32)
    if numbers:
        buffers["number"] = plgpu.SMEM((stages, CHUNK), jnp.float32)
    published = mosaic.tiled((size, columns), dtype, swizzle)
    staged = mosaic.tiled((CHUNK, columns), dtype, swizzle)
    outputs = []
    if query is not None:
        out = (batch, length, heads, value_size)
        outputs.append(jax.ShapeDtypeStruct(out, dtype))
    if return_state:
        last = (batch, *state.shape[1:])
        outputs.append(jax.ShapeDtypeStruct(last, jnp.float32))
    if counted:
        outputs.append(jax.ShapeDtypeStruct(counted.state.shape, jnp.float32))
    if divides:
        shapes = (batch, heads, length), (batch, heads, length // CHUNK, size)
        outputs += [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    if keep_states:
        kept = (batch, heads, length // CHUNK, size, value_size)
        outputs.append(jax.ShapeDtypeStruct(kept, dtype))
    results = mosaic.call(
        body,
        (*inputs.values(), state, *decay, *numbers, *others, *skipped),
        tuple(outputs),
        scratch=[
            *Stream.scratch(buffers),
            None if query is None else published,
            plgpu.SMEM((size,), jnp.float32) if divides else None,
            None if query is None or size == columns else staged,
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=2),
        ],
        grid=(heads, served * splits, batch),
        grid_names=("h", "part", "b"),
        num_threads=3,
        thread_name="wg",
        kernel_name="linear_scan" + "_transposed" * transposed,
    )
    if not return_state:
        results = results[0], None, *results[1:]
    return (None, *results) if query is None else results


def _forgotten(decay: Decay, pieces: int, chunks: int, stages: int, transposed: bool):
    """How many chunks a piece may leave out, int32 `[B or 1, N, pieces]`.

    They are its first, or if transposed its last; `stages` are left in any case.
    """
    total = decay.since[..., -1]
    total = jnp.broadcast_to(total, (*total.shape[:2], pieces * chunks))
    total = total.reshape(*total.shape[:2], pieces, chunks)
    after = lax.cumsum(total, axis=3, reverse=not transposed) - total
    return jnp.minimum((after < _FORGOTTEN).sum(-1, dtype=jnp.int32), chunks - stages)


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
        full = [slots(buffer, 1) for buffer in buffers.values()]
        free = [slots(buffer, readers[name]) for name, buffer in buffers.items()]
        return [*buffers.values(), *full, *free]

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

    A half is half of the rows, or of the columns where rows are few. `sums_ref` takes
    what the keys sum up to, of which each warpgroup has those of its rows.
    """

    def __init__(self, ref, shape, wg, written, sums_ref=None):
        self._ref, self._written, self._sums = ref, written, sums_ref
        rows, columns = self._held(*shape)
        # Whether this warpgroup's rows are its alone, or it is the first.
        self._speaks = (rows < shape[0]) | (wg == 0)
        self._rows = pl.ds(wg * rows if rows < shape[0] else 0, rows)
        self._first_column = wg * columns if columns < shape[1] else 0
        self._columns = columns

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

    def place(self, first_column=0):
        """This warpgroup's half, of a state that begins at `first_column`."""
        return self._rows, pl.ds(first_column + self._first_column, self._columns)

    def publish(self, state, sums=None):
        """For both warpgroups to read; both have read what was there."""
        self._ref.at[*self.place()][...] = state.astype(self._ref.dtype)
        if sums is not None:
            self.write_sums(sums, self._sums)
        plgpu.commit_smem()
        plgpu.barrier_arrive(self._written)
        plgpu.barrier_wait(self._written)

    def write_sums(self, sums, ref):
        """This warpgroup's, or where both have all, the first's."""

        @pl.when(self._speaks)
        def _():
            ref.at[self._rows][...] = sums

    def seen(self, queries):
        """Inner products of queries in shared memory with the published sums."""
        q = mosaic.load(queries, TILE).astype(jnp.float32)
        return (q * mosaic.along(mosaic.load(self._sums, COL), 1, q.shape)).sum(axis=1)

    def after(self, state, weights: Weights, keys, values):
        """This half after a chunk, of keys and values in shared memory."""
        _, columns = self.place()
        k = self._leaving(weights, keys).astype(keys.dtype)
        return mosaic.accumulated(state * weights.across(), k, values.at[:, columns])

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
