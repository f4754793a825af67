"""The best blocks of each query, without the scores of all pairs in memory."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from attnx._checks import expect, expect_shape
from attnx._dispatch import dispatch
from attnx.select.blocks import block_scores
from attnx.select.choice import Choice, choice_of, top_k_blocks
from attnx.select.scores import bfloat16_parts, unsupported_query
from pallas_kernels.batching import mappable
from pallas_kernels.mosaic import wrong_device
from pallas_kernels.top_blocks import BLOCKS, TILE
from pallas_kernels.top_blocks import top_blocks as kernel

# Insertion costs k comparisons a block taken, of which there are k.
LARGEST_K = 16
# Scores of one step of `xla`.
_SCORES = 1 << 27


def top_k_pooled_blocks(
    query: jax.Array,
    pooled: jax.Array,
    k: int,
    *,
    first: jax.Array | None = None,
    stop: jax.Array | None = None,
    implementation: str | None = None,
) -> Choice:
    """Chooses for each query the k blocks whose pooled keys fit it best.

    The same as `top_k_blocks(block_scores(query, pooled), k)`, where of n blocks a
    query may choose those from `first` to before `stop`.

    Args:
      query: `[B, T, N, H]`.
      pooled: float32 or better `[B, n, K, H]`, such as `pool_mean` gives; K divides N.
      k: blocks a query; all where there are fewer. Of equal scores the earlier.
      first: int32 `[B or 1, T]`, by default 0.
      stop: int32 `[B or 1, T]`, by default n.
      implementation: None or a name. The GPU kernel adds products of bfloat16 parts of
        `pooled` in float32: scores closer than float32's rounding may change places.

    Returns:
      The choice; fewer than k where fewer may be chosen. It has no gradient.

    Raises:
      ValueError: shapes that do not fit.
      NotImplementedError: an `implementation` that does not serve the call.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from attnx.select import Blocks, pool_mean, top_k_pooled_blocks
      >>> q, k = jax.random.normal(jax.random.key(0), (2, 1, 64, 2, 16))
      >>> pooled = pool_mean(k, Blocks.regular(64, 16))
      >>> earlier = jnp.arange(64)[None] // 16
      >>> choice = top_k_pooled_blocks(q, pooled, 2, stop=earlier)
      >>> choice.to_tiles()[0, 0, ::16].sum(-1).tolist()
      [0, 1, 2, 2]
    """
    expect(isinstance(k, int) and k >= 1, "k", "an integer of at least 1", k)
    batch, length, heads, _ = query.shape
    expect(pooled.ndim == 4, "pooled", "[B, n, K, H]", pooled.shape)
    count = pooled.shape[1]
    rows = []
    for name, x, default in (("first", first, 0), ("stop", stop, count)):
        x = jnp.full((1, length), default) if x is None else jnp.asarray(x)
        expect_shape(name, x, (batch if x.shape[0] != 1 else 1, length))
        rows.append(jnp.broadcast_to(x.astype(jnp.int32), (batch, length)))
    query, pooled = jax.lax.stop_gradient((query, pooled))
    index, kept = dispatch(
        "top_k_pooled_blocks",
        implementation,
        {
            "reference": functools.partial(_by_scores, k),
            "xla": functools.partial(_by_head, k),
            "pallas": functools.partial(_by_kernel, k),
        },
        functools.partial(_unsupported, k),
        query,
        pooled,
        *rows,
    )
    return choice_of(index, kept, (batch, heads, length, count))


@functools.partial(jax.jit, static_argnums=0)
def _by_scores(k, query, pooled, first, stop):
    """Index and whether it counts, `[B, N, T, k]`."""
    block = jnp.arange(pooled.shape[1])
    valid = (first[..., None] <= block) & (block < stop[..., None])
    scores = block_scores(query, pooled)
    choice = top_k_blocks(scores, k, valid=valid[:, None])
    heads, rows, count = choice.grid
    shape = (query.shape[0], heads, rows, choice.per_row)
    kept = (choice.blocks < count).reshape(shape)
    return jnp.where(kept, choice.blocks.reshape(shape), 0), kept


def _by_head(k, query, pooled, first, stop):
    """The same for one key head at a time, where the scores of all are many."""
    batch, length, heads, size = query.shape
    key_heads = pooled.shape[2]
    if batch * heads * length * pooled.shape[1] <= _SCORES or key_heads == 1:
        return _by_scores(k, query, pooled, first, stop)
    query = jnp.moveaxis(query.reshape(batch, length, key_heads, -1, size), 2, 0)
    one = lambda x: _by_scores(k, x[0], x[1][:, :, None], first, stop)
    found = jax.lax.map(one, (query, jnp.moveaxis(pooled, 2, 0)))
    join = lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, heads, length, -1)
    return jax.tree.map(join, found)


def _by_kernel(k, query, pooled, first, stop):
    length, count = query.shape[1], pooled.shape[1]
    k = min(k, count)
    query = jnp.pad(query, ((0, 0), (0, -length % TILE), (0, 0), (0, 0)))
    # Rows of padding choose nothing.
    first, stop = (jnp.pad(x, ((0, 0), (0, -length % TILE))) for x in (first, stop))
    stop = jnp.minimum(stop, count)
    pooled = jnp.pad(pooled, ((0, 0), (0, -count % BLOCKS), (0, 0), (0, 0)))
    parts = bfloat16_parts(pooled.astype(jnp.float32), query.dtype)
    find = mappable(kernel, k=k)
    scores, index = find((query, parts, jnp.maximum(first, 0), stop), ())
    scores, index = (jnp.swapaxes(x[..., :length], 2, 3) for x in (scores, index))
    return index, scores > -jnp.inf


def _unsupported(k, implementation, query, pooled, first, stop):
    if implementation != "pallas":
        return None
    if reason := unsupported_query(query):
        return reason
    if k > LARGEST_K:
        return f"the kernel chooses up to {LARGEST_K} blocks, not {k}"
    return wrong_device()
