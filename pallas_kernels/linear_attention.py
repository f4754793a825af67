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

from pallas_kernels import mosaic, products, shared
from pallas_kernels.chunks import (
    CHUNK,
    ROWS,
    State,
    Stream,
    Weights,
    inverse,
    row_of,
    since_of,
)
from pallas_kernels.mosaic import COL, ROW, TILE

# Of the state, what one block of threads holds.
_COLUMNS, _ELEMENTS = 128, 128 * 128


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
      state: the sums that enter each piece, `[B, N, pieces, H]`; None for 0.
      by: what each key counts for, `[B, N, T]`; None for 1, and then the output is
        divided by what the column comes to.
    """

    state: jax.Array | None
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
    state: jax.Array | None,
    decay: Decay,
    counted: Counted | None = None,
    offset: Offset | None = None,
    spans: jax.Array | None = None,
    *,
    transposed: bool = False,
    keep_states: bool = False,
    keep_rest: bool = False,
    return_state: bool = True,
) -> tuple:
    """`sum_j weight(i, j) (query_i . key_j) value_j` over the tokens j up to i.

    Heads of each array divide N, the number of heads of `state`.

    Args:
      query: `[B, T, *, H]`, T a multiple of `CHUNK`; None if states alone are wanted.
      key: `[B, T, *, H]`.
      value: `[B, T, *, V]`.
      state: what enters each piece, float32 `[B or 1, N, pieces, H, V]`; pieces are
        equal parts of the sequence, of whole chunks, served side by side. None for
        states alone, which begin at 0.
      decay: by chunks of `CHUNK`.
      counted: sums of keys to make as well. With queries, it divides.
      offset: of queries.
      spans: for states alone, in place of pieces: the first chunk of each, and the one
        after its last, int32 `[B or 1, N, spans, 2]`.
      transposed: sums over the tokens from i on; states enter from the right.
      keep_states: also returns the states that enter the chunks. For H V of at most
        `128 * 128`.
      keep_rest: also returns what rounding took from the sums, in value's dtype.
      return_state: whether what leaves each piece is wanted; if not, None is in its
        place.

    Returns:
      The sums `[B, T, N, V]`, in value's dtype, and what leaves each piece or span,
      float32 `[B, N, pieces, H, V]`.
      With `counted` also the sums that leave each piece, and with queries too the
      denominators `[B, N, T]` and the sums that enter each chunk `[B, N, chunks, H]`.
      With `keep_states` also the states, `[B, N, chunks, H, V]` in value's dtype, and
      last with `keep_rest` what it says.
    """
    (start,) = (x for x in (state, spans) if x is not None)
    heads, served = start.shape[1:3]
    batch, length, _, size = key.shape
    value_size, dtype = value.shape[-1], key.dtype
    chunks = length // CHUNK // served
    columns = min(value_size, _COLUMNS, _ELEMENTS // size)
    splits = value_size // columns
    swizzle = State.swizzle(size, columns, dtype)
    # What shared memory has room for: one more where no queries are.
    stages = (2 if size < 256 else 1) + (query is None)
    inputs = {"query": query, "key": key, "value": value}
    inputs = {name: x for name, x in inputs.items() if x is not None}
    divides = counted is not None and query is not None
    # Vectors that come with the tokens, in as many parts as values or in one.
    vectors = []
    if counted and counted.by is not None:
        vectors = [counted.by.reshape(batch, heads, -1, 1, CHUNK)]
    if offset:
        column = offset.column.reshape(batch, heads, -1, 1, CHUNK)
        column = jnp.repeat(column, splits, 3)
        row = offset.row.reshape(batch, heads, -1, splits, columns)
        vectors = [jnp.concatenate([column, row], -1)]
    entering = [counted.state] if counted and counted.state is not None else []

    # The copying warpgroup has more addresses to keep with one more array.
    roomy = size * columns < _ELEMENTS
    consumer, producer = (232, 40) if vectors and roomy else (240, 24)

    def body(*refs):
        tokens_g = dict(zip(inputs, refs, strict=False))
        start_g, since_g, scale_g, *rest = refs[len(inputs) :]
        if vectors:
            tokens_g["vector"], *rest = rest
        if entering:
            entering_g, *rest = rest
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
        if keep_rest:
            rest_g, *rest = rest
        stream, local = Stream.of(tuple(buffers), rest)
        tokens_s, fulls, frees = stream
        state_s, sums_s, out_s, met = local
        read, written = (met.at[i] for i in range(2))
        h, part, b = (lax.axis_index(axis) for axis in ("h", "part", "b"))
        wg = lax.axis_index("wg")
        if query is None:
            # By custom the last heads remember longest: their spans are to begin first.
            h = heads - 1 - h
        place = lax.div(part, jnp.int32(splits))
        first_column = lax.rem(part, jnp.int32(splits)) * columns
        first, count = place * chunks, chunks
        if spans is not None:
            first, end = (start_g[row_of(start_g, b), h, place, i] for i in range(2))
            count = end - first

        def chunk_of(n):
            return first + (count - 1 - n if transposed else n)

        def consume():
            plgpu.set_max_registers(consumer, action="increase")
            scale = scale_g[row_of(scale_g, b)]
            held = State(state_s, (size, columns), wg, written, sums_s)
            own_g = (h, place, *held.place(first_column))
            state = sums = None
            if query is None:
                state = mosaic.full((own_g[-2].size, own_g[-1].size), 0.0, TILE)
            else:
                state = mosaic.load(start_g.at[row_of(start_g, b), *own_g], TILE)
            if divides:
                sums = mosaic.load(entering_g.at[b, h, place, own_g[-2]], ROW)
            elif counted:
                sums = mosaic.full((own_g[-2].size,), 0.0, ROW)
            if query is not None:
                held.publish(state, sums)

            def outputs(weights, slot, chunk):
                # Vectors come as late as they can: registers are few.
                first_row = mosaic.again(wg) * ROWS
                rows = pl.ds(first_row, ROWS)
                q = tokens_s["query"].at[slot, rows]
                column = lambda: mosaic.load(tokens_s["vector"].at[0, rows], ROW)
                if offset:
                    plgpu.barrier_wait(fulls["vector"].at[0])
                plgpu.barrier_wait(fulls["query"].at[slot])
                k = mosaic.transposed(tokens_s["key"].at[slot])
                if offset:
                    scores = mosaic.along(column(), 0, (ROWS, CHUNK))
                    scores = products.accumulated(scores, q, k)
                else:
                    scores = products.product(q, k)
                scores = scores * weights.within(first_row, (ROWS, CHUNK))
                if offset and not roomy:  # Or what follows begins before they are made.
                    scores = lax.optimization_barrier(scores)
                p = mosaic.rounded(scores, dtype)
                # Beside an offset they nearly cancel, so what rounding took counts.
                parts = [p]
                if offset:
                    rest = (scores - p.astype(jnp.float32)).astype(dtype)
                    parts = lax.optimization_barrier([p, rest])
                if divides:  # Of what is multiplied: a token that is alone comes out.
                    total = p.astype(jnp.float32).sum(axis=1)
                entering = weights.entering(first_row, ROWS)
                if divides:
                    total = total + entering * held.seen(q)
                if offset:  # Before the product, as one vector less is then kept.
                    row = tokens_s["vector"].at[0, pl.ds(CHUNK, columns)]
                    out = mosaic.along(mosaic.load(row, COL), 1, (ROWS, columns))
                    out = out * mosaic.along(column(), 0, out.shape)
                    plgpu.barrier_arrive(frees["vector"].at[0])
                    out = products.accumulated(out, q, held.published())
                else:
                    out = products.product(q, held.published())
                out = out * mosaic.along(entering, 0, out.shape)
                if keep_states:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(read)
                plgpu.barrier_wait(fulls["value"].at[slot])
                values = tokens_s["value"].at[slot]
                for weighed in parts:
                    out = products.accumulated(out, weighed, values)
                if divides:
                    out = out * mosaic.along(inverse(total), 0, out.shape)
                    rows = pl.ds(chunk * CHUNK + first_row, ROWS)
                    here = mosaic.again(b), mosaic.again(h)
                    total_g.at[*here, rows][...] = total
                return out

            def write(out, chunk, slot):
                first_row = mosaic.again(wg) * ROWS
                rows = pl.ds(first_row, ROWS)
                # The queries have been read: their place takes the output.
                alone = out_s is None
                staged = (tokens_s["query"].at[slot] if alone else out_s).at[rows]
                if not alone:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                rounded = mosaic.rounded(out, dtype)
                shared.store(staged, rounded, swizzle)
                plgpu.commit_smem()
                rows = pl.ds(chunk * CHUNK + first_row, ROWS)
                columns_g = pl.ds(first_column, columns)
                place = mosaic.again(b), rows, mosaic.again(h), columns_g
                if keep_rest:
                    left = out - rounded.astype(jnp.float32)
                    rest_g.at[*place][...] = left.astype(dtype)
                plgpu.copy_smem_to_gmem(staged, out_g.at[*place])
                if alone:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(frees["query"].at[slot])

            def step(n, carry):
                state, sums = carry
                slot = mosaic.again(lax.rem(n, jnp.int32(stages)))
                chunk = chunk_of(n)
                if keep_states:

                    @pl.when(wg == 0)
                    def _():
                        published = held.published()
                        plgpu.copy_smem_to_gmem(published, states_g.at[b, h, chunk])

                plgpu.barrier_wait(fulls["since"].at[slot])
                plgpu.barrier_wait(fulls["key"].at[slot])
                weights = Weights(tokens_s["since"].at[slot], scale, transposed)
                k, v = (tokens_s[name].at[slot] for name in ("key", "value"))
                if divides:
                    held.write_sums(sums, entered_g.at[b, h, chunk])
                if counted:  # While there are registers for it.
                    by = None
                    if vectors:
                        plgpu.barrier_wait(fulls["vector"].at[slot])
                        by = mosaic.load(tokens_s["vector"].at[slot], COL)
                    sums = held.sums_after(sums, weights, k, by)
                if query is not None:
                    out = outputs(weights, slot, chunk)
                else:
                    plgpu.barrier_wait(fulls["value"].at[slot])
                state = held.after(state, weights, k, v)
                for name in frees:
                    if name != "query" and not (offset and name == "vector"):
                        plgpu.barrier_arrive(frees[name].at[slot])
                if query is not None:
                    plgpu.barrier_wait(read)
                    held.publish(state, sums)
                    write(out, chunk, slot)
                return state, sums

            state, sums = lax.fori_loop(0, count, step, (state, sums))
            if return_state:
                last_g.at[b, *own_g][...] = state
            if counted:
                held.write_sums(sums, sums_g.at[b, h, place])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        def produce():
            plgpu.set_max_registers(producer, action="decrease")

            def source(name, n):
                chunk = chunk_of(n)
                if name == "since":
                    return since_of(since_g, b, h, chunk)
                gmem = tokens_g[name]
                tokens = pl.ds(chunk * CHUNK, CHUNK)
                if name == "vector":
                    split = lax.rem(part, jnp.int32(gmem.shape[3]))
                    return gmem.at[b, h, chunk, split]
                head = lax.div(h, jnp.int32(heads // gmem.shape[2]))
                if name == "value":
                    return gmem.at[b, tokens, head, pl.ds(first_column, columns)]
                return gmem.at[b, tokens, head]

            mosaic.by_one_warp(lambda: stream.copy(source, count))

        # First what needs few registers: what it is handed would else be kept, or
        # spilled, all along the other.
        pl.when(wg == 2)(produce)
        pl.when(wg < 2)(consume)

    widths = {"query": size, "key": size, "value": columns}
    buffers = {
        name: mosaic.tiled((stages, CHUNK, widths[name]), dtype, swizzle)
        for name in inputs
    }
    buffers["since"] = plgpu.SMEM((stages, CHUNK), jnp.float32)
    for x in vectors:  # Only one ahead where there are two, for want of room.
        width = x.shape[-1]
        buffers["vector"] = plgpu.SMEM((1 if offset else stages, width), jnp.float32)
    staged = mosaic.tiled((CHUNK, columns), dtype, swizzle)
    outputs = []
    if query is not None:
        out = (batch, length, heads, value_size)
        outputs.append(jax.ShapeDtypeStruct(out, dtype))
    if return_state:
        last = (batch, heads, served, size, value_size)
        outputs.append(jax.ShapeDtypeStruct(last, jnp.float32))
    if counted:
        sums = (batch, heads, served, size)
        outputs.append(jax.ShapeDtypeStruct(sums, jnp.float32))
    if divides:
        shapes = (batch, heads, length), (batch, heads, length // CHUNK, size)
        outputs += [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    if keep_states:
        kept = (batch, heads, length // CHUNK, size, value_size)
        outputs.append(jax.ShapeDtypeStruct(kept, dtype))
    if keep_rest:
        outputs.append(outputs[0])
    results = mosaic.call(
        body,
        (*inputs.values(), start, *decay, *vectors, *entering),
        tuple(outputs),
        scratch=[
            *Stream.scratch(buffers),
            None if query is None else State.scratch(size, columns, dtype),
            plgpu.SMEM((size,), jnp.float32) if divides else None,
            None if query is None or size == columns else staged,
            plgpu.Barrier(num_barriers=2, num_arrivals=2),
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
