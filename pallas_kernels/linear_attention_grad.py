"""Chunked linear attention on Hopper: gradients of keys and values in one pass.

As in `linear_attention.py`, but one warpgroup makes the gradients of keys and the other
those of values. Both need one state, the sum of queries times cotangents of later
tokens, of which each holds half.
"""

from __future__ import annotations

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic, products
from pallas_kernels.chunks import State, Stream, Weights, row_of, since_of
from pallas_kernels.linear_attention import Counted, Decay
from pallas_kernels.mosaic import COL, ROW, TILE

CHUNK = 64
# Key size times value size: half of the state fills a warpgroup's registers.
LARGEST = 128 * 128


def linear_grad(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    d_out: jax.Array,
    d_state: jax.Array,
    decay: Decay,
    counted: Counted | None = None,
    *,
    return_state: bool = True,
) -> tuple:
    """Gradients of keys, values and states, of which the last come back to front.

    Args:
      query: `[B, T, N, H]`, T a multiple of `CHUNK`.
      key: `[B, T, K, H]`.
      value: `[B, T, K, V]`, H V at most `LARGEST`.
      d_out: the output's cotangent, `[B, T, N, V]`.
      d_state: that of the state after each piece, float32 `[B or 1, N, pieces, H, V]`.
      decay: by chunks of `CHUNK`.
      counted: the gradient of one more column of values, of ones: of the state after
        each piece, and by token.
      return_state: whether the gradient of the state before each piece is wanted; if
        not, None is in its place.

    Returns:
      Gradients of key and value for each of the N heads, `[B, T, N, H]` and
      `[B, T, N, V]`, and of the state before each piece; with `counted` also of its
      last column, `[B, N, pieces, H]`.
    """
    _, heads, pieces, size, value_size = d_state.shape
    batch, length, dtype = *key.shape[:2], key.dtype
    chunks = length // CHUNK // pieces
    swizzle = State.swizzle(size, value_size, dtype)
    stages = 2 if max(size, value_size) < 256 else 1  # all that shared memory holds
    stages = min(stages, chunks)
    inputs = {"query": query, "key": key, "value": value, "d_out": d_out}
    shape = (CHUNK, CHUNK)

    # The copying warpgroup has more addresses to keep with one more array.
    consumer, producer = (232, 40) if counted else (240, 24)

    def body(*refs):
        tokens_g = dict(zip(inputs, refs, strict=False))
        state_g, since_g, scale_g, *rest = refs[len(inputs) :]
        if counted:
            sums_g, tokens_g["number"], *rest = rest
        d_key_g, d_value_g, *rest = rest
        if return_state:
            first_g, *rest = rest
        if counted:
            first_sums_g, *rest = rest
        stream, local = Stream.of(tuple(buffers), rest)
        tokens_s, fulls, frees = stream
        state_s, sums_s, d_key_s, d_value_s, met = local
        read, written = (met.at[i] for i in range(2))
        h, piece, b = (lax.axis_index(axis) for axis in ("h", "piece", "b"))
        wg = lax.axis_index("wg")

        def chunk_of(n):
            return piece * chunks + chunks - 1 - n

        def consume():
            plgpu.set_max_registers(consumer, action="increase")
            scale = scale_g[row_of(scale_g, b)]
            held = State(state_s, (size, value_size), wg, written, sums_s)
            own_g = (h, piece, *held.place())
            state = mosaic.load(state_g.at[row_of(state_g, b), *own_g], TILE)
            sums = None
            if counted:
                sums = mosaic.load(sums_g.at[b, h, piece, own_g[-2]], ROW)
            held.publish(state, sums)

            def gradient(chunk, slot, weights, names, state, staged, grad_g):
                """Of `own`: what `first` sees of it weighs `second`."""
                own, first, second = names
                # Of values' gradients, the column of ones has none.
                also = counted and own == "value"
                for name in names:
                    plgpu.barrier_wait(fulls[name].at[slot])
                tokens = tokens_s[own].at[slot]
                others = mosaic.transposed(tokens_s[first].at[slot])
                if also:
                    number = mosaic.load(tokens_s["number"].at[slot], COL)
                    scores = mosaic.along(number, 1, shape)
                    scores = products.accumulated(scores, tokens, others)
                else:
                    scores = products.product(tokens, others)
                p = (scores * weights.within(0, shape)).astype(dtype)
                if also:
                    grad = mosaic.along(mosaic.load(sums_s, COL), 1, staged.shape)
                    grad = products.accumulated(grad, tokens, state)
                else:
                    grad = products.product(tokens, state)
                plgpu.barrier_arrive(read)
                plgpu.barrier_arrive(frees[own].at[slot])
                entering = weights.entering(0, CHUNK)
                grad = grad * mosaic.along(entering, 0, grad.shape)
                grad = products.accumulated(grad, p, tokens_s[second].at[slot])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                staged[...] = grad.astype(dtype)
                plgpu.commit_smem()
                tokens = pl.ds(chunk * CHUNK, CHUNK)
                plgpu.copy_smem_to_gmem(staged, grad_g.at[b, tokens, h])

            def step(n, carry):
                state, sums = carry
                slot = mosaic.again(lax.rem(n, jnp.int32(stages)))
                chunk = chunk_of(n)
                plgpu.barrier_wait(fulls["since"].at[slot])
                if counted:
                    plgpu.barrier_wait(fulls["number"].at[slot])
                weights = Weights(tokens_s["since"].at[slot], scale, transposed=True)

                @pl.when(wg == 0)
                def _():
                    gradient(
                        *(chunk, slot, weights, ("value", "d_out", "query")),
                        *(mosaic.transposed(held.published()), d_key_s, d_key_g),
                    )

                @pl.when(wg == 1)
                def _():
                    gradient(
                        *(chunk, slot, weights, ("key", "query", "d_out")),
                        *(held.published(), d_value_s, d_value_g),
                    )

                q, do = (tokens_s[name].at[slot] for name in ("query", "d_out"))
                if counted:
                    number = mosaic.load(tokens_s["number"].at[slot], COL)
                    sums = held.sums_after(sums, weights, q, number)
                state = held.after(state, weights, q, do)
                for name in frees:
                    if name not in ("key", "value"):
                        plgpu.barrier_arrive(frees[name].at[slot])
                plgpu.barrier_wait(read)
                held.publish(state, sums)
                return state, sums

            state, sums = lax.fori_loop(0, chunks, step, (state, sums))
            if return_state:
                first_g.at[b, *own_g][...] = state
            if counted:
                held.write_sums(sums, first_sums_g.at[b, h, piece])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

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
                return gmem.at[b, tokens, head]

            mosaic.by_one_warp(lambda: stream.copy(source, chunks))

        pl.when(wg < 2)(consume)
        pl.when(wg == 2)(produce)

    buffers = {
        name: mosaic.tiled((stages, CHUNK, x.shape[-1]), dtype, swizzle)
        for name, x in inputs.items()
    }
    buffers["since"] = plgpu.SMEM((stages, CHUNK), jnp.float32)
    states: list[tuple[int, ...]] = []
    if return_state:
        states += [(batch, *d_state.shape[1:])]
    if counted:
        states += [(batch, heads, pieces, size)]
        buffers["number"] = plgpu.SMEM((stages, CHUNK), jnp.float32)
    results = mosaic.call(
        body,
        (*inputs.values(), d_state, *decay, *(counted or ())),
        (
            jax.ShapeDtypeStruct((batch, length, heads, size), dtype),
            jax.ShapeDtypeStruct((batch, length, heads, value_size), dtype),
            *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in states),
        ),
        scratch=[
            *Stream.scratch(buffers, {"key": 1, "value": 1}),
            State.scratch(size, value_size, dtype),
            plgpu.SMEM((size,), jnp.float32) if counted else None,
            mosaic.tiled((CHUNK, size), dtype, swizzle),
            mosaic.tiled((CHUNK, value_size), dtype, swizzle),
            plgpu.Barrier(num_barriers=2, num_arrivals=2),
        ],
        grid=(heads, pieces, batch),
        grid_names=("h", "piece", "b"),
        num_threads=3,
        thread_name="wg",
        kernel_name="linear_grad",
    )
    return results if return_state else (*results[:2], None, *results[2:])
