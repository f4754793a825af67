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
from jax import lax

from pallas_kernels import mosaic, products, shared
from pallas_kernels.chunks import Stream, row_of
from pallas_kernels.mosaic import COL, LOG2E, ROW, TILE

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
        state_g, scale_g, out_g, last_g, *rest = refs[len(inputs) :]
        if keep_states:
            states_g, *rest = rest
        stream, local = Stream.of(tuple(inputs), rest)
        tokens_s, fulls, frees = stream
        decays_s, weighed_s, scores_s, state_s, met, written = local
        decays = Decays(decays_s)
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

            def tiles_to_work_with():
                me = mosaic.again(wg)
                return weighed_s.at[me], scores_s.at[me, :, pl.ds(0, channels)]

            def scores(q_s, k_s):
                """What these channels add to the scores."""
                part = own_part()
                own_q, own_k = q_s.at[:, part], k_s.at[:, part]

                def weighed(n):
                    here = tiles_to_work_with()[n % 2]
                    decay = Pair(n).decay(decays, own_part())
                    x = shared.load_alternating(own_k, own_q, n, swizzle)
                    x = (x.astype(jnp.float32) * decay).astype(dtype)
                    plgpu.commit_smem()  # All have read what was there.
                    shared.store_matrices(here, x, swizzle)
                    plgpu.commit_smem()
                    return here, mosaic.transposed(here)

                # What a pair has wrong inside of its blocks is replaced by the next.
                p = products.in_turn(
                    [functools.partial(weighed, n) for n in reversed(range(LEVELS))],
                    lambda n, product, p: jnp.where(
                        Pair(LEVELS - 1 - n).together(), product, p
                    ),
                    mosaic.full((CHUNK, CHUNK), 0.0, TILE),
                )
                i, j = tokens()
                both = load(own_q, swizzle) * load(own_k, swizzle)
                return jnp.where(i == j, itself(both), p)

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
                    x = x.astype(dtype)
                    shared.store_matrices(state_s.at[tile, own], x, swizzle)
                plgpu.commit_smem()
                plgpu.barrier_arrive(written)
                plgpu.barrier_wait(written)

            def step(n, state):
                slot = lax.rem(n, jnp.int32(stages))
                if keep_states:
                    copy(state_s, states_g.at[b, h, n])
                plgpu.barrier_wait(fulls["log_decay"].at[0])
                part = own_part()
                arrived = tokens_s["log_decay"].at[0, :, part]
                decays.take(arrived, part, tiles_to_work_with(), swizzle)
                plgpu.barrier_arrive(frees["log_decay"].at[0])
                q, k, v = (tokens_s[name].at[slot] for name in ahead)
                for name in ahead:
                    plgpu.barrier_wait(fulls[name].at[slot])
                p = scores(q, k)
                i, j = tokens()
                part = own_part()
                own_q, own_k = q.at[:, part], k.at[:, part]
                p = jnp.where(j <= i, p, 0.0).astype(dtype)
                shared.store_matrices(scores_s.at[mosaic.again(wg)], p, swizzle)
                # Queries and keys give way to what the states are to them.
                for own, decay in ((own_q, decays.since), (own_k, decays.until)):
                    x = (load(own, swizzle) * decay(part)).astype(dtype)
                    shared.store_matrices(own, x, swizzle)
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
                shared.store_matrices(
                    v.at[:, own], (out * scale).astype(dtype), swizzle
                )
                publish(state)
                copy(v, out_g.at[b, pl.ds(n * CHUNK, CHUNK), h])
                return state

            own = own_columns()
            state = tuple(
                mosaic.load(state_g.at[b, h, tile, own], TILE) for tile in tiles
            )
            publish(state)
            state = lax.fori_loop(0, chunks, step, state)
            own = own_columns()
            for tile, x in zip(tiles, state, strict=True):
                last_g.at[b, h, tile, own][...] = x
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            release_values(jnp.int32(chunks - 1))

        def produce():
            plgpu.set_max_registers(24, action="decrease")

            def source(name, n):
                gmem = tokens_g[name]
                head = lax.div(h, jnp.int32(heads // gmem.shape[2]))
                return gmem.at[b, pl.ds(n * CHUNK, CHUNK), head]

            mosaic.by_one_warp(lambda: stream.copy(source, chunks))

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
        (*inputs.values(), state, scale),
        tuple(outputs),
        scratch=[
            *Stream.scratch(buffers),
            Decays.scratch(size),
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
    """Base-2 log decays of a chunk's channels, summed from its first token on.

    A float32 row for each token, in shared memory: what tokens decay a channel by is a
    difference of two rows.
    """

    def __init__(self, ref):
        self._sums = ref

    @staticmethod
    def scratch(size):
        """What it is made of, for that many channels."""
        return plgpu.SMEM((CHUNK, size), jnp.float32)

    def take(self, log_decay, channels, halves, swizzle):
        """Sums up natural logarithms in shared memory, and keeps them as `channels`.

        `halves` are two tiles in shared memory, with that swizzle, to work with.
        """
        x = load(log_decay, mosaic.swizzle_of(channels.size, log_decay.dtype))
        x = jnp.maximum(x * LOG2E, LEAST)
        dtype = halves[0].dtype
        for ref, half in zip(halves, in_two(x, dtype), strict=True):
            shared.store_matrices(ref, half, swizzle)
        plgpu.commit_smem()
        i, j = tokens()
        until = jnp.where(j <= i, 1.0, 0.0).astype(dtype)
        sums = mosaic.full(x.shape, 0.0, TILE)
        sums = products.accumulated(sums, until, *halves)
        shared.store_sums(self._sums.at[:, channels], sums)
        plgpu.commit_smem()

    def since(self, channels):
        """By what each token and those before it decay them."""
        return jnp.exp2(self._own(channels))

    def until(self, channels):
        """By what the tokens behind each one decay them."""
        own = self._own(channels)
        total = mosaic.load(self._sums.at[CHUNK - 1, channels], COL)
        return jnp.exp2(mosaic.along(total, 1, own.shape) - own)

    def across(self, channels):
        """By what all tokens decay them, a row of a state each."""
        return jnp.exp2(mosaic.load(self._sums.at[CHUNK - 1, channels], ROW))

    def between(self, first, last, channels):
        """What the tokens behind `first[i]` up to `last[i]` decay them by, in row i."""
        sums = self._sums.at[:, channels]
        last, first = (shared.load_sums(sums, rows) for rows in (last, first))
        return jnp.exp2(last - first)

    def _own(self, channels):
        return shared.load_sums(self._sums.at[:, channels], _indices(0))


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
        own = _indices(0)
        middle = (own >> self._n + 1 << self._n + 1) + (1 << self._n) - 1
        first, last = jnp.minimum(own, middle), jnp.maximum(own, middle)
        return decays.between(first, last, channels)

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


def load(ref, swizzle):
    """Tokens from shared memory, in float32."""
    return shared.load(ref, swizzle).astype(jnp.float32)
