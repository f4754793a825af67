"""GUI-KV: screenshots in a cache, their salient patches kept, repeated ones not."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attnx._checks import expect, expect_shape
from attnx.cache.kv_cache import KVCache
from attnx.cache.policies import (
    keep_newest,
    masked_softmax,
    observed_weights,
    smooth,
)
from attnx.cache.sparse_cache import EMPTY, SparseCache


def guikv_scores(
    query: jax.Array,
    cache: KVCache | SparseCache,
    *,
    hidden: jax.Array,
    image_ids: jax.Array,
    budget: int,
    saliency: float = 2.0,
    temperature: float = 3.5,
    rank: int = 32,
    kernel_size: int = 5,
    scale: float | None = None,
) -> jax.Array:
    """Scores tokens for a sequence of screenshots.

    GUI-KV (arXiv 2510.00536) on top of `snapkv_scores`. Patches of the newest image
    gain by the norm of their hidden states. Of the patches of earlier images, those
    whose keys the newest image's keys can express best are worth nothing: as many of
    them as the budget makes leave.

    Args:
      query: `[B, W, N, H]`, the newest W tokens; K divides N. The authors take 8.
      cache: of B sequences, K heads and S slots.
      hidden: `[B, T, D]`, what entered the layer, by position in the sequence.
      image_ids: int `[B, T]`, the number of the image of each token, growing along the
        sequence; -1 for a token of none. The largest is the newest image.
      budget: tokens that each head will keep: the share `budget / lengths` of earlier
        patches keeps its scores.
      saliency: weight of the hidden states' norms.
      temperature: of the softmax over the newest image that the norms go through,
        standardized.
      rank: first keys of the newest image that express others.
      kernel_size: as in `snapkv_scores`.
      scale: as in `snapkv_scores`.

    Returns:
      Float32 or better `[B, K, S]`.

    Raises:
      ValueError: shapes or options that do not fit.

    Example:
      >>> import functools, jax, jax.numpy as jnp, attnx
      >>> from attnx.cache import evict, guikv_scores
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 64, 2, 16))
      >>> cache = attnx.KVCache.create(1, 64, 2, 16).append(k, v)
      >>> images = jnp.repeat(jnp.array([[0, 1, -1, -1]]), 16, 1)
      >>> policy = functools.partial(
      ...     guikv_scores, hidden=v.reshape(1, 64, 32), image_ids=images, budget=16
      ... )
      >>> evict(cache, policy(q[:, -8:], cache), 16).positions.shape
      (1, 2, 16)
    """
    cache = SparseCache.of(cache)
    batch = len(cache.lengths)
    expect(image_ids.ndim == 2, "image_ids", f"shape [{batch}, T]", image_ids.shape)
    expect_shape("image_ids", image_ids, (batch, image_ids.shape[1]))
    expect_shape("hidden", hidden, (*image_ids.shape, hidden.shape[-1]))
    expect(temperature > 0, "temperature", "above 0", temperature)
    expect(budget >= 1, "budget", "at least 1", budget)

    newest = image_ids.max(-1)[:, None, None]
    images = _at_positions(image_ids, cache, fill=-1)
    is_new, is_old = ((images >= 0) & x for x in (images == newest, images < newest))

    scores = smooth(observed_weights(query, cache, scale=scale), kernel_size)
    dtype = scores.dtype
    norms = jnp.linalg.norm(hidden.astype(dtype), axis=-1)
    norms = _at_positions(norms, cache, fill=0)
    gain = masked_softmax(_standardized(norms, is_new) / temperature, is_new)
    scores += saliency * gain

    repeats = jnp.where(is_old, redundancy(cache.key, is_new, rank=rank), jnp.inf)
    order = jnp.argsort(jnp.argsort(repeats, stable=True))
    lengths = cache.lengths[:, None].astype(dtype)
    share = jnp.maximum(lengths - budget, 0) / jnp.maximum(lengths, 1)
    dropped = jnp.floor(is_old.sum(-1) * share)
    scores = jnp.where(order < dropped[..., None], 0, scores)
    return keep_newest(scores, query, cache)


def redundancy(key: jax.Array, basis: jax.Array, *, rank: int = 32) -> jax.Array:
    """Measures what some keys cannot express of each key.

    Args:
      key: `[B, K, S, H]`.
      basis: bool `[B, K, S]`, the keys that express others.
      rank: how many of them do, the first ones.

    Returns:
      Float32 or better `[B, K, S]`: the norm of each key less its projection on the
      span of the first `rank` keys of the basis. 0 for a repeated key.

    Raises:
      ValueError: shapes or options that do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from attnx.cache import redundancy
      >>> key = jnp.array([[3.0, 4.0], [1.0, 0.0]])[None, None]
      >>> redundancy(key, jnp.array([[[False, True]]])).round(4).tolist()
      [[[4.0, 0.0]]]
    """
    expect(key.ndim == 4, "key", "shape [B, K, S, H]", key.shape)
    expect_shape("basis", basis, key.shape[:3])
    expect(rank >= 1, "rank", "at least 1", rank)
    key = key.astype(jnp.promote_types(key.dtype, jnp.float32))
    rank = min(rank, *key.shape[2:])
    first = jnp.argsort(~basis, axis=-1, stable=True)[..., :rank]
    keys = jnp.take_along_axis(key, first[..., None], 2)
    keys *= jnp.take_along_axis(basis, first, -1)[..., None]
    directions, triangle = jnp.linalg.qr(jnp.swapaxes(keys, -1, -2))
    # A key that those before it express adds no direction, only rounding.
    size = jnp.abs(jnp.diagonal(triangle, axis1=-2, axis2=-1))
    tolerance = key.shape[3] * jnp.finfo(key.dtype).eps
    adds = size > tolerance * size.max(-1, keepdims=True)
    directions = jnp.where(adds[..., None, :], directions, 0)
    inside = jnp.einsum("bksh,bkhr->bksr", key, directions, precision="highest")
    seen = jnp.einsum("bksr,bkhr->bksh", inside, directions, precision="highest")
    return jnp.linalg.norm(key - seen, axis=-1)


def _at_positions(x, cache, fill):
    """`[B, T]` by position in the sequence, as `[B, K, S]` by slot."""
    heads = cache.positions.shape[1]
    x = jnp.repeat(x[:, None], heads, 1)
    index = jnp.where(cache.positions == EMPTY, x.shape[2], cache.positions)
    return jnp.take_along_axis(x, index, 2, mode="fill", fill_value=fill)


def _standardized(x, where):
    count = jnp.maximum(where.sum(-1, keepdims=True), 1)
    x = jnp.where(where, x, 0)
    x = jnp.where(where, x - x.sum(-1, keepdims=True) / count, 0)
    # The sample's variance, as PyTorch has it.
    variance = (x**2).sum(-1, keepdims=True) / jnp.maximum(count - 1, 1)
    return x / (jnp.sqrt(variance) + 1e-8)
