"""The products of queries with one vector for each block, in float32, on Hopper.

The vectors are sums of parts in the queries' dtype, whose products are added up in
registers. Each query is read once, from where it lies.
"""

from __future__ import annotations

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic, products
from pallas_kernels.mosaic import ROW

ROWS = 64
WARPGROUPS = 2
# Queries of one block of threads; blocks of one product, at most and at least.
TILE = ROWS * WARPGROUPS
BLOCKS = 128
FEWEST = 8


def block_scores(
    query: jax.Array,
    parts: jax.Array,
    own: jax.Array,
    head: jax.Array,
    *,
    heads: int,
) -> jax.Array:
    """Scores blocks for some heads of the queries.

    Args:
      query: `[B, T, N, H]` of 16 bits, T a multiple of 128.
      parts: `[B, P, n, K, H]` in query's dtype, for the keys of these heads: the vector
        of a block is their sum over P. n is a multiple of 8, of 128 if there are more.
      own: int32 `[1, T]`, the block of each query that scores inf; n or more for none.
      head: int32 `[1]`, the first of the heads that are scored.
      heads: how many, a multiple of K.

    Returns:
      The scores, float32 `[B, heads, T, n]`.
    """
    batch, length, _, size = query.shape
    _, count, blocks, key_heads, _ = parts.shape
    columns = min(blocks, BLOCKS)
    shape = (ROWS, columns)

    def body(q_g, p_g, own_g, head_g, out_g, q_s, p_s, acc_s, full):
        h, i, j, b = (lax.axis_index(axis) for axis in ("h", "q", "k", "b"))
        wg = lax.axis_index("wg")
        blocks_here = pl.ds(j * columns, columns)

        def score():
            rows = pl.ds(i * TILE + wg * ROWS, ROWS)
            forced = mosaic.along(mosaic.load(own_g.at[0, rows], ROW), 0, shape)
            column = mosaic.along(mosaic.iota(columns, 1), 1, shape)
            plgpu.barrier_wait(full)

            def multiply(acc):
                q = q_s.at[pl.ds(wg * ROWS, ROWS)]
                for part in range(count):
                    products.add_product(acc, q, mosaic.transposed(p_s.at[part]))

            refs = () if acc_s is None else (acc_s.at[wg],)
            [scores] = products.accumulators(multiply, refs, (shape,))
            scores = jnp.where(forced == column + j * columns, jnp.inf, scores)
            out_g.at[b, h, rows, blocks_here][...] = scores

        def copy():
            rows, kv_head = pl.ds(i * TILE, TILE), lax.div(h, heads // key_heads)
            plgpu.copy_gmem_to_smem(q_g.at[b, rows, head_g[0] + h], q_s, full)
            for part in range(count):
                tile = p_g.at[b, part, blocks_here, kv_head]
                plgpu.copy_gmem_to_smem(tile, p_s.at[part], full)

        pl.when(wg < WARPGROUPS)(score)
        pl.when(wg == WARPGROUPS)(lambda: mosaic.by_one_warp(copy))

    [out] = mosaic.call(
        body,
        (query, parts, own, head),
        (jax.ShapeDtypeStruct((batch, heads, length, blocks), jnp.float32),),
        scratch=[
            mosaic.tiled((TILE, size), query.dtype),
            mosaic.tiled((count, columns, size), query.dtype),
            mosaic.emulated(plgpu.SMEM((WARPGROUPS, *shape), jnp.float32)),
            plgpu.Barrier(num_arrivals=1 + count),
        ],
        grid=(heads, length // TILE, blocks // columns, batch),
        grid_names=("h", "q", "k", "b"),
        num_threads=WARPGROUPS + 1,
        thread_name="wg",
        kernel_name="block_scores",
    )
    return out
