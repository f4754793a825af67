"""Attention to the blocks that each query chose, in time of what was chosen.

Neighbouring queries rarely choose the same blocks, so that lists for blocks of queries
would hold nearly all. Instead queries are gathered by the block they chose, as tokens
are by experts; each full tile of them attends to its block; and the parts of a query
are merged by their log-sum-exp.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnx._checks import expect, is_traced
from attnx.select.blocks import Blocks, check_block_size, in_blocks
from attnx.select.choice import Choice
from attnx.select.chosen import Chosen
from attnx.select.parts import Rows
from attnx.select.tiles import Tiles, plan_tiles, split_tiles
from attnx.softmax import (
    BlockMask,
    KernelConfig,
    dot_product_attention,
)
from attnx.softmax.engine import attend, check_arrays
from attnx.softmax.mask import Mask, mask_class
from attnx.softmax.masks import Full
from attnx.softmax.merge import merge_attention

# Queries of a tile at most: what kernels take.
_TILE = 128
# Pairs of rows and blocks attended at a time, if one head has no more.
_PAIRS = 1 << 19
# Where heads take turns, the shares of pairs attended one after the other, so that
# memory holds the parts of one. With the first it also holds what is beside.
_SHARES = (7, 9)


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
    attend_heads = functools.partial(
        _attend,
        block_size=block_size,
        per_row=None if choice.rows.shape[1] < heads else choice.per_row,
        **options,
    )
    plan = functools.partial(plan_tiles, tile=min(_TILE, block_size))
    arrays = query, key, value
    if choice.rows.shape[1] < heads:
        out, lse = _as_one_head(attend_heads, plan, *arrays, choice, blocks)
        if beside is not None:
            other = _see(*arrays, beside, **options)
            out, lse = merge_attention(*zip((out, lse), other, strict=True))
    else:
        lists = plan(choice.rows, choice.blocks, num_rows=length, count=blocks.count)
        pairs = choice.rows.shape[-1]
        out, lse = _by_heads(attend_heads, arrays, pairs, lists, (blocks, beside))
    return (out, lse) if return_residual else out


def _by_heads(attend, arrays, pairs, lists, seen):
    """`attend` on so many heads at a time as memory should hold the parts of.

    `seen` are the cut into blocks and the mask beside it.
    """
    batch, _, heads, _ = arrays[0].shape
    key_heads = arrays[1].shape[2]
    group = heads // key_heads
    pairs *= batch * group
    at_once = max(
        n
        for n in range(1, key_heads + 1)
        if key_heads % n == 0 and (n == 1 or n * pairs <= _PAIRS)
    )
    if at_once == key_heads:
        return attend(*arrays, lists=lists, seen=seen)
    # What is known stays so: it is no argument of the program then.
    known = tuple(None if is_traced(x) else x for x in seen)
    given = tuple(x if is_traced(x) else None for x in seen)
    attend = functools.partial(attend, shares=_SHARES)
    turns = _Turns(attend, key_heads // at_once, known)
    return _in_turn(turns, arrays, lists, given)


@dataclasses.dataclass(frozen=True, eq=False)
class _Turns:
    """How heads take turns: in how many steps, and what is not an array.

    `known` is what `_by_heads` calls `seen`, with None for what is an array.
    """

    attend: Callable
    steps: int
    known: tuple

    def run(self, body, carry, arrays, lists, given):
        """Runs `body(heads of arrays, attend)` a step, and writes what it gives."""
        pairs = zip(given, self.known, strict=True)
        seen = tuple(x if y is None else y for x, y in pairs)

        def part(x, i, axis):
            size = x.shape[axis] // self.steps
            return jax.lax.dynamic_slice_in_dim(x, i * size, size, axis)

        def step(i, carry):
            chosen = Tiles(*(part(x, i, 1) for x in lists))
            attend = functools.partial(self.attend, lists=chosen, seen=seen)
            found = body([part(x, i, 2) for x in arrays], attend)
            write = jax.lax.dynamic_update_slice_in_dim
            return tuple(
                write(x, y, i * y.shape[2], 2)
                for x, y in zip(carry, found, strict=True)
            )

        return jax.lax.fori_loop(0, self.steps, step, tuple(carry))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_turn(turns, arrays, lists, given):
    query, _, value = arrays
    # Made from the query, so as to be laid out over devices as it is.
    zero = jnp.zeros_like(query[..., :1])
    out = jnp.broadcast_to(zero, (*zero.shape[:-1], value.shape[-1]))
    lse = zero[..., 0].astype(jnp.promote_types(query.dtype, jnp.float32))
    run = lambda heads, attend: attend(*heads)
    return turns.run(run, (out, lse), arrays, lists, given)


def _in_turn_forward(turns, *operands):
    return _in_turn(turns, *operands), operands


def _in_turn_backward(turns, operands, grads):
    """Attends again, a step's heads at a time: parts are not kept."""
    arrays, lists, given = operands

    def run(heads, attend):
        return jax.vjp(attend, *heads[:3])[1](tuple(heads[3:]))

    carry = map(jnp.zeros_like, arrays)
    found = turns.run(run, carry, (*arrays, *grads), lists, given)
    return found, None, None


_in_turn.defvjp(_in_turn_forward, _in_turn_backward)


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
    rows = query.shape[1]
    lists = plan(choice.rows, chosen, num_rows=rows, count=every.count)
    out, lse = attend(query, key, value, lists=lists, seen=(every, None))
    return _unfold(out, length), _unfold(lse, length)


def _attend(
    query,
    key,
    value,
    *,
    lists,
    seen,
    block_size,
    per_row,
    scale,
    implementation,
    shares=(1,),
):
    """Attention of `[B, T, N, H]` by the lists of `plan_tiles`, and beside them."""
    batch, length = query.shape[:2]
    blocks, beside = seen
    options = {"scale": scale, "implementation": implementation}
    merged = None if beside is None else _see(query, key, value, beside, **options)
    count = blocks.count
    # Longer blocks are visited in steps, of which only the last needs a predicate.
    step = min(block_size, _TILE)
    steps = -(-block_size // step)
    sizes = blocks.sizes()
    key, value = (_cut(x, blocks, block_size, steps * step) for x in (key, value))
    mask = None
    if not isinstance(sizes, np.ndarray) or (sizes % step).any():
        mask = _Inside(jnp.asarray(sizes), steps * step)

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
            ),
            rows=Rows(*run[:4], length, per_row),
            rest=rest,
            **options,
        )

    for run in split_tiles(lists, shares, num_rows=length, per_row=per_row):
        # One after the other, so that memory holds the parts of one.
        query, merged = jax.lax.optimization_barrier((query, merged))
        merged = part(query, run, merged)
    return merged


def _see(query, key, value, mask, **options):
    """The output and log-sum-exp of attention to what a mask shows."""
    return dot_product_attention(
        query, key, value, mask=mask, return_residual=True, **options
    )


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


@mask_class(meta=("length",))
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
