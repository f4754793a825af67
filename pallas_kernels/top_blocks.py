"""The blocks with the highest scores for each query, on Hopper.

The scores of 64 queries with 128 blocks are a product in registers; the best few of
them are taken out one by one and put in their places among the best so far. So the
scores of all pairs are never in memory.
"""

from __future__ import annotations

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic, products
from pallas_kernels.mosaic import ROW

ROWS = 64
WARPGROUPS = 2
# Queries of one block of threads, and blocks of one product.
TILE = ROWS * WARPGROUPS
BLOCKS = 128
# Tiles of blocks in flight.
SLOTS = 4


def top_blocks(
    query: jax.Array,
    parts: jax.Array,
    first: jax.Array,
    stop: jax.Array,
    *,
    k: int,
) -> tuple[jax.Array, jax.Array]:
    """Finds the k blocks whose vectors have the largest products with each query.

    Args:
      query: `[B, T, N, H]`, T a multiple of 128.
      parts: `[B, P, n, K, H]` in query's dtype; the vector of a block is their sum
        over P, so that it may be more precise than the dtype. n is a multiple of 128.
      first: int32 `[B, T]`, the first block that each query may choose.
      stop: int32 `[B, T]`, the first that it may not choose any more.
      k: how many.

    Returns:
      The scores, float32 `[B, N, k, T]`, largest first, -inf where there is no other
      block; and the blocks' numbers, int32. Of equal scores the earlier block is first.
    """
    batch, length, heads, size = query.shape
    count, group = parts.shape[1], heads // parts.shape[3]
    shape = (ROWS, BLOCKS)
    steps = _steps(first, stop)

    def body(q_g, p_g, first_g, stop_g, from_g, to_g, score_g, index_g, *scratch):
        q_s, p_s, score_s, index_s, acc_s, q_full, full, free = scratch
        h, i, b = (lax.axis_index(axis) for axis in ("h", "q", "b"))
        wg = lax.axis_index("wg")
        i = lax.axis_size("q") - 1 - i  # Later queries have more to choose from.
        begin, end = from_g[b, i], to_g[b, i]

        def consume():
            plgpu.set_max_registers(232, action="increase")
            rows = pl.ds(i * TILE + wg * ROWS, ROWS)
            q = q_s.at[pl.ds(wg * ROWS, ROWS)]
            low, high = (
                mosaic.along(mosaic.load(ref.at[b, rows], ROW), 0, shape)
                for ref in (first_g, stop_g)
            )
            column = mosaic.along(mosaic.iota(BLOCKS, 1), 1, shape)

            def scores(step):
                first = (step - begin) * count
                slots = [
                    lax.rem(first + part, jnp.int32(SLOTS)) for part in range(count)
                ]

                def multiply(acc):
                    for slot in slots:
                        products.add_product(acc, q, mosaic.transposed(p_s.at[slot]))

                for slot in slots:
                    plgpu.barrier_wait(full.at[slot])
                refs = () if acc_s is None else (acc_s.at[wg],)
                [product] = products.accumulators(multiply, refs, (shape,))
                for slot in slots:
                    plgpu.barrier_arrive(free.at[slot])
                return product

            def visit(step, best):
                block = column + step * BLOCKS
                seen = (low <= block) & (block < high)
                left = jnp.where(seen, scores(step), -jnp.inf)
                place = column.astype(jnp.float32)
                best = list(best)
                for _ in range(k):
                    score = left.max(axis=1)
                    is_best = left == mosaic.along(score, 0, shape)
                    # The first of equals: floats have a maximum of their own.
                    found = jnp.where(is_best, -place, -float(BLOCKS)).max(axis=1)
                    is_best = place == mosaic.along(-found, 0, shape)
                    left = jnp.where(is_best, -jnp.inf, left)
                    entry = score, step * BLOCKS - found.astype(jnp.int32)
                    for j, other in enumerate(best):
                        # Compared with what came in, not with what it pushed on:
                        # of equals the earlier stays before the later.
                        pick = functools.partial(jnp.where, score > other[0])
                        best[j] = tuple(map(pick, entry, other))
                        entry = tuple(map(pick, other, entry))
                return tuple(best)

            plgpu.barrier_wait(q_full)
            none = (
                mosaic.full((ROWS,), -jnp.inf, ROW),
                mosaic.full((ROWS,), 0, ROW, jnp.int32),
            )
            best = lax.fori_loop(begin, end, visit, (none,) * k)
            for j, (score, index) in enumerate(best):
                score_s.at[wg, j][...] = score
                index_s.at[wg, j][...] = index
            plgpu.commit_smem()
            for smem, gmem in ((score_s, score_g), (index_s, index_g)):
                plgpu.copy_smem_to_gmem(smem.at[wg], gmem.at[b, h, pl.ds(0, k), rows])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        def produce():
            plgpu.set_max_registers(24, action="decrease")

            @mosaic.by_one_warp
            def _():
                rows = pl.ds(i * TILE, TILE)
                plgpu.copy_gmem_to_smem(q_g.at[b, rows, h], q_s, q_full)
                kv_head = lax.div(h, jnp.int32(group))

                @pl.loop(0, (end - begin) * count)
                def _(j):
                    slot = lax.rem(j, jnp.int32(SLOTS))
                    pl.when(j >= SLOTS)(lambda: plgpu.barrier_wait(free.at[slot]))
                    part = lax.rem(j, jnp.int32(count))
                    step = begin + lax.div(j, jnp.int32(count))
                    tile = p_g.at[b, part, pl.ds(step * BLOCKS, BLOCKS), kv_head]
                    plgpu.copy_gmem_to_smem(tile, p_s.at[slot], full.at[slot])

                total = (end - begin) * count

                @pl.loop(jnp.maximum(total - SLOTS, 0), total)
                def _(j):
                    plgpu.barrier_wait(free.at[lax.rem(j, jnp.int32(SLOTS))])

        pl.when(wg < WARPGROUPS)(consume)
        pl.when(wg == WARPGROUPS)(produce)

    best = (batch, heads, k, length)
    return mosaic.call(
        body,
        (query, parts, first, stop, *steps),
        (
            jax.ShapeDtypeStruct(best, jnp.float32),
            jax.ShapeDtypeStruct(best, jnp.int32),
        ),
        scratch=[
            mosaic.tiled((TILE, size), query.dtype),
            mosaic.tiled((SLOTS, BLOCKS, size), query.dtype),
            plgpu.SMEM((WARPGROUPS, k, ROWS), jnp.float32),
            plgpu.SMEM((WARPGROUPS, k, ROWS), jnp.int32),
            mosaic.emulated(plgpu.SMEM((WARPGROUPS, *shape), jnp.float32)),
            plgpu.Barrier(),
            plgpu.Barrier(num_barriers=SLOTS),
            plgpu.Barrier(num_barriers=SLOTS, num_arrivals=WARPGROUPS),
        ],
        grid=(heads, length // TILE, batch),
        grid_names=("h", "q", "b"),
        num_threads=WARPGROUPS + 1,
        thread_name="wg",
        kernel_name="top_blocks",
    )


def _steps(first, stop):
    """The tiles of blocks that any query of a tile may choose from: from, to."""
    first, stop = (x.reshape(x.shape[0], -1, TILE) for x in (first, stop))
    is_empty = first >= stop
    low = jnp.where(is_empty, jnp.iinfo(jnp.int32).max, first).min(-1) // BLOCKS
    high = -(-jnp.where(is_empty, 0, stop).max(-1) // BLOCKS)
    return jnp.minimum(low, high), high
