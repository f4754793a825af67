"""Chunked linear attention on Hopper with a decay a channel: all gradients.

From the end of the sequence, with the states that enter the chunks at hand. Between
two blocks of tokens (`Pair`) a weight is a product of two decays that multiply the
query and the key; what a token gets of the other block is a sum over that, decayed
once more. Right blocks get gradients of queries and left ones those of keys, and as the
matrix of `d_out . value` is made symmetric, one product serves both.

A channel's decay weighs all pairs of a query from its token on and a key before it, so
its gradient is the sum of their shares of the loss. Of pairs inside a chunk, that
changes from one token to the next by what the token has as a query less what it has as
a key; both are made of the same rounded numbers, so that what does not belong cancels.
The others are added up without it: queries of the chunk with keys before it, keys of
the chunk with queries behind it, and the inner product of the state and its gradient
for those that meet across the chunk.
"""

from __future__ import annotations

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic, products, shared
from pallas_kernels.chunks import Stream, row_of
from pallas_kernels.linear_channel_decay import (
    CHUNK,
    LEVELS,
    ROWS,
    Decays,
    Pair,
    in_two,
    itself,
    load,
    staged,
    tokens,
)
from pallas_kernels.mosaic import COL, TILE

# Channels that are worked on at a time, for which there are registers.
_PART = 32


def linear_channel_grad(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array,
    d_out: jax.Array,
    states: jax.Array,
    d_last: jax.Array,
    scale: jax.Array,
) -> tuple[jax.Array, ...]:
    """Gradients of queries, keys, values, log decays and the state before them all.

    Args:
      query: `[B, T, N, H]`, T a multiple of `CHUNK`, H 64 or 128.
      key: `[B, T, K, H]`.
      value: `[B, T, K, V]`, V 64 or 128.
      log_decay: natural logarithm of the decays, `[B, T, N, H]`.
      d_out: the output's cotangent, `[B, T, N, V]`.
      states: those that enter the chunks, `[B, N, chunks, H, V]`.
      d_last: the cotangent of the state after the last token, float32 `[B, N, H, V]`.
      scale: on the queries, float32 `[1]`, or `[B]`.

    Returns:
      Those of query, key and value for each of the N heads, `[B, T, N, *]` in their
      dtype, of log decays in theirs, `[B, T, N, H]`, and of the state in float32,
      `[B, N, H, V]`.
    """
    batch, heads, size, value_size = d_last.shape
    length, dtype = key.shape[1], key.dtype
    chunks = length // CHUNK
    columns, parts = value_size // 2, size // 2 // _PART
    tiles = [pl.ds(row, ROWS) for row in range(0, size, ROWS)]
    stages = 1  # All that shared memory holds.
    swizzle = mosaic.swizzle_of(_PART, dtype)  # A part is a whole tile.
    inputs = {"query": query, "key": key, "value": value}
    inputs |= {"d_out": d_out, "states": states}

    def body(*refs):
        tokens_g = dict(zip(inputs, refs, strict=False))
        log_decay_g, d_last_g, scale_g, *rest = refs[len(inputs) :]
        d_query_g, d_key_g, d_value_g, d_decay_g, d_first_g, *rest = rest
        stream, rest = Stream.of(tuple(inputs), rest)
        tokens_s, fulls, frees = stream
        arriving, local = Stream.of(("log_decay",), rest)
        decays_s, weighed_s, change_s, scores_s, d_state_s, across_s, barriers = local
        decays = Decays(decays_s)
        summed, met, written = (barriers.at[i] for i in range(3))
        h, b = (lax.axis_index(axis) for axis in ("h", "b"))
        wg = lax.axis_index("wg")

        def consume():
            plgpu.set_max_registers(240, action="increase")
            scale = scale_g[row_of(scale_g, b)]

            def here(*names):
                """The chunk's, by addresses that are made where they are used."""
                slot = mosaic.again(jnp.int32(0))
                return (tokens_s[name].at[slot] for name in names)

            def columns_of(wg):
                return pl.ds(wg * columns, columns)

            def part_of(wg, n):
                return pl.ds((2 * n + wg) * _PART, _PART)

            def shares():
                """Gradients of scores, in memory symmetric; returns the diagonal."""
                i, j = tokens()
                v_s, do_s = here("value", "d_out")
                d_scores = products.product(do_s, mosaic.transposed(v_s))
                mirrored = products.product(v_s, mosaic.transposed(do_s))
                both = jnp.where(i >= j, d_scores, mirrored)
                shared.store_matrices(
                    scores_s.at[mosaic.again(wg)],
                    both.astype(dtype),
                    swizzle,
                )
                return jnp.where(i == j, d_scores, 0.0).sum(axis=1)

            def level(n, carry, part):
                """What tokens get of each other across the middle of their pairs."""
                p, d_query, d_key, change = carry
                pair, me = Pair(n), mosaic.again(wg)
                part = part_of(me, part)
                x_s = weighed_s.at[me, lax.rem(n, jnp.int32(2))]
                decay = pair.decay(decays, part)
                right = pair.right(decay.shape)
                left, own = (x.at[:, part] for x in here("key", "query"))
                x = shared.load_alternating(left, own, n, swizzle).astype(jnp.float32)
                x = (x * decay * jnp.where(right, scale, 1.0)).astype(dtype)
                shared.store(x_s, x, swizzle)
                plgpu.commit_smem()
                p = p + pair.products(x, x_s)
                near = pair.between(shared.load(scores_s.at[me], swizzle))
                seen = mosaic.full(decay.shape, 0.0, TILE)
                seen = products.accumulated(seen, near, x_s)
                grad, both = seen * decay, seen * load(x_s, swizzle)
                return (
                    p,
                    d_query + jnp.where(right, grad, 0.0),
                    d_key + jnp.where(right, 0.0, grad),
                    change + jnp.where(right, both, -both),
                )

            def channels(n, p, rows, diagonal):
                """The gradients of one part of the channels, and its scores."""
                me = mosaic.again(wg)
                part = part_of(me, n)
                shape = CHUNK, _PART
                # What is staged there has been copied.
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.commit_smem()
                plgpu.barrier_wait(arriving.full["log_decay"].at[0])
                own = pl.ds(me * _PART, _PART)
                halves = [weighed_s.at[me, half] for half in range(2)]
                arrived = arriving.tokens["log_decay"].at[0, :, own]
                decays.take(arrived, part, halves, swizzle)
                plgpu.barrier_arrive(arriving.free["log_decay"].at[0])
                q, k = (load(x.at[:, part], swizzle) for x in here("query", "key"))
                q = q * scale
                diagonal = mosaic.along(diagonal, 0, shape)
                none = mosaic.full(shape, 0.0, TILE)
                p, d_query, d_key, change = lax.fori_loop(
                    0,
                    LEVELS,
                    functools.partial(level, part=n),
                    (p + itself(q * k), diagonal * k, diagonal * q, none),
                )

                def write(slot, grad, grad_g, change):
                    """A gradient to where it belongs, and `change` for a product."""
                    plgpu.commit_smem()  # All have read what was there.
                    for half, x in enumerate(in_two(change, jnp.bfloat16)):
                        shared.store_matrices(change_s.at[me, half], x, swizzle)
                    grad = grad.astype(dtype)
                    shared.store_matrices(weighed_s.at[me, slot], grad, swizzle)
                    plgpu.commit_smem()
                    place = grad_g.at[b, rows, h, part]
                    plgpu.copy_smem_to_gmem(weighed_s.at[me, slot], place)

                def added(d_decay, which):
                    """With the sums of `change` over the tokens `which`, a row each."""
                    which = jnp.where(which, 1.0, 0.0).astype(jnp.bfloat16)
                    halves = (change_s.at[me, half] for half in range(2))
                    return products.accumulated(d_decay, which, *halves)

                # Queries and keys give way to what the states are to them.
                me, n = mosaic.again(wg), mosaic.again(n)
                part = part_of(me, n)
                own_q, own_k = (x.at[:, part] for x in here("query", "key"))
                decay = decays.since(part)
                do_s, entering_s = here("d_out", "states")
                seen = products.product(do_s, mosaic.transposed(entering_s.at[part]))
                q = (load(own_q, swizzle) * scale * decay).astype(dtype)
                shared.store_matrices(own_q, q, swizzle)
                change = change + q.astype(jnp.float32) * seen
                write(0, (d_query + seen * decay) * scale, d_query_g, change)
                across = sum(mosaic.load(across_s.at[one, part], COL) for one in (0, 1))
                d_decay = mosaic.along(across, 1, shape) * decay
                decay = decays.until(part)
                i, j = tokens()
                d_decay = added(d_decay * decay, j >= i)
                (v_s,) = here("value")
                seen = products.product(v_s, mosaic.transposed(d_state_s.at[part]))
                k = (load(own_k, swizzle) * decay).astype(dtype)
                shared.store_matrices(own_k, k, swizzle)
                write(1, d_key + seen * decay, d_key_g, k.astype(jnp.float32) * seen)
                i, j = tokens()
                d_decay = added(d_decay, j < i)
                place = d_decay_g.at[mosaic.again(b), rows, mosaic.again(h), part]
                shared.store(place, d_decay.astype(log_decay.dtype))
                return p

            def meet_across(d_state):
                """Inner products of the states at the chunk's two ends."""
                me = mosaic.again(wg)
                (entering_s,) = here("states")
                for tile, x in zip(tiles, d_state, strict=True):
                    state = load(entering_s.at[tile, columns_of(me)], swizzle)
                    across_s.at[me, tile][...] = (x * state).sum(axis=1)
                plgpu.commit_smem()
                plgpu.barrier_arrive(summed)

            def publish(d_state):
                """For both to read."""
                own = columns_of(mosaic.again(wg))
                for tile, x in zip(tiles, d_state, strict=True):
                    x = x.astype(dtype)
                    shared.store_matrices(d_state_s.at[tile, own], x, swizzle)
                plgpu.commit_smem()
                plgpu.barrier_arrive(written)
                plgpu.barrier_wait(written)

            def step(n, d_state):
                chunk = chunks - 1 - n
                rows = pl.ds(chunk * CHUNK, CHUNK)
                for name in fulls:
                    plgpu.barrier_wait(fulls[name].at[0])
                meet_across(d_state)
                diagonal = shares()
                plgpu.barrier_wait(summed)
                p = lax.fori_loop(
                    0,
                    parts,
                    lambda n, p: channels(n, p, rows, diagonal),
                    mosaic.full((CHUNK, CHUNK), 0.0, TILE),
                )
                i, j = tokens()
                me = mosaic.again(wg)
                own = columns_of(me)
                # The scores take the place of their gradients.
                p = jnp.where(i <= j, p, 0.0).astype(dtype)
                shared.store_matrices(scores_s.at[me], p, swizzle)
                plgpu.commit_smem()
                plgpu.barrier_arrive(met)
                plgpu.barrier_wait(met)
                q_s, k_s, v_s, do_s = here("query", "key", "value", "d_out")
                d_value = mosaic.full((CHUNK, columns), 0.0, TILE)
                for one in range(2):
                    p_s = scores_s.at[mosaic.again(jnp.int32(one))]
                    d_value = products.accumulated(d_value, p_s, do_s.at[:, own])
                d_value = products.accumulated(d_value, k_s, d_state_s.at[:, own])
                plgpu.barrier_arrive(frees["key"].at[0])
                # The values have been read: their place takes their gradients.
                shared.store_matrices(v_s.at[:, own], d_value.astype(dtype), swizzle)
                plgpu.commit_smem()  # All have read the state as well.
                before = []
                for tile, x in zip(tiles, d_state, strict=True):
                    x = x * mosaic.along(decays.across(tile), 0, x.shape)
                    first = mosaic.again(jnp.int32(tile.start))
                    q = mosaic.transposed(q_s.at[:, pl.ds(first, ROWS)])
                    before.append(products.accumulated(x, q, do_s.at[:, own]))
                for name in ("query", "d_out", "states"):
                    plgpu.barrier_arrive(frees[name].at[0])
                publish(before)

                @pl.when(wg == 0)
                def _():
                    plgpu.copy_smem_to_gmem(v_s, d_value_g.at[b, rows, h])

                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(frees["value"].at[0])
                return tuple(before)

            own = columns_of(wg)
            d_state = tuple(
                mosaic.load(d_last_g.at[b, h, tile, own], TILE) for tile in tiles
            )
            publish(d_state)
            d_state = lax.fori_loop(0, chunks, step, d_state)
            for tile, x in zip(tiles, d_state, strict=True):
                d_first_g.at[b, h, tile, own][...] = x
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        def produce():
            plgpu.set_max_registers(24, action="decrease")

            def source(name, n):
                gmem, chunk = tokens_g[name], chunks - 1 - n
                if name == "states":
                    return gmem.at[b, h, chunk]
                head = lax.div(h, jnp.int32(heads // gmem.shape[2]))
                return gmem.at[b, pl.ds(chunk * CHUNK, CHUNK), head]

            def decays_of(_, n):
                rows = pl.ds((chunks - 1 - lax.div(n, jnp.int32(parts))) * CHUNK, CHUNK)
                both = pl.ds(lax.rem(n, jnp.int32(parts)) * 2 * _PART, 2 * _PART)
                return log_decay_g.at[b, rows, h, both]

            def copy():
                # Decays come part by part: the first while the chunk before is at work.
                @pl.loop(0, chunks)
                def _(n):
                    arriving.fetch(decays_of, n * parts)
                    stream.fetch(source, n)
                    for part in range(1, parts):
                        arriving.fetch(decays_of, n * parts + part)

                arriving.drain(chunks * parts)
                stream.drain(chunks)

            mosaic.by_one_warp(copy)

        pl.when(wg < 2)(consume)
        pl.when(wg == 2)(produce)

    tiled = functools.partial(mosaic.tiled, dtype=dtype, swizzle=swizzle)
    shapes = {name: (CHUNK, x.shape[-1]) for name, x in inputs.items()}
    shapes["states"] = size, value_size
    like = lambda *shape: jax.ShapeDtypeStruct((batch, length, heads, *shape), dtype)
    return mosaic.call(
        body,
        (*inputs.values(), log_decay, d_last, scale),
        (
            like(size),
            like(size),
            like(value_size),
            jax.ShapeDtypeStruct(log_decay.shape, log_decay.dtype),
            jax.ShapeDtypeStruct(d_last.shape, jnp.float32),
        ),
        scratch=[
            *Stream.scratch(
                {name: tiled((stages, *shape)) for name, shape in shapes.items()}
            ),
            *Stream.scratch({"log_decay": staged(log_decay, 2 * _PART, _PART)}),
            Decays.scratch(size),
            tiled((2, 2, CHUNK, _PART)),
            mosaic.tiled((2, 2, CHUNK, _PART), jnp.bfloat16),
            tiled((2, CHUNK, CHUNK)),
            tiled((size, value_size)),
            plgpu.SMEM((2, size), jnp.float32),
            plgpu.Barrier(num_barriers=3, num_arrivals=2),
        ],
        grid=(heads, batch),
        grid_names=("h", "b"),
        num_threads=3,
        thread_name="wg",
        kernel_name="linear_channel_grad",
    )
