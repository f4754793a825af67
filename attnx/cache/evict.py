"""Eviction: the tokens of highest score stay, each with its position."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attnx._checks import expect, expect_float, expect_shape
from attnx.cache.kv_cache import KVCache
from attnx.cache.sparse_cache import EMPTY, SparseCache


def evict(
    cache: KVCache | SparseCache,
    scores: jax.Array,
    budget: int | jax.Array,
    *,
    capacity: int | None = None,
) -> SparseCache:
    """Keeps the tokens of highest score in each head, and forgets the others.

    Args:
      cache: of B sequences, K heads and S slots.
      scores: `[B, K, S]`, what each slot's token is worth, such as from
        `snapkv_scores`. Of equal scores the earlier token stays.
      budget: tokens that each head keeps, all where it holds fewer. An array `[K]` or
        `[B, K]` gives each head its own, such as `adaptive_budgets`.
      capacity: slots of each head of the new cache, with room for tokens to come; by
        default an integer `budget`. A head keeps no more than fit.

    Returns:
      The cache of the tokens that stay, in the order of their positions. With room for
      all of them nothing but the order of axes changes.

    Raises:
      ValueError: shapes that do not fit, or a budget above the capacity where that is
        known.

    Example:
      >>> import jax.numpy as jnp, attnx
      >>> from attnx.cache import evict
      >>> x = jnp.arange(4.0).reshape(1, 4, 1, 1)
      >>> cache = attnx.KVCache.create(1, 4, 1, 1).append(x, x)
      >>> small = evict(cache, jnp.array([[[0.1, 0.9, 0.2, 0.8]]]), 2, capacity=3)
      >>> small.positions.tolist(), small.key.ravel().tolist(), small.lengths.tolist()
      ([[[1, 3, -1]]], [1.0, 3.0, 0.0], [4])
    """
    cache = SparseCache.of(cache)
    batch, heads, slots = cache.positions.shape
    expect_shape("scores", scores, (batch, heads, slots))
    expect_float("scores", scores)
    if isinstance(budget, int):
        expect(budget >= 1, "budget", "at least 1", budget)
        capacity = budget if capacity is None else capacity
        expect(capacity >= budget, "capacity", f"at least {budget}", capacity)
    else:
        budget = jnp.asarray(budget)
        expect_shape("budget", budget, (heads,), (batch, heads))
        if capacity is None:
            raise ValueError("capacity: expected the slots of each head, got None")
        expect(capacity >= 1, "capacity", "at least 1", capacity)

    used = cache.positions != EMPTY
    _, best = jax.lax.top_k(jnp.where(used, scores, -jnp.inf), min(capacity, slots))
    wanted = jnp.arange(best.shape[-1]) < jnp.asarray(budget)[..., None]
    # A token may be worth -inf and still stay: an empty slot may not.
    stays = wanted & jnp.take_along_axis(used, best, -1)
    index = jnp.sort(jnp.where(stays, best, slots), -1)

    def take(x, fill=0):
        at = index.reshape(index.shape + (1,) * (x.ndim - 3))
        return jnp.take_along_axis(x, at, 2, mode="fill", fill_value=fill)

    kept = SparseCache(
        take(cache.key), take(cache.value), take(cache.positions, EMPTY), cache.lengths
    )
    return kept.grow(capacity - index.shape[-1])


def adaptive_budgets(
    scores: jax.Array, budget: int, *, safeguard: float = 0.2
) -> jax.Array:
    """Shares the budget of a layer out to the heads that have most use for it.

    Ada-KV (arXiv 2407.11550): the best tokens of all heads together stay, after each
    head's `safeguard`.

    Args:
      scores: `[B, K, S]`, comparable between heads, such as from `snapkv_scores`.
      budget: tokens a head, on average.
      safeguard: the share of the budget that each head keeps in any case.

    Returns:
      int32 `[B, K]`: tokens of each head, `K * budget` in all, or `K * S` if less.

    Raises:
      ValueError: shapes or options that do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from attnx.cache import adaptive_budgets
      >>> scores = jnp.array([[[0.5, 0.4, 0.6, 0.1], [0.1, 0.2, 0.3, 0.0]]])
      >>> adaptive_budgets(scores, 2).tolist(), adaptive_budgets(
      ...     scores, 2, safeguard=1.0
      ... ).tolist()
      ([[3, 1]], [[2, 2]])
    """
    expect(scores.ndim == 3, "scores", "shape [B, K, S]", scores.shape)
    expect_float("scores", scores)
    is_size = isinstance(budget, int) and budget >= 1
    expect(is_size, "budget", "an integer of at least 1", budget)
    expect(0 <= safeguard <= 1, "safeguard", "0 to 1", safeguard)
    batch, heads, slots = scores.shape
    budget = min(budget, slots)
    safe = int(budget * safeguard)
    ranked = jnp.sort(scores, -1, descending=True)
    ranked = jnp.where(jnp.arange(slots) < safe, jnp.inf, ranked)
    _, best = jax.lax.top_k(ranked.reshape(batch, -1), heads * budget)
    return (best[:, None] // slots == jnp.arange(heads)[:, None]).sum(-1, jnp.int32)
