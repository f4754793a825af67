"""Decoding from a cache that is spread over devices: attend apart, merge once."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attnx import softmax
from attnx._checks import expect, expect_shape
from attnx.cache.kv_cache import KVCache
from attnx.cache.sparse_cache import SparseCache, sparse_decode_attention
from attnx.parallel.axes import AxisName, axis_size
from attnx.parallel.pieces import check_splits
from attnx.softmax import KernelConfig, merge_attention
from attnx.softmax.mask import Mask
from attnx.softmax.masks import Causal, Offset


def decode_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    lengths: jax.Array,
    axis_name: AxisName,
    *,
    mask: Mask | None = None,
    scale: float | jax.Array | None = None,
    implementation: str | KernelConfig | None = None,
    return_residual: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Computes `attnx.decode_attention` from a cache that is cut over a mesh axis.

    DistAttention (Infinite-LLM, arXiv 2401.02669): outputs and log-sum-exps travel, in
    one all-gather, and never keys. `append` puts tokens where they belong.

    For the inside of `jax.shard_map`; `sharded(parallel.decode_attention)` takes whole
    arrays.

    Args:
      query: `[B, T, N, H]`, the newest tokens, the same on all devices.
      key: `[B, S / P, K, H]`, the slots of this device, the i-th piece of S.
      value: `[B, S / P, K, V]`.
      lengths: int `[B]`, tokens in the whole cache, the T queries included.
      axis_name: the mesh axis that the cache is cut over.
      mask: who sees whom, by position in the sequence; by default causal.
      scale: factor on the scores, by default `H ** -0.5`.
      implementation: as in `attnx.decode_attention`.
      return_residual: also return the log-sum-exp.

    Returns:
      As `attnx.decode_attention`, the same on all devices.

    Raises:
      ValueError: arrays that do not fit, an axis that there is not, or a mask that
        cannot be cut.
      NotImplementedError: an `implementation` that does not serve the call.

    Example:
      >>> import jax
      >>> from attnx import KVCache, parallel
      >>> mesh = jax.make_mesh((1,), ("context",))
      >>> slots = jax.NamedSharding(mesh, jax.P(None, "context"))
      >>> append, decode = (
      ...     parallel.sharded(fn, sharding=slots)
      ...     for fn in (parallel.append, parallel.decode_attention)
      ... )
      >>> x = jax.random.normal(jax.random.key(0), (1, 1, 2, 16))
      >>> cache = append(KVCache.create(1, 64, 2, 16), x, x)
      >>> decode(x, *cache).shape
      (1, 1, 2, 16)
    """
    axis_size(axis_name)
    mask = Causal() if mask is None else mask
    expect(isinstance(mask, Mask), "mask", "a Mask", type(mask).__name__)
    check_splits(mask)
    first = jax.lax.axis_index(axis_name) * key.shape[1]
    part = softmax.decode_attention(
        query,
        key,
        value,
        # Counted from this device's first slot, and so are the queries' positions.
        jnp.asarray(lengths) - first,
        mask=Offset(mask, query=first, key=first),
        scale=scale,
        implementation=implementation,
        return_residual=True,
    )
    out, lse = _merged(*part, axis_name)
    return (out, lse) if return_residual else out


def dist_attention(
    query: jax.Array,
    cache: SparseCache,
    axis_name: AxisName,
    *,
    mask: Mask | None = None,
    scale: float | jax.Array | None = None,
    implementation: str | KernelConfig | None = None,
    return_residual: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Computes `attnx.cache.dist_attention`, each device holding one segment.

    As `decode_attention`, for tokens in any slots of any device: their positions say
    what they are, so that new ones may go where there is room.

    Args:
      query: `[B, T, N, H]`, the newest tokens, the same on all devices.
      cache: this device's segment; `lengths` count the whole sequence.
      axis_name: the mesh axis of the segments.
      mask: who sees whom, by position in the sequence; by default causal.
      scale: factor on the scores, by default `H ** -0.5`.
      implementation: as in `attnx.decode_attention`.
      return_residual: also return the log-sum-exp.

    Returns:
      As `attnx.decode_attention`, the same on all devices.

    Raises:
      ValueError: arrays that do not fit, or an axis that there is not.
      NotImplementedError: an `implementation` that does not serve the call.
    """
    axis_size(axis_name)
    part = sparse_decode_attention(
        query,
        cache,
        mask=mask,
        scale=scale,
        implementation=implementation,
        return_residual=True,
    )
    out, lse = _merged(*part, axis_name)
    return (out, lse) if return_residual else out


def append(
    cache: KVCache, key: jax.Array, value: jax.Array, axis_name: AxisName
) -> KVCache:
    """Adds T tokens to every row of a cache that is cut over a mesh axis.

    Args:
      cache: this device's slots; `lengths` count the whole cache.
      key: `[B, T, K, H]`, the same on all devices.
      value: `[B, T, K, V]`.
      axis_name: the mesh axis that the cache is cut over.

    Returns:
      The cache with the tokens in it; a row that is full keeps what it has.

    Raises:
      ValueError: shapes that do not fit, or an axis that there is not.
    """
    axis_size(axis_name)
    batch, slots = cache.key.shape[:2]
    tokens = key.shape[1] if key.ndim == 4 else 0
    expect_shape("key", key, (batch, tokens, *cache.key.shape[2:]))
    expect_shape("value", value, (batch, tokens, *cache.value.shape[2:]))
    first = jax.lax.axis_index(axis_name) * slots
    slot = cache.lengths[:, None] + jnp.arange(tokens) - first
    # A negative index would count from the end.
    slot = jnp.where(slot < 0, slots, slot)
    rows = jnp.arange(batch)[:, None]

    def put(held, x):
        return held.at[rows, slot].set(x.astype(held.dtype), mode="drop")

    return KVCache(put(cache.key, key), put(cache.value, value), cache.lengths + tokens)


def _merged(out, lse, axis_name):
    """The parts of all devices merged: one message from each to each."""
    dtype = jnp.promote_types(out.dtype, jnp.float32)
    part = jnp.concatenate([out.astype(dtype), lse.astype(dtype)[..., None]], -1)
    parts = list(jax.lax.all_gather(part, axis_name))
    merged, lse = merge_attention(
        [part[..., :-1] for part in parts], [part[..., -1] for part in parts]
    )
    return merged.astype(out.dtype), lse
