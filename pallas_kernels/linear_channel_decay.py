"""Chunked linear attention on Hopper with a decay a channel (Gated Linear Attention).

Weights inside a chunk differ by channel, so they must multiply queries and keys, and no
factor may exceed 1. As in `attnx.linear.xla`, blocks of 1, 2, 4, ... tokens are joined
in pairs: a query of the right block takes the decay from the middle of the pair on, a
key of the left one the decay up to there. These decays are sums of log decays, which a
product with a matrix of zeros and ones makes, whatever the tokens.

Each of two warpgroups serves half of the values, and waits for the other never.
"""

from __future__ import annotations

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic
from pallas_kernels.linear_attention import Stream, row_of
from pallas_kernels.mosaic import ROW, TILE

CHUNK = 64
# Channels that are worked on at a time, and rows of the state in one tile.
_PART, _ROWS = 32, 64
# In bytes, so that `_PART` is a whole tile.
_SWIZZLE = 64
_LEVELS = 6  # CHUNK is 2 to it.
# Key size times value size: half of the state fills a warpgroup's registers.
LARGEST = 128 * 128


def linear_channel_scan(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log2_decay: jax.Array,
    state: jax.Array,
    scale: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Outputs, and the state after the last token.

    Args:
      query: `[B, T, N, H]`, T a multiple of `CHUNK`, H 64 or 128.
      key: `[B, T, K, H]`.
      value: `[B, T, K, V]`, V 64 or 128.
      log2_decay: base-2 logarithm, float32 `[B, T, N, H]`.
      state: the one before the first token, float32 `[B, N, H, V]`.
      scale: on the queries, float32 `[1]`, or `[B]`.
    """
    batch, heads, size, value_size = state.shape
    length, dtype = key.shape[1], key.dtype
    chunks = length // CHUNK
    columns = value_size // 2
    parts = size // _PART
    tiles = [pl.ds(row, _ROWS) for row in range(0, size, _ROWS)]
    stages = 1  # all that shared memory has room for
    inputs = {"query": query, "key": key, "value": value, "decay": log2_decay}

    def body(*refs):
        tokens_g = dict(zip(inputs, refs, strict=False))
        state_g, scale_g, out_g, last_g, *rest = refs[len(inputs) :]
        stream, local = Stream.of(tuple(inputs), rest)
        tokens_s, fulls, frees = stream
        both_s, scaled_s, state_s, out_s = local
        h, b = (lax.axis_index(axis) for axis in ("h", "b"))
        wg = lax.axis_index("wg")

        def consume():
            plgpu.set_max_registers(240, action="increase")
            own = pl.ds(wg * columns, columns)
            scale = scale_g[row_of(scale_g, b)]
            high_s, low_s = both_s.at[wg, 0], both_s.at[wg, 1]
            keys_s = scaled_s.at[wg]

            def here(name):
                return tokens_s[name].at[0]

            def pairs(shape=(CHUNK, CHUNK)):
                """Indices of a row's token and of a column's."""
                i = mosaic.along(mosaic.iota(CHUNK, 0), 0, shape)
                j = mosaic.along(mosaic.iota(CHUNK, 1), 1, shape)
                return i, j

            def split():
                """Log decays as sums of two numbers that products can read."""

                @pl.loop(0, parts)
                def _(n):
                    part = pl.ds(n * _PART, _PART)
                    decay = mosaic.load(here("decay").at[:, part], TILE)
                    high = decay.astype(dtype)
                    high_s.at[:, part][...] = high
                    low = decay - high.astype(jnp.float32)
                    low_s.at[:, part][...] = low.astype(dtype)

                plgpu.commit_smem()

            def decayed(which, part):
                """By what the log decays of the tokens `which` decay, by channel."""
                which = jnp.where(which, 1.0, 0.0).astype(dtype)
                both = (ref.at[:, part] for ref in (high_s, low_s))
                total = mosaic.full((CHUNK, _PART), 0.0, TILE)
                return jnp.exp2(mosaic.accumulated(total, which, *both))

            def tokens(name, part):
                return mosaic.load(here(name).at[:, part], TILE).astype(jnp.float32)

            def level(n, p):
                """`p` with the weights between the two halves of pairs of blocks."""
                i, j = pairs()
                right = (i >> n) & 1 == 1
                same = i >> n == j >> n
                which = same & ((right & (j <= i)) | (~right & (j > i)))

                def product(n, scores):
                    part = pl.ds(n * _PART, _PART)
                    weights = decayed(which, part)
                    keys = (tokens("key", part) * weights).astype(dtype)
                    keys_s.at[:, part][...] = keys
                    plgpu.commit_smem()
                    q = (tokens("query", part) * weights).astype(dtype)
                    keys = mosaic.transposed(keys_s.at[:, part])
                    return mosaic.accumulated(scores, q, keys)

                plgpu.commit_smem()  # All have read what was there.
                scores = mosaic.full((CHUNK, CHUNK), 0.0, TILE)
                scores = lax.fori_loop(0, parts, product, scores)
                paired = (i >> (n + 1) == j >> (n + 1)) & ((i >> n) > (j >> n))
                return p + jnp.where(paired, scores, 0.0)

            def itself():
                """The weight of each token for itself: no decay."""

                def add(n, total):
                    part = pl.ds(n * _PART, _PART)
                    both = tokens("query", part) * tokens("key", part)
                    return total + both.sum(axis=1)

                total = mosaic.full((CHUNK,), 0.0, ROW)
                total = lax.fori_loop(0, parts, add, total)
                i, j = pairs()
                return jnp.where(i == j, mosaic.along(total, 0, i.shape), 0.0)

            def outputs():
                p = lax.fori_loop(0, _LEVELS, level, itself())
                values = here("value").at[:, own]
                out = mosaic.full((CHUNK, columns), 0.0, TILE)
                out = mosaic.accumulated(out, p.astype(dtype), values)

                def before(n, out):
                    part = pl.ds(n * _PART, _PART)
                    i, j = pairs()
                    q = tokens("query", part) * decayed(j <= i, part)
                    entering = state_s.at[part, own]
                    return mosaic.accumulated(out, q.astype(dtype), entering)

                return lax.fori_loop(0, parts, before, out) * scale

            def after(state):
                """What leaves the chunk."""
                plgpu.commit_smem()  # All have read what was there.

                @pl.loop(0, parts)
                def _(n):
                    part = pl.ds(n * _PART, _PART)
                    i, j = pairs()
                    keys = tokens("key", part) * decayed(j > i, part)
                    keys_s.at[:, part][...] = keys.astype(dtype)

                plgpu.commit_smem()
                values, left = here("value").at[:, own], []
                for tile, old in zip(tiles, state, strict=True):
                    total = sum(
                        mosaic.load_transposed(ref.at[:, tile])
                        .astype(jnp.float32)
                        .sum(axis=1)
                        for ref in (high_s, low_s)
                    )
                    old = old * mosaic.along(jnp.exp2(total), 0, old.shape)
                    keys = mosaic.load_transposed(keys_s.at[:, tile])
                    left.append(mosaic.accumulated(old, keys, values))
                return tuple(left)

            def publish(state):
                for tile, x in zip(tiles, state, strict=True):
                    state_s.at[tile, own][...] = x.astype(dtype)
                plgpu.commit_smem()

            def step(n, state):
                for name in fulls:
                    plgpu.barrier_wait(fulls[name].at[0])
                split()
                out = outputs()
                state = after(state)
                for name in frees:
                    plgpu.barrier_arrive(frees[name].at[0])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                out_s.at[wg][...] = out.astype(dtype)
                publish(state)
                rows = pl.ds(n * CHUNK, CHUNK)
                plgpu.copy_smem_to_gmem(out_s.at[wg], out_g.at[b, rows, h, own])
                return state

            state = tuple(
                mosaic.load(state_g.at[b, h, tile, own], TILE) for tile in tiles
            )
            publish(state)
            state = lax.fori_loop(0, chunks, step, state)
            for tile, x in zip(tiles, state, strict=True):
                last_g.at[b, h, tile, own][...] = x
            plgpu.wait_smem_to_gmem(0)

        def produce():
            plgpu.set_max_registers(24, action="decrease")

            def source(name, n):
                gmem = tokens_g[name]
                head = lax.div(h, jnp.int32(heads // gmem.shape[2]))
                return gmem.at[b, pl.ds(n * CHUNK, CHUNK), head]

            mosaic.by_one_warp(lambda: stream.copy(source, chunks, stages))

        pl.when(wg < 2)(consume)
        pl.when(wg == 2)(produce)

    tiled = functools.partial(mosaic.tiled, dtype=dtype, swizzle=_SWIZZLE)
    buffers = {
        "query": tiled((stages, CHUNK, size)),
        "key": tiled((stages, CHUNK, size)),
        "value": tiled((stages, CHUNK, value_size)),
        "decay": mosaic.tiled((stages, CHUNK, size), jnp.float32),
    }
    return mosaic.call(
        body,
        (*inputs.values(), state, scale),
        (
            jax.ShapeDtypeStruct((batch, length, heads, value_size), dtype),
            jax.ShapeDtypeStruct(state.shape, jnp.float32),
        ),
        scratch=[
            *Stream.scratch(buffers),
            tiled((2, 2, CHUNK, size)),
            tiled((2, CHUNK, size)),
            tiled((size, value_size)),
            tiled((2, CHUNK, columns)),
        ],
        grid=(heads, batch),
        grid_names=("h", "b"),
        num_threads=3,
        thread_name="wg",
        kernel_name="linear_channel_scan",
    )
