"""A cache of some of the tokens, each with the position it had in the sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from attnx._checks import expect, expect_shape, is_traced
from attnx._tree import tree_class
from attnx.cache.kv_cache import KVCache
from attnx.softmax.decode import decode_attention
from attnx.softmax.mask import Mask
from attnx.softmax.masks import Causal
from attnx.softmax.pallas import KernelConfig

# What an empty slot has for a position.
EMPTY = -1


class SparseCache(NamedTuple):
    """Keys and values of some of the tokens so far; each head may hold others.

    What `evict` leaves of a cache, or a segment of one. Slots in use come first, in
    the order of their positions. A pytree, as `KVCache` is.

    Attributes:
      key: `[B, K, S, H]`, S being the capacity of each head. Positions that were
        applied to the keys, such as rotary ones, stay as they were.
      value: `[B, K, S, V]`.
      positions: int32 `[B, K, S]`, the index in the sequence of the token in each
        slot; -1 in an empty one.
      lengths: int32 `[B]`, tokens of the sequence so far, those not held included: the
        position of the token to come.
    """

    key: jax.Array
    value: jax.Array
    positions: jax.Array
    lengths: jax.Array

    @classmethod
    def create(
        cls,
        batch: int,
        capacity: int,
        num_kv_heads: int,
        head_size: int,
        *,
        value_size: int | None = None,
        dtype: jnp.dtype = jnp.float32,
    ) -> SparseCache:
        """Makes an empty cache, as `KVCache.create`."""
        sizes = (batch, capacity, num_kv_heads, head_size)
        return cls.of(KVCache.create(*sizes, value_size=value_size, dtype=dtype))

    @classmethod
    def of(cls, cache: KVCache | SparseCache) -> SparseCache:
        """The same tokens, each with its position: a copy of a `KVCache`."""
        if isinstance(cache, SparseCache):
            return cache
        batch, capacity, heads = cache.key.shape[:3]
        slot = jnp.arange(capacity, dtype=jnp.int32)
        positions = jnp.where(slot < cache.lengths[:, None], slot, EMPTY)
        return cls(
            jnp.swapaxes(cache.key, 1, 2),
            jnp.swapaxes(cache.value, 1, 2),
            jnp.broadcast_to(positions[:, None], (batch, heads, capacity)),
            cache.lengths,
        )

    def counts(self) -> jax.Array:
        """Tokens that each head holds, int32 `[B, K]`."""
        return (self.positions != EMPTY).sum(-1, dtype=jnp.int32)

    def append(self, key: jax.Array, value: jax.Array) -> SparseCache:
        """Adds the next T tokens of every sequence, after those held.

        Args:
          key: `[B, T, K, H]`, with positions from `lengths` on applied.
          value: `[B, T, K, V]`.

        Returns:
          The cache with the tokens in it. Under `jit` a head without room keeps what
          it has.

        Raises:
          ValueError: shapes that do not fit, or more tokens than there is room for
            where that is known.
        """
        batch, heads, capacity, _ = self.key.shape
        tokens = key.shape[1] if key.ndim == 4 else 0
        for name, x, held in (("key", key, self.key), ("value", value, self.value)):
            expect_shape(name, x, (batch, tokens, heads, held.shape[-1]))
        counts = self.counts()
        if not is_traced(counts):
            longest = int(counts.max(initial=0)) + tokens
            wanted = f"room for {longest} tokens"
            expect(longest <= capacity, "cache", wanted, f"a capacity of {capacity}")
        new = jnp.arange(tokens, dtype=jnp.int32)
        where = (
            jnp.arange(batch)[:, None, None],
            jnp.arange(heads)[:, None],
            counts[..., None] + new,
        )

        def put(held, x):
            return held.at[where].set(x.astype(held.dtype), mode="drop")

        return SparseCache(
            put(self.key, jnp.swapaxes(key, 1, 2)),
            put(self.value, jnp.swapaxes(value, 1, 2)),
            put(self.positions, self.lengths[:, None, None] + new),
            self.lengths + tokens,
        )

    def grow(self, tokens: int) -> SparseCache:
        """The same cache with room for so many tokens more."""
        rows = [(0, 0), (0, 0), (0, tokens)]
        return SparseCache(
            jnp.pad(self.key, [*rows, (0, 0)]),
            jnp.pad(self.value, [*rows, (0, 0)]),
            jnp.pad(self.positions, rows, constant_values=EMPTY),
            self.lengths,
        )

    def split(self, sizes: Sequence[int]) -> tuple[SparseCache, ...]:
        """Cuts the slots into segments, such as `dist_attention` takes.

        Args:
          sizes: slots of each segment, 0 or more; S in all.

        Raises:
          ValueError: sizes that do not add up to S.
        """
        capacity = self.key.shape[2]
        fits = min(sizes, default=0) >= 0 and sum(sizes) == capacity
        expect(fits, "sizes", f"sizes that add up to {capacity}", tuple(sizes))
        parts, start = [], 0
        for size in sizes:
            part = slice(start, start := start + size)
            arrays = (x[:, :, part] for x in self[:3])
            parts.append(SparseCache(*arrays, self.lengths))
        return tuple(parts)


def sparse_decode_attention(
    query: jax.Array,
    cache: SparseCache,
    *,
    mask: Mask | None = None,
    scale: float | jax.Array | None = None,
    implementation: str | KernelConfig | None = None,
    return_residual: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attends the last T tokens of each sequence to those that a cache still holds.

    `decode_attention` with the keys' own positions: masks mean what they mean in the
    whole sequence, whatever was evicted.

    Args:
      query: `[B, T, N, H]`, the tokens at positions `cache.lengths - T` to
        `cache.lengths - 1`, with these positions applied.
      cache: of K heads; K divides N.
      mask: who sees whom, by position in the sequence; by default causal.
      scale: factor on the scores, by default `H ** -0.5`.
      implementation: as in `decode_attention`.
      return_residual: also return the log-sum-exp.

    Returns:
      The output `[B, T, N, V]`; with `return_residual` also the natural log-sum-exp,
      float32 `[B, T, N]`.

    Raises:
      ValueError: shapes that do not fit.
      NotImplementedError: an `implementation` that does not serve the call.

    Example:
      >>> import jax, attnx
      >>> from attnx.cache import evict, sparse_decode_attention, streaming_scores
      >>> k, v = jax.random.normal(jax.random.key(0), (2, 1, 64, 2, 16))
      >>> q = jax.random.normal(jax.random.key(1), (1, 1, 4, 16))
      >>> cache = attnx.KVCache.create(1, 64, 2, 16).append(k, v)
      >>> small = evict(cache, streaming_scores(q, cache, sinks=2), 16)
      >>> small.positions[0, 0].tolist()
      [0, 1, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63]
      >>> sparse_decode_attention(q, small).shape
      (1, 1, 4, 16)
    """
    batch, heads, capacity, _ = cache.key.shape
    query = jnp.asarray(query)
    fits = query.ndim == 4 and len(query) == batch and query.shape[2] % heads == 0
    expect(fits, "query", f"[{batch}, T, a multiple of {heads}, H]", query.shape)
    tokens, group = query.shape[1], query.shape[2] // heads
    mask = Causal() if mask is None else mask
    expect(isinstance(mask, Mask), "mask", "a Mask", type(mask).__name__)
    # Heads hold different tokens: each is a sequence of its own.
    rows = jnp.moveaxis(query.reshape(batch, tokens, heads, group, -1), 2, 1)
    key, value = (x.reshape(batch * heads, capacity, 1, -1) for x in cache[:2])
    out, lse = decode_attention(
        rows.reshape(batch * heads, tokens, group, -1),
        key,
        value,
        jnp.repeat(cache.lengths, heads),
        mask=Held(mask, cache.positions.reshape(-1, capacity), heads, group),
        scale=scale,
        implementation=implementation,
        return_residual=True,
    )

    def join(x):
        x = jnp.moveaxis(x.reshape(batch, heads, tokens, group, *x.shape[3:]), 1, 2)
        return x.reshape(batch, tokens, heads * group, *x.shape[4:])

    return (join(out), join(lse)) if return_residual else join(out)


@tree_class(meta=("heads", "group"))
class Held(Mask):
    """`mask` at the positions of the keys that slots hold; empty slots are not seen.

    Each row of the batch is one key head of a row of the mask's batch.

    Attributes:
      mask: over positions in the sequence.
      positions: int32 `[B * heads, S]`, -1 for an empty slot.
      heads: K.
      group: query heads of each.
    """

    mask: Mask
    positions: jax.Array
    heads: int
    group: int

    def __call__(self, batch, head, query, key):
        position = jnp.asarray(self.positions)[batch, key]
        batch, key_head = batch // self.heads, batch % self.heads
        seen = self.mask(batch, key_head * self.group + head, query, position)
        return (position != EMPTY) & seen

    def bounds(self, tiles):
        # Positions in a tile have gaps, which the mask's own bounds need not allow.
        used = jnp.asarray(self.positions) != EMPTY
        used = used[tiles.batch[..., None], tiles.key_indices()].any(-1)
        return used, jnp.zeros_like(used)
