"""Chunked linear attention on Hopper: gradients of decays.

A pair of a query i and a key j has the share `A_ij = weight(i, j) (query_i . key_j)
(d_out_i . value_j)` of the loss, and a decay weighs all pairs of a query from its token
on and a key before it. So its gradient is the sum of their shares. From one token to
the next the sum changes by the token's own row and column of A. Where a chunk starts it
is the inner product of the state and the state's gradient, and so it cannot drift.
"""

from __future__ import annotations

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic, products
from pallas_kernels.chunks import (
    CHUNK,
    ROWS,
    State,
    Stream,
    Weights,
    row_of,
    since_of,
)
from pallas_kernels.linear_attention import Decay
from pallas_kernels.mosaic import ROW, TILE


def linear_decay_grad(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    d_out: jax.Array,
    states: jax.Array,
    d_state: jax.Array,
    decay: Decay,
) -> tuple[jax.Array, jax.Array]:
    """What the sum of A over later queries and earlier keys is, and how it changes.

    Args:
      query: `[B, T, N, H]`, T a multiple of `CHUNK`.
      key: `[B, T, K, H]`.
      value: `[B, T, K, V]`.
      d_out: the output's cotangent, `[B, T, N, V]`.
      states: those that enter the chunks, transposed: `[B, N, chunks, V, H]`.
      d_state: the cotangent of the state after each piece, transposed, float32
        `[B or 1, N, pieces, V, H]`.
      decay: by chunks of `CHUNK`.

    Returns:
      In float32 the sum at the start of each chunk, `[B, N, chunks]`, and by what each
      token lessens it, `[B, N, T]`.
    """
    _, heads, pieces, value_size, size = d_state.shape
    batch, length, dtype = *key.shape[:2], key.dtype
    chunks = length // CHUNK // pieces
    swizzle = State.swizzle(value_size, size, dtype)
    stages = 1  # All that shared memory holds.
    inputs = {"query": query, "d_out": d_out, "key": key, "value": value}
    held_rows = State.rows(value_size, size)

    def body(*refs):
        tokens_g = dict(zip(inputs, refs, strict=False))
        states_g, state_g, since_g, scale_g, sum_g, change_g, *local = refs[
            len(inputs) :
        ]
        stream, local = Stream.of(tuple(buffers), local)
        tokens_s, fulls, frees = stream
        state_s, sum_s, change_s, met = local
        read, written = (met.at[i] for i in range(2))
        h, piece, b = (lax.axis_index(axis) for axis in ("h", "piece", "b"))
        wg = lax.axis_index("wg")

        def chunk_of(n):
            return piece * chunks + chunks - 1 - n

        def consume():
            plgpu.set_max_registers(240, action="increase")
            first_row = wg * ROWS
            rows = pl.ds(first_row, ROWS)
            scale = scale_g[row_of(scale_g, b)]
            held = State(state_s, (value_size, size), wg, written)
            own_g = (row_of(state_g, b), h, piece, *held.place())
            state = mosaic.load(state_g.at[*own_g], TILE)
            held.publish(state)

            def step(n, state):
                slot = mosaic.again(lax.rem(n, jnp.int32(stages)))
                chunk = chunk_of(n)

                def arrive(*names):
                    for name in names:
                        plgpu.barrier_wait(fulls[name].at[slot])

                def release(*names):
                    for name in names:
                        plgpu.barrier_arrive(frees[name].at[slot])

                here = {name: ref.at[slot] for name, ref in tokens_s.items()}
                q, do, k, v = (here[name] for name in inputs)
                since, entering = here["since"], here["states"]

                def shares(own, others, near, far, state, transposed, then):
                    """The sums of the rows of A, or of its columns."""
                    own, near = own.at[rows], near.at[rows]
                    weights = Weights(since, scale, transposed)

                    # In parts, for which there are registers beside the state's.
                    def within(n, total):
                        part = pl.ds(n * ROWS, ROWS)
                        a = products.product(own, mosaic.transposed(others.at[part]))
                        a *= weights.within(first_row, (ROWS, ROWS), n * ROWS)
                        a *= products.product(near, mosaic.transposed(far.at[part]))
                        return total + a.sum(axis=1)

                    def beyond(n, total):
                        part = pl.ds(n * ROWS, ROWS)
                        a = products.product(own, mosaic.transposed(state.at[part]))
                        a *= mosaic.load(near.at[:, part], TILE).astype(jnp.float32)
                        return total + a.sum(axis=1)

                    none = mosaic.full((ROWS,), 0.0, ROW)
                    total = lax.fori_loop(0, value_size // ROWS, beyond, none)
                    total *= weights.entering(first_row, ROWS)
                    then()
                    return lax.fori_loop(0, CHUNK // ROWS, within, total)

                # Keys and values come last and go first.
                arrive("since", "query", "d_out", "states")
                by_query = shares(
                    *(q, k, do, v, entering),
                    transposed=False,
                    then=lambda: arrive("key", "value"),
                )
                by_key = shares(
                    *(k, q, v, do, held.published()),
                    transposed=True,
                    then=lambda: plgpu.barrier_arrive(read),
                )
                release("key", "value")
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                change_s.at[wg][...] = by_query - by_key
                weights = Weights(since, scale, transposed=True)
                state = held.after(state, weights, do, q)
                before = mosaic.load(entering.at[*held.place()], TILE)
                sum_s.at[wg][...] = (state * before.astype(jnp.float32)).sum(axis=1)
                plgpu.commit_smem()
                tokens = pl.ds(chunk * CHUNK + first_row, ROWS)
                plgpu.copy_smem_to_gmem(change_s.at[wg], change_g.at[b, h, tokens])
                plgpu.copy_smem_to_gmem(sum_s.at[wg], sum_g.at[b, h, chunk, wg])
                release("since", "query", "d_out", "states")
                plgpu.barrier_wait(read)
                held.publish(state)
                return state

            lax.fori_loop(0, chunks, step, state)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        def produce():
            plgpu.set_max_registers(24, action="decrease")

            def source(name, n):
                chunk = chunk_of(n)
                if name == "since":
                    return since_of(since_g, b, h, chunk)
                if name == "states":
                    return states_g.at[b, h, chunk]
                gmem = tokens_g[name]
                tokens = pl.ds(chunk * CHUNK, CHUNK)
                head = lax.div(h, jnp.int32(heads // gmem.shape[2]))
                return gmem.at[b, tokens, head]

            mosaic.by_one_warp(lambda: stream.copy(source, chunks))

        pl.when(wg < 2)(consume)
        pl.when(wg == 2)(produce)

    # In the order in which they are wanted.
    buffers = {
        "since": plgpu.SMEM((stages, CHUNK), jnp.float32),
        "states": mosaic.tiled((stages, value_size, size), dtype, swizzle),
    }
    for name, x in inputs.items():
        buffers[name] = mosaic.tiled((stages, CHUNK, x.shape[-1]), dtype, swizzle)
    sums, changes = mosaic.call(
        body,
        (*inputs.values(), states, d_state, *decay),
        (
            jax.ShapeDtypeStruct(
                (batch, heads, length // CHUNK, 2, held_rows), jnp.float32
            ),
            jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
        ),
        scratch=[
            *Stream.scratch(buffers),
            State.scratch(value_size, size, dtype),
            plgpu.SMEM((2, held_rows), jnp.float32),
            plgpu.SMEM((2, ROWS), jnp.float32),
            plgpu.Barrier(num_barriers=2, num_arrivals=2),
        ],
        grid=(heads, pieces, batch),
        grid_names=("h", "piece", "b"),
        num_threads=3,
        thread_name="wg",
        kernel_name="linear_decay_grad",
    )
    return sums.sum((-2, -1)), changes
