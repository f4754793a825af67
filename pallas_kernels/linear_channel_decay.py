"""Chunked linear attention on Hopper with a decay a channel (Gated Linear Attention).

Weights inside a chunk differ by channel, so they must multiply queries and keys, and no
factor may exceed 1. As in `attnx.linear.xla`, blocks of 1, 2, 4, ... tokens are joined
in pairs: a query of the right block takes the decay from the middle of the pair on, a
key of the left one the decay up to there. These decays are sums of log decays, which a
product with a matrix of zeros and ones makes, whatever the tokens.

Each of two warpgroups weighs tokens for half of the channels, and then sums up half of
the values. They meet once a chunk, in between.
"""

from __future__ import annotations

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import mosaic, products
from pallas_kernels.chunks import Stream, row_of
from pallas_kernels.mosaic import LOG2E, TILE

CHUNK = 64
LEVELS = 6  # CHUNK is 2 to it.
# A logarithm below which float32 knows no weight: 2^-184 is 0.
LEAST = -184.0
# Rows of the state in one tile.
ROWS = 64


def linear_channel_scan(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array,
    state: jax.Array,
    scale: jax.Array,
    *,
    keep_states: bool = False,
) -> tuple[jax.Array, ...]:
    """Outputs, and the state after the last token.

    Args:
      query: `[B, T, N, H]`, T a multiple of `CHUNK`, H 64 or 128.
      key: `[B, T, K, H]`.
      value: `[B, T, K, V]`, V 64 or 128.
      log_decay: natural logarithm of the decays, `[B, T, N, H]`.
      state: the one before the first token, float32 `[B, N, H, V]`.
      scale: on the queries, float32 `[1]`, or `[B]`.
      keep_states: also returns the states that enter the chunks, `[B, N, chunks, H, V]`
        in value's dtype.
    """
    batch, heads, size, value_size = state.shape
    length, dtype = key.shape[1], key.dtype
    chunks = length // CHUNK
    columns, channels = value_size // 2, size // 2
    tiles = [pl.ds(row, ROWS) for row in range(0, size, ROWS)]
    stages = min(2, chunks)
    ahead = {"query": query, "key": key, "value": value}
    inputs = {**ahead, "log_decay": log_decay}

    def body(*refs):
        tokens_g = dict(zip(inputs, refs, strict=False))
        state_g, scale_g, ones_g, out_g, last_g, *rest = refs[len(inputs) :]
        if keep_states:
            states_g, *rest = rest
        stream, local = Stream.of(tuple(inputs), rest)
        tokens_s, fulls, frees = stream
        decays, local = Decays(*local[:3]), local[3:]
        weighed_s, scores_s, state_s, met, written = local
        h, b = (lax.axis_index(axis) for axis in ("h", "b"))
        wg = lax.axis_index("wg")

        def consume():
            plgpu.set_max_registers(240, action="increase")
            scale = scale_g[row_of(scale_g, b)]

            def own_columns():
                """This warpgroup's columns of values."""
                return pl.ds(mosaic.again(wg) * columns, columns)

            def own_part():
                """This warpgroup's channels."""
                return pl.ds(mosaic.again(wg) * channels, channels)

            def scores(q_s, k_s):
                """What these channels add to the scores."""

                part, weighed = own_part(), weighed_s.at[mosaic.again(wg)]
                own_q, own_k = q_s.at[:, part], k_s.at[:, part]

                def level(n, p):
                    # From the widest pair on: what it has wrong inside of blocks is
                    # replaced by the next.
                    pair = Pair(LEVELS - 1 - n)
                    decay = pair.decay(decays, part)
                    q, k = mosaic.load(own_q, TILE), mosaic.load(own_k, TILE)
                    x = jnp.where(pair.right(decay.shape), q, k).astype(jnp.float32)
                    x = (x * decay).astype(dtype)
                    plgpu.commit_smem()  # All have read what was there.
                    weighed[...] = x
                    plgpu.commit_smem()
                    product = mosaic.full((CHUNK, CHUNK), 0.0, TILE)
                    product = products.accumulated(
                        product, x, mosaic.transposed(weighed)
                    )
                    return jnp.where(pair.together(), product, p)

                p = mosaic.full((CHUNK, CHUNK), 0.0, TILE)
                p = lax.fori_loop(0, LEVELS, level, p)
                i, j = tokens()
                return jnp.where(i == j, itself(load(own_q) * load(own_k)), p)

            def after(state, k, v):
                """What leaves the chunk."""
                left = []
                for tile, old in zip(tiles, state, strict=True):
                    old = old * mosaic.along(decays.across(tile), 0, old.shape)
                    keys = mosaic.transposed(k.at[:, tile])
                    left.append(products.accumulated(old, keys, v))
                return tuple(left)

            def copy(smem, gmem):
                """By the first, of what both have written."""

                @pl.when(wg == 0)
                def _():
                    plgpu.copy_smem_to_gmem(smem, gmem)

            def release_values(n):
                """When the output that took their place has been copied."""
                plgpu.barrier_arrive(frees["value"].at[lax.rem(n, jnp.int32(stages))])

            def publish(state):
                own = own_columns()
                for tile, x in zip(tiles, state, strict=True):
                    state_s.at[tile, own][...] = x.astype(dtype)
                plgpu.commit_smem()
                plgpu.barrier_arrive(written)
                plgpu.barrier_wait(written)

            def step(n, state):
                slot = lax.rem(n, jnp.int32(stages))
                if keep_states:
                    copy(state_s, states_g.at[b, h, n])
                plgpu.barrier_wait(fulls["log_decay"].at[0])
                part = own_part()
                decays.take(tokens_s["log_decay"].at[0, :, part], part)
                plgpu.barrier_arrive(frees["log_decay"].at[0])
                q, k, v = (tokens_s[name].at[slot] for name in ahead)
                for name in ahead:
                    plgpu.barrier_wait(fulls[name].at[slot])
                i, j = tokens()
                p = scores(q, k)
                part = own_part()
                own_q, own_k = q.at[:, part], k.at[:, part]
                scores_s.at[mosaic.again(wg)][...] = jnp.where(j <= i, p, 0.0).astype(
                    dtype
                )
                # Queries and keys give way to what the states are to them.
                own_q[...] = (load(own_q) * decays.over(j <= i, part)).astype(dtype)
                own_k[...] = (load(own_k) * decays.over(j > i, part)).astype(dtype)
                plgpu.commit_smem()
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                pl.when(n > 0)(lambda: release_values(n - 1))
                plgpu.barrier_arrive(met)
                plgpu.barrier_wait(met)
                own = own_columns()
                out = mosaic.full((CHUNK, columns), 0.0, TILE)
                for one in range(2):
                    out = products.accumulated(out, scores_s.at[one], v.at[:, own])
                out = products.accumulated(out, q, state_s.at[:, own])
                plgpu.barrier_arrive(frees["query"].at[slot])
                state = after(state, k, v.at[:, own])
                plgpu.barrier_arrive(frees["key"].at[slot])
                # The values have been read: their place takes the output.
                plgpu.commit_smem()
                v.at[:, own][...] = (out * scale).astype(dtype)
                publish(state)
                copy(v, out_g.at[b, pl.ds(n * CHUNK, CHUNK), h])
                return state

            decays.wait()
            own = own_columns()
            state = tuple(
                mosaic.load(state_g.at[b, h, tile, own], TILE) for tile in tiles
            )
            publish(state)
            state = lax.fori_loop(0, chunks, step, state)
            own = own_columns()
            for tile, x in zip(tiles, state, strict=True):
                last_g.at[b, h, tile, own][...] = x
            plgpu.wait_smem_to_gmem(0)
            release_values(jnp.int32(chunks - 1))

        def produce():
            plgpu.set_max_registers(24, action="decrease")

            def source(name, n):
                gmem = tokens_g[name]
                head = lax.div(h, jnp.int32(heads // gmem.shape[2]))
                return gmem.at[b, pl.ds(n * CHUNK, CHUNK), head]

            def copy():
                decays.fetch(ones_g)
                stream.copy(source, chunks)

            mosaic.by_one_warp(copy)

        pl.when(wg < 2)(consume)
        pl.when(wg == 2)(produce)

    # One swizzle for all, since products take no two.
    swizzle = mosaic.swizzle_of(min(channels, columns), dtype)
    tiled = functools.partial(mosaic.tiled, dtype=dtype, swizzle=swizzle)
    buffers = {name: tiled((stages, CHUNK, x.shape[-1])) for name, x in ahead.items()}
    # Parted as soon as they come, and then the next may come.
    buffers["log_decay"] = staged(log_decay, size, channels)
    outputs = [
        jax.ShapeDtypeStruct((batch, length, heads, value_size), dtype),
        jax.ShapeDtypeStruct(state.shape, jnp.float32),
    ]
    if keep_states:
        kept = (batch, heads, chunks, size, value_size)
        outputs.append(jax.ShapeDtypeStruct(kept, dtype))
    return mosaic.call(
        body,
        (*inputs.values(), state, scale, Decays.ones(dtype)),
        tuple(outputs),
        scratch=[
            *Stream.scratch(buffers),
            *Decays.scratch(tiled, size),
            tiled((2, CHUNK, channels)),
            tiled((2, CHUNK, CHUNK)),
            tiled((size, value_size)),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=2),
        ],
        grid=(heads, batch),
        grid_names=("h", "b"),
        num_threads=3,
        thread_name="wg",
        kernel_name="linear_channel_scan",
    )


def staged(log_decay: jax.Array, size: int, part: int):
    """Room for a chunk's log decays of `size` channels, read by `part`."""
    swizzle = mosaic.swizzle_of(part, log_decay.dtype)
    return mosaic.tiled((1, CHUNK, size), log_decay.dtype, swizzle)


def in_two(x, dtype):
    """Two tiles of a dtype that products can read, which add up to float32 `x`."""
    high = mosaic.rounded(x, dtype)
    return high, (x - high.astype(jnp.float32)).astype(dtype)


class Decays:
    """Base-2 log decays of a chunk's tokens by channel, in shared memory.

    In two parts, which products can read and which add up to the float32 ones.
    """

    def __init__(self, ref, ones_ref, here):
        self._parts = ref.at[0], ref.at[1]
        self._ones, self._here = ones_ref, here

    @staticmethod
    def scratch(tiled, size) -> list:
        """What it is made of, by a function of a shape."""
        return [tiled((2, CHUNK, size)), tiled((1, 8, CHUNK)), plgpu.Barrier()]

    @staticmethod
    def ones(dtype) -> np.ndarray:
        """What `fetch` takes from memory."""
        return np.ones((8, CHUNK), dtype)

    def fetch(self, ones):
        """To be called by the copying warp, before all else."""
        plgpu.copy_gmem_to_smem(ones, self._ones.at[0], self._here)

    def wait(self):
        """To be called by the others."""
        plgpu.barrier_wait(self._here)

    def take(self, log_decay, channels):
        """Those of these channels, of natural logarithms in shared memory."""
        swizzle = mosaic.swizzle_of(channels.size, log_decay.dtype)
        x = mosaic.load_anew(log_decay, swizzle).astype(jnp.float32)
        x = jnp.maximum(x * LOG2E, LEAST)
        for part, half in zip(
            self._parts, in_two(x, self._parts[0].dtype), strict=True
        ):
            part.at[:, channels][...] = half
        plgpu.commit_smem()

    def over(self, which, channels):
        """By what the tokens `which`, a row for each token, decay these channels."""
        which = jnp.where(which, 1.0, 0.0).astype(self._parts[0].dtype)
        total = mosaic.full((CHUNK, channels.size), 0.0, TILE)
        parts = (part.at[:, channels] for part in self._parts)
        return jnp.exp2(products.accumulated(total, which, *parts))

    def across(self, channels):
        """By what all tokens decay these channels, a row of a state each."""
        first = mosaic.again(jnp.int32(channels.start))
        channels = pl.ds(first, channels.size)
        # A product sums faster than registers do; its columns are the same.
        parts = (mosaic.transposed(part.at[:, channels]) for part in self._parts)
        ones = mosaic.transposed(self._ones.at[mosaic.again(jnp.int32(0))])
        return jnp.exp2(
            products.sum_of_products(*((x, ones) for x in parts)).max(axis=1)
        )


class Pair:
    """Two neighbouring blocks of `2**n` tokens, all such pairs of a chunk at once.

    Queries are in right blocks, keys in left ones, the middle is between them.
    """

    def __init__(self, n):
        self._n = n

    def right(self, shape):
        """Whether a row's token is in a right block."""
        return mosaic.along((_indices(0) >> self._n) & 1 == 1, 0, shape)

    def decay(self, decays: Decays, channels):
        """Of each token from the middle on, or up to there."""
        i, j = tokens()
        until = jnp.where(self.right(i.shape), j <= i, j > i)
        return decays.over(until & (self._apart() == 0), channels)

    def together(self):
        """Whether a row's token and a column's are in the same pair."""
        i, j = (index >> self._n + 1 for index in tokens())
        return i == j

    def between(self, x):
        """A matrix where its rows and columns are on two sides of a middle, else 0."""
        return jnp.where(self._apart() == 1, x, jnp.zeros_like(x))

    def _apart(self):
        """0 for tokens of one block, 1 for those of two in a pair."""
        i, j = (index >> self._n for index in tokens())
        return i ^ j

    def products(self, x, x_s):
        """Inner products of tokens in registers and in memory, across the middle."""
        p = mosaic.full((CHUNK, CHUNK), 0.0, TILE)
        return self.between(products.accumulated(p, x, mosaic.transposed(x_s)))


def tokens():
    """Indices of a row's token and of a column's, `[CHUNK, CHUNK]`."""
    shape = CHUNK, CHUNK
    return tuple(mosaic.along(_indices(axis), axis, shape) for axis in range(2))


def _indices(axis):
    # Anew wherever they are used: masks that are kept take registers, and many.
    return lax.optimization_barrier(mosaic.iota(CHUNK, axis))


def itself(x):
    """A diagonal matrix of the sums of rows."""
    i, j = tokens()
    return jnp.where(i == j, mosaic.along(x.sum(axis=1), 0, i.shape), 0.0)


def load(ref):
    """Tokens from shared memory, in float32."""
    return mosaic.load(ref, TILE).astype(jnp.float32)
