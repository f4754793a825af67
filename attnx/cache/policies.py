"""Which tokens of a cache are worth keeping: a function a method.

A policy is `(query, cache) -> scores [B, K, S]`, one for each slot: `query`
`[B, W, N, H]` are the newest W tokens, which the cache holds already. `evict` keeps
the best. What a policy says of empty slots does not matter.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attnx._checks import expect
from attnx.cache.kv_cache import KVCache
from attnx.cache.sparse_cache import EMPTY, SparseCache
from attnx.softmax.mask import Mask
from attnx.softmax.masks import Causal


def streaming_scores(
    query: jax.Array, cache: KVCache | SparseCache, *, sinks: int = 4
) -> jax.Array:
    """Scores the first tokens highest, then the newest.

    StreamingLLM (arXiv 2309.17453): a budget of `sinks + window` keeps attention sinks
    and a window. Positions stay those of the sequence, where the paper counts them
    anew inside the cache.

    Args:
      query: not looked at.
      cache: of B sequences, K heads and S slots.
      sinks: first tokens to keep.

    Returns:
      Float32 `[B, K, S]`.

    Example:
      >>> import jax.numpy as jnp, attnx
      >>> from attnx.cache import streaming_scores
      >>> x = jnp.ones((1, 4, 1, 1))
      >>> cache = attnx.KVCache.create(1, 4, 1, 1).append(x, x)
      >>> streaming_scores(x, cache, sinks=1).tolist()
      [[[inf, 1.0, 2.0, 3.0]]]
    """
    del query
    expect(sinks >= 0, "sinks", "at least 0", sinks)
    positions = SparseCache.of(cache).positions
    is_sink = (positions != EMPTY) & (positions < sinks)
    return jnp.where(is_sink, jnp.inf, positions.astype(jnp.float32))


def key_norm_scores(query: jax.Array, cache: KVCache | SparseCache) -> jax.Array:
    """Scores tokens by minus the norm of their keys (arXiv 2406.11430).

    Args:
      query: not looked at.
      cache: of B sequences, K heads and S slots.

    Returns:
      Float32 or better `[B, K, S]`.

    Example:
      >>> import jax.numpy as jnp, attnx
      >>> from attnx.cache import key_norm_scores
      >>> x = jnp.array([3.0, -4.0]).reshape(1, 2, 1, 1)
      >>> key_norm_scores(x, attnx.KVCache.create(1, 2, 1, 1).append(x, x)).tolist()
      [[[-3.0, -4.0]]]
    """
    del query
    key = SparseCache.of(cache).key
    key = key.astype(jnp.promote_types(key.dtype, jnp.float32))
    return -jnp.linalg.norm(key, axis=-1)


def snapkv_scores(
    query: jax.Array,
    cache: KVCache | SparseCache,
    *,
    kernel_size: int = 5,
    scale: float | None = None,
    mask: Mask | None = None,
) -> jax.Array:
    """Scores tokens by the attention that the newest queries pay them.

    SnapKV (arXiv 2404.14469): the weights of W queries, summed, averaged over the query
    heads of a key head, and smoothed over neighbours. The newest W tokens are worth
    more than any other.

    Args:
      query: `[B, W, N, H]`, the newest W tokens, such as 32; K divides N.
      cache: of B sequences, K heads and S slots.
      kernel_size: neighbours averaged, itself included; odd.
      scale: factor on the scores of attention, by default `H ** -0.5`.
      mask: who sees whom, by position in the sequence; by default causal.

    Returns:
      Float32 or better `[B, K, S]`.

    Raises:
      ValueError: shapes or options that do not fit.

    Example:
      >>> import jax, attnx
      >>> from attnx.cache import evict, snapkv_scores
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 64, 2, 16))
      >>> cache = attnx.KVCache.create(1, 64, 2, 16).append(k, v)
      >>> evict(cache, snapkv_scores(q[:, -8:], cache), 16).positions.shape
      (1, 2, 16)
    """
    cache = SparseCache.of(cache)
    weights = observed_weights(query, cache, scale=scale, mask=mask)
    return keep_newest(smooth(weights, kernel_size), query, cache)


def observed_weights(query, cache, *, scale=None, mask=None):
    """Attention of the newest queries to what came before them, summed: `[B, K, S]`."""
    batch, heads, _, size = cache.key.shape
    fits = (
        query.ndim == 4
        and (query.shape[0], query.shape[3]) == (batch, size)
        and query.shape[2] % heads == 0
    )
    wanted = f"[{batch}, W, a multiple of {heads}, {size}]"
    expect(fits, "query", wanted, query.shape)
    mask = Causal() if mask is None else mask
    width, group = query.shape[1], query.shape[2] // heads
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    query = query.reshape(batch, width, heads, group, size).astype(dtype)
    # Which tokens stay hangs on these: no TF32.
    scores = jnp.einsum(
        "bwkgh,bksh->bkgws", query, cache.key.astype(dtype), precision="highest"
    )
    # Indices of [B, K, G, W, S].
    row = jnp.arange(batch).reshape(-1, 1, 1, 1, 1)
    head = jnp.arange(heads * group).reshape(1, heads, group, 1, 1)
    first = cache.lengths.reshape(-1, 1, 1, 1, 1) - width
    position = cache.positions[:, :, None, None]
    seen = mask(row, head, first + jnp.arange(width)[:, None], position)
    seen &= position != EMPTY
    scores = scores * (size**-0.5 if scale is None else scale)
    weights = masked_softmax(scores, seen).sum(3).mean(2)
    return jnp.where(_is_newest(width, cache), 0, weights)


def masked_softmax(x, where):
    """The softmax over the last axis where True; 0 elsewhere."""
    return jnp.where(where, jax.nn.softmax(x, -1, where=where), 0)


def smooth(scores, kernel_size):
    """Averages neighbours; those past the ends count as 0."""
    is_odd = isinstance(kernel_size, int) and kernel_size >= 1 and kernel_size % 2 == 1
    expect(is_odd, "kernel_size", "an odd number", kernel_size)
    side = kernel_size // 2
    padded = jnp.pad(scores, ((0, 0), (0, 0), (side, side)))
    slots = scores.shape[-1]
    return sum(padded[..., i : i + slots] for i in range(kernel_size)) / kernel_size


def keep_newest(scores, query, cache):
    """The tokens that queried are not for judgement."""
    return jnp.where(_is_newest(query.shape[1], cache), jnp.inf, scores)


def _is_newest(width, cache):
    return cache.positions >= cache.lengths[:, None, None] - width
