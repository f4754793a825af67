"""Attention of the newest tokens to a cache of the earlier ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attnx._checks import expect, expect_shape
from attnx.softmax.block_mask import FULL, PARTIAL, SKIP, BlockMask
from attnx.softmax.engine import attend, check_arrays
from attnx.softmax.mask import Mask
from attnx.softmax.masks import Causal, Lengths, Offset
from attnx.softmax.pallas import KernelConfig


def decode_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    lengths: jax.Array,
    *,
    mask: Mask | None = None,
    scale: float | jax.Array | None = None,
    implementation: str | KernelConfig | None = None,
    return_residual: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attends the last T tokens of each sequence to its key-value cache.

    The cache already holds the T tokens: `decode_attention(query, *cache.append(k, v))`
    with a `KVCache`. Work follows the longest length, not the capacity.

    Args:
      query: `[B, T, N, H]`, the tokens at positions `lengths - T` to `lengths - 1`.
      key: `[B, S, K, H]`, a cache of capacity S; K divides N.
      value: `[B, S, K, V]`.
      lengths: int `[B]`, tokens in each row of the cache, the T queries included.
      mask: who sees whom, by position in the sequence; by default causal. Nothing sees
        past `lengths`.
      scale: factor on the scores, by default `H ** -0.5`.
      implementation: as in `dot_product_attention`.
      return_residual: as in `dot_product_attention`.

    Returns:
      The output `[B, T, N, V]`; with `return_residual` also the natural log-sum-exp,
      float32 `[B, T, N]`. A query before the start of its sequence gives 0 and -inf.

    Raises:
      ValueError: shapes that do not fit.
      NotImplementedError: an `implementation` that does not serve the call.

    Example:
      >>> import jax, attnx
      >>> k, v = jax.random.normal(jax.random.key(0), (2, 1, 6, 2, 16))
      >>> q = jax.random.normal(jax.random.key(1), (1, 6, 4, 16))
      >>> cache = attnx.KVCache.create(1, 128, 2, 16).append(k, v)
      >>> last = attnx.decode_attention(q[:, -1:], *cache)
      >>> whole = attnx.dot_product_attention(q, k, v, is_causal=True)
      >>> bool(abs(last - whole[:, -1:]).max() < 1e-5)
      True
    """
    query, key, value, batched = check_arrays(query, key, value)
    expect(batched, "query", "[B, T, N, H]", query.shape[1:])
    batch, query_len, heads, _ = query.shape
    lengths = jnp.asarray(lengths)
    expect_shape("lengths", lengths, (batch,))
    expect(
        jnp.issubdtype(lengths.dtype, jnp.integer),
        "lengths",
        "an integer dtype",
        lengths.dtype,
    )
    mask = Causal() if mask is None else mask
    expect(isinstance(mask, Mask), "mask", "a Mask", type(mask).__name__)
    mask = Offset(mask, query=lengths - query_len) & Lengths(None, lengths)

    def lists():
        """One list for the batch, so that its rows are worked on together."""
        each = BlockMask.from_mask(
            mask,
            query_len,
            key.shape[1],
            block_size=(min(128, query_len), min(128, key.shape[1])),
            batch=batch,
            heads=heads,
        )
        tiles = each.tiles()
        some, every = (tiles != SKIP).any((0, 1)), (tiles == FULL).all((0, 1))
        union = jnp.where(some, jnp.where(every, FULL, PARTIAL), SKIP)
        return BlockMask.from_tiles(
            union, query_len, key.shape[1], block_size=each.block_size, mask=mask
        )

    out, lse = attend(
        "decode_attention",
        query,
        key,
        value,
        None,
        mask=mask,
        scale=scale,
        implementation=implementation,
        lists=lists,
        decodes=True,
    )
    return (out, lse) if return_residual else out
