"""Attention to the blocks that each query chose, in time of what was chosen.

Neighbouring queries rarely choose the same blocks, so that lists for blocks of queries
would hold nearly all. Instead queries are gathered by the block they chose, as tokens
are by experts; each full tile of them attends to its block; and the parts of a query
are merged by their log-sum-exp.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from attnx._checks import expect
from attnx.select.blocks import Blocks, check_block_size
from attnx.select.choice import Choice
from attnx.select.chosen import Chosen
from attnx.softmax import (
    BlockMask,
    KernelConfig,
    block_sparse_attention,
    dot_product_attention,
)
from attnx.softmax.engine import check_arrays
from attnx.softmax.mask import Mask, mask_class

# Queries of a tile at most: what kernels take.
_TILE = 128


def routed_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    choice: Choice,
    blocks: Blocks,
    *,
    block_size: int,
    scale: float | jax.Array | None = None,
    implementation: str | KernelConfig | None = None,
    return_residual: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attends to all tokens of the blocks that each query chose.

    The same as `dot_product_attention` under `Chosen(choice.to_tiles(), blocks.ids)`,
    which also says when that is the better one. Time and memory follow the slots of the
    choice; how many of them are filled may vary.

    Args:
      query: `[B, T, N, H]`.
      key: `[B, S, K, H]`; K divides N.
      value: `[B, S, K, V]`.
      choice: of T rows a head, such as `top_k_blocks` gives.
      blocks: the cut of the S keys; a block is a run of tokens, `block_size` at most.
      block_size: tokens of the longest block.
      scale: factor on the scores, by default `H ** -0.5`.
      implementation: of the attention in each block, as in `dot_product_attention`;
        "reference" is the mask above over all pairs.
      return_residual: also return the log-sum-exp.

    Returns:
      As `dot_product_attention`: a query that chose nothing gives 0 and -inf.

    Raises:
      ValueError: shapes that do not fit.
      NotImplementedError: an `implementation` that does not serve the call.

    Example:
      >>> import jax, attnx
      >>> from attnx.select import Blocks, block_scores, pool_mean
      >>> from attnx.select import routed_attention, top_k_blocks
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 64, 2, 16))
      >>> blocks = Blocks.regular(64, 16)
      >>> choice = top_k_blocks(block_scores(q, pool_mean(k, blocks)), 2)
      >>> routed_attention(q, k, v, choice, blocks, block_size=16).shape
      (1, 64, 2, 16)
    """
    query, key, value, batched = check_arrays(query, key, value)
    expect(batched, "query", "[B, T, N, H]", query.shape[1:])
    check_block_size(block_size)
    batch, length, heads, _ = query.shape
    grid = (heads, length, blocks.count)
    expect(choice.grid == grid, "choice", f"the grid {grid}", choice.grid)
    key_len = blocks.ids.shape[1]
    expect(key_len == key.shape[1], "blocks", f"{key.shape[1]} tokens", key_len)
    if implementation == "reference":
        return dot_product_attention(
            query,
            key,
            value,
            mask=Chosen(choice.to_tiles(), blocks.ids),
            scale=scale,
            implementation="reference",
            return_residual=return_residual,
        )

    rows, chosen, count = choice.rows, choice.blocks, blocks.count
    starts, sizes = (
        jnp.broadcast_to(x, (batch, count)) for x in (blocks.starts(), blocks.sizes())
    )
    key, value = (_cut(x, starts, block_size) for x in (key, value))
    folded = rows.shape[1] < heads
    if folded:
        # One list for all heads: they become one head, one after the other.
        key_head = rows // (length * (heads // key.shape[2]))
        count *= key.shape[2]
        sizes = jnp.tile(sizes, key.shape[2])
        chosen = jnp.where(
            chosen < blocks.count, key_head * blocks.count + chosen, count
        )
        query, key, value = (_fold(x) for x in (query, key, value))

    tile = min(_TILE, block_size)
    plan = functools.partial(_plan, num_rows=query.shape[1], count=count, tile=tile)
    rows, block, used = jax.vmap(jax.vmap(plan))(rows, chosen)
    # Only blocks that are shorter than others need a predicate.
    is_short = jnp.take_along_axis(sizes[:, None], block, 2) < block_size
    gathered = jnp.take_along_axis(
        query, jnp.swapaxes(rows, 1, 2)[..., None], 1, mode="clip"
    )
    out, lse = block_sparse_attention(
        gathered,
        key,
        value,
        BlockMask(
            block[..., None],
            used,
            used * is_short,
            _Inside(sizes, block_size),
            query_len=gathered.shape[1],
            key_len=key.shape[1],
            block_size=(tile, block_size),
        ),
        scale=scale,
        implementation=implementation,
        return_residual=True,
    )
    merge = functools.partial(_merge, num_rows=query.shape[1])
    merge = jax.vmap(jax.vmap(merge, (1, 1, 0), 1))
    out, lse = merge(out, lse, rows)
    if folded:
        out, lse = (_unfold(x, length) for x in (out, lse))
    return (out, lse) if return_residual else out


def _cut(x, starts, block_size):
    """The blocks of `[B, S, K, H]` one after the other: `[B, n * block_size, K, H]`."""
    index = starts[:, :, None] + jnp.arange(block_size)
    index = index.reshape(len(starts), -1)[..., None, None]
    return jnp.take_along_axis(x, index, 1, mode="clip")


def _plan(rows, blocks, *, num_rows, count, tile):
    """Sorts pairs by block and fills tiles with the rows of one block each.

    Returns:
      The row in each place of the tiles, `num_rows` where none; which block each tile
      attends to; and whether it is in use, 0 or 1.
    """
    pairs = rows.shape[0]
    order = jnp.argsort(blocks, stable=True)
    blocks = blocks[order]
    first = jnp.searchsorted(blocks, jnp.arange(count + 1))
    tiles = -(-jnp.diff(first) // tile)
    stops = jnp.cumsum(tiles)
    # Each block leaves at most one tile unfilled.
    most = max(1, (pairs + count * (tile - 1)) // tile)

    inside = jnp.minimum(blocks, count - 1)
    place = (stops - tiles)[inside] * tile + jnp.arange(pairs) - first[inside]
    place = jnp.where(blocks < count, place, most * tile)
    rows = (
        jnp.full(most * tile, num_rows, jnp.int32)
        .at[place]
        .set(rows[order], mode="drop")
    )
    index = jnp.arange(most)
    block = jnp.minimum(jnp.searchsorted(stops, index, side="right"), count - 1)
    used = (index < stops[-1]).astype(jnp.int32)
    return rows, block.astype(jnp.int32), used


@mask_class()
class _Inside(Mask):
    """The keys that a block has, of blocks cut to one size: `sizes` is `[B, n]`."""

    sizes: jax.Array
    block_size: int

    def __call__(self, batch, head, query, key):
        size = jnp.asarray(self.sizes)[batch, key // self.block_size]
        return key % self.block_size < size


def _merge(out, lse, rows, *, num_rows):
    """Merges parts `[P, V]`, `[P]` by row: `merge_attention` of a varying number."""
    dtype = out.dtype
    total_of = functools.partial(jax.ops.segment_sum, num_segments=num_rows)
    peak = jax.ops.segment_max(jax.lax.stop_gradient(lse), rows, num_rows)
    peak = jnp.where(jnp.isfinite(peak), peak, 0)
    is_part = rows < num_rows
    weights = jnp.exp(jnp.where(is_part, lse - peak[rows], -jnp.inf))
    total = total_of(weights, rows)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    out = total_of(weights[:, None] * out.astype(lse.dtype), rows) / total[:, None]
    return out.astype(dtype), jnp.where(empty, -jnp.inf, peak + jnp.log(total))


def _fold(x):
    """`[B, T, N, H]` to `[B, N * T, 1, H]`."""
    return jnp.swapaxes(x, 1, 2).reshape(x.shape[0], -1, 1, x.shape[3])


def _unfold(x, length):
    """`[B, N * T, 1, ...]` to `[B, T, N, ...]`."""
    return jnp.swapaxes(x.reshape(x.shape[0], -1, length, *x.shape[3:]), 1, 2)
