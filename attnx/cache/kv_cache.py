"""A preallocated key-value cache."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from attnx._checks import expect, expect_shape, is_traced


class KVCache(NamedTuple):
    """Keys and values of the tokens so far, in arrays that do not grow.

    A pytree: `append` works under `jax.jit` and, with the cache donated, in place.

    Attributes:
      key: `[B, S, K, H]`, S being the capacity.
      value: `[B, S, K, V]`.
      lengths: int32 `[B]`, tokens that each row holds. Under `jit` a row that has taken
        more than S tokens keeps the first S, and its length says how many it was given.
    """

    key: jax.Array
    value: jax.Array
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
    ) -> KVCache:
        """Makes an empty cache.

        Args:
          batch: B.
          capacity: S, tokens that fit.
          num_kv_heads: K.
          head_size: H.
          value_size: V, by default H.
          dtype: of keys and values.
        """
        value_size = head_size if value_size is None else value_size
        return cls(
            jnp.zeros((batch, capacity, num_kv_heads, head_size), dtype),
            jnp.zeros((batch, capacity, num_kv_heads, value_size), dtype),
            jnp.zeros((batch,), jnp.int32),
        )

    def append(self, key: jax.Array, value: jax.Array) -> KVCache:
        """Adds T tokens to every row, after those it holds.

        Args:
          key: `[B, T, K, H]`.
          value: `[B, T, K, V]`.

        Returns:
          The cache with the tokens in it.

        Raises:
          ValueError: shapes that do not fit, or more tokens than the capacity where
            that is known.
        """
        batch, capacity = self.key.shape[:2]
        tokens = key.shape[1] if key.ndim == 4 else 0
        expect_shape("key", key, (batch, tokens, *self.key.shape[2:]))
        expect_shape("value", value, (batch, tokens, *self.value.shape[2:]))
        lengths = self.lengths + tokens
        if not is_traced(lengths):
            longest = int(lengths.max())
            wanted = f"room for {longest} tokens"
            expect(longest <= capacity, "cache", wanted, f"a capacity of {capacity}")
        rows = jnp.arange(batch)[:, None]
        slots = self.lengths[:, None] + jnp.arange(tokens)
        return KVCache(
            self.key.at[rows, slots].set(key.astype(self.key.dtype), mode="drop"),
            self.value.at[rows, slots].set(value.astype(self.value.dtype), mode="drop"),
            lengths,
        )
