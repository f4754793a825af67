"""Attention to the blocks that each query chose, in time of what was chosen.

Neighbouring queries rarely choose the same blocks, so that lists for blocks of queries
would hold nearly all. Instead queries are gathered by the block they chose, as tokens
are by experts; each full tile of them attends to its block; and the parts of a query
are merged by their log-sum-exp.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnx._checks import expect
from attnx._tree import tree_class
from attnx.select.blocks import Blocks, check_block_size, in_blocks
from attnx.select.choice import Choice
from attnx.select.chosen import Chosen
from attnx.select.parts import Rows
from attnx.select.tiles import plan_tiles
from attnx.select.turns import by_heads
from attnx.softmax import (
    BlockMask,
    KernelConfig,
)
from attnx.softmax.engine import attend, check_arrays
from attnx.softmax.mask import Mask
from attnx.softmax.masks import Full
from attnx.softmax.merge import merge_attention

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
    beside: Mask | None = None,
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
      beside: which other keys each query sees, the same in all heads: none that it
        chose. Attended apart, a few heads at a time, and merged in the same pass.
      scale: factor on the scores, by default `H ** -0.5`.
      implementation: of the attention in each block, as in `dot_product_attention`;
        "reference" is the mask above over all pairs.
      return_residual: also return the log-sum-exp.

    Returns:
      As `dot_product_attention`: a query that chose nothing, and sees nothing beside,
      gives 0 and -inf.

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
    _, length, heads, _ = query.shape
    grid = (heads, length, blocks.count)
    expect(choice.grid == grid, "choice", f"the grid {grid}", choice.grid)
    key_len = blocks.ids.shape[1]
    expect(key_len == key.shape[1], "blocks", f"{key.shape[1]} tokens", key_len)
    if implementation == "reference":
        mask = Chosen(choice.to_tiles(), blocks.ids)
        mask = mask if beside is None else mask | beside
        out, lse = _see(
            query, key, value, mask, scale=scale, implementation="reference"
        )
        return (out, lse) if return_residual else out

    if not isinstance(scale, int | float | None):
        # A traced scale has a gradient, which the query's gives.
        query, scale = query * jnp.asarray(scale, query.dtype), 1.0
    options: dict[str, Any] = {"scale": scale, "implementation": implementation}
    one_list = choice.rows.shape[1] < heads
    attend_heads = functools.partial(
        attend_tiles,
        block_size=block_size,
        per_row=None if one_list else choice.per_row,
        **options,
    )
    plan = functools.partial(plan_tiles, tile=tile_of(block_size))
    arrays = query, key, value
    if one_list:
        out, lse = _as_one_head(attend_heads, plan, *arrays, choice, blocks)
        if beside is not None:
            other = _see(*arrays, beside, **options)
            out, lse = merge_attention(*zip((out, lse), other, strict=True))
    else:
        # Pairs of all heads are sorted at once.
        tiles = plan(choice.rows, choice.blocks, count=blocks.count)
        pairs = len(query) * choice.rows.shape[-1]

        def see(query, key, value, shared):
            return _see(query, key, value, shared[1], **options)

        out, lse = by_heads(
            attend_heads,
            arrays,
            tiles,
            (blocks, beside),
            pairs=pairs,
            begin=None if beside is None else see,
        )
    return (out, lse) if return_residual else out


def _as_one_head(attend, plan, query, key, value, choice, blocks):
    """`attend` where one list serves all heads: they follow each other as one."""
    _, length, heads, _ = query.shape
    key_heads, count = key.shape[2], blocks.count
    head = choice.rows // (length * (heads // key_heads))
    tokens = key.shape[1]
    # The blocks of later heads come after those of earlier ones.
    ids = jnp.broadcast_to(jnp.asarray(blocks.ids), (len(blocks.ids), tokens))
    shift = jnp.arange(key_heads)[:, None] * count
    ids = jnp.where(ids[:, None] < count, ids[:, None] + shift, key_heads * count)
    every = Blocks(ids.reshape(len(ids), -1), key_heads * count)
    chosen = jnp.where(choice.blocks < count, head * count + choice.blocks, every.count)
    query, key, value = (_fold(x) for x in (query, key, value))
    tiles = plan(choice.rows, chosen, count=every.count)
    pairs = choice.rows.size
    arrays = query, key, value
    out, lse = by_heads(attend, arrays, tiles, (every, None), pairs=pairs)
    return _unfold(out, length), _unfold(lse, length)


def tile_of(block_size):
    """Rows of a tile that attend to a block."""
    return min(_TILE, block_size)


def attend_tiles(
    query,
    key,
    value,
    *,
    lists,
    shared,
    shares,
    known,
    rest,
    turn,
    block_size,
    per_row,
    scale,
    implementation,
    among=None,
):
    """Attention of `[B, T, N, H]` by tiles, for `by_heads`.

    Args:
      query: `[B, T, N, H]`.
      key: `[B, S, K, H]`.
      value: `[B, S, K, V]`.
      lists: the `Tiles` or `Marks` of the heads whose turn it is.
      shared: the cut into blocks, and the mask of what is seen beside them or None.
      shares: of all tiles, of runs that attend one after the other.
      known: what this came to, or None.
      rest: what was seen beside the blocks, or None if it was not attended yet.
      turn: of which heads.
      block_size: tokens of the longest block.
      per_row: pairs of each row, or None where that varies.
      scale: as a number.
      implementation: of the attention.
      among: `(number, others)` where the query has those of other heads as well, as
        `[B, T * others, 1, H]`: its rows are number, number + others, ...

    Returns:
      The output `[B, T, N, V]` and the log-sum-exp `[B, T, N]`.
    """
    number, others = among or (0, 1)
    batch, length = query.shape[0], query.shape[1] // others
    heads = lists.heads
    blocks, beside = shared
    options = {"scale": scale, "implementation": implementation}
    merged = rest
    if rest is None and beside is not None:
        merged = _see(query, key, value, beside, known=known, **options)
    count = blocks.count
    # Longer blocks are visited in steps, of which only the last needs a predicate.
    step = min(block_size, _TILE)
    steps = -(-block_size // step)
    sizes = blocks.sizes()
    key, value = (_cut(x, blocks, block_size, steps * step) for x in (key, value))
    mask = None
    if not isinstance(sizes, np.ndarray) or (sizes % step).any():
        mask = _Inside(jnp.asarray(sizes), steps * step)

    first_keys = None
    if isinstance(sizes, np.ndarray) and (sizes == sizes[:, :1]).all() and steps > 1:
        first_keys = int(sizes[0, 0]) % step or None

    def part(query, run, rest):
        size = jnp.take_along_axis(
            jnp.broadcast_to(jnp.asarray(sizes)[:, None], (batch, 1, count)),
            run.block,
            2,
        )
        is_short = (size % step > 0).astype(jnp.int32)
        order = jnp.arange(steps) - is_short[..., None]
        order = jnp.where(order < 0, (size // step)[..., None], order)
        places = run.index.shape[2]
        return attend(
            "routed_attention",
            query,
            key,
            value,
            None,
            mask=BlockMask(
                jnp.minimum(run.block[..., None] * steps + order, count * steps - 1),
                run.used * (size // step + is_short),
                run.used * is_short,
                Full() if mask is None else mask,
                query_len=places,
                key_len=key.shape[1],
                block_size=(places // run.block.shape[2], step),
                first_keys=first_keys,
            ),
            rows=Rows(
                run.index * others + number,
                *run[1:4],
                known,
                length,
                per_row,
                head=turn.head(heads),
            ),
            rest=rest,
            **options,
        )

    runs = lists.runs(shares, num_rows=length, per_row=per_row)
    for i, run in enumerate(runs):
        if i > 0:  # One after the other, so that memory holds the parts of one.
            query, merged = jax.lax.optimization_barrier((query, merged))
        merged = part(query, run, merged)
    return merged


def _see(query, key, value, mask, **options):
    """The output and log-sum-exp of attention to what a mask shows."""
    name = "dot_product_attention"
    return attend(name, query, key, value, None, mask=mask, **options)


def _cut(x, blocks, block_size, size):
    """`[B, S, K, H]` as blocks of `size` tokens, padded, one after the other."""
    if blocks.regular_size() == block_size:
        x = in_blocks(x, block_size, blocks.count)
        x = jnp.pad(x, ((0, 0), (0, 0), (0, size - block_size), (0, 0), (0, 0)))
        return x.reshape(x.shape[0], -1, *x.shape[3:])
    starts = jnp.broadcast_to(jnp.asarray(blocks.starts()), (len(x), blocks.count))
    starts = jnp.minimum(starts, x.shape[1])
    index = starts[:, :, None] + jnp.arange(size)
    index = index.reshape(len(starts), -1)[..., None, None]
    return jnp.take_along_axis(x, index, 1, mode="clip")


@tree_class(meta=("length",))
class _Inside(Mask):
    """The keys that a block has, of blocks cut to one length: `sizes` is `[B, n]`."""

    sizes: jax.Array
    length: int

    def __call__(self, batch, head, query, key):
        batch = 0 if self.sizes.shape[0] == 1 else batch
        size = jnp.asarray(self.sizes)[batch, key // self.length]
        return key % self.length < size


def _fold(x):
    """`[B, T, N, H]` to `[B, N * T, 1, H]`."""
    return jnp.swapaxes(x, 1, 2).reshape(x.shape[0], -1, 1, x.shape[3])


def _unfold(x, length):
    """`[B, N * T, 1, ...]` to `[B, T, N, ...]`."""
    return jnp.swapaxes(x.reshape(x.shape[0], -1, length, *x.shape[3:]), 1, 2)
