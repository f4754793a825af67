"""The sliding window, which generates in constant memory."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from attnx import masks
from attnx._checks import expect
from attnx.nn.mixers import SoftmaxMixer
from attnx.softmax import dot_product_attention


class WindowCache(NamedTuple):
    """The last tokens' keys and values, the newest last; where there are fewer, zeros.

    Attributes:
      key: `[B, left, K, H]`.
      value: `[B, left, K, V]`.
      lengths: int `[B]`, tokens seen, those forgotten included.
    """

    key: jax.Array
    value: jax.Array
    lengths: jax.Array


class WindowMixer(SoftmaxMixer):
    """Softmax attention to a token itself and the `left` tokens before it.

    The same as `SoftmaxMixer(masks.Window(left, 0))`, but the cache keeps `left` tokens
    and no more: a step costs constant time and memory.

    Args:
      left: keys before a query's own.
      scale: multiplies the scores; `H ** -0.5` by default.
      implementation: as in `attnx.dot_product_attention`.

    Raises:
      ValueError: `left` is less than 1.

    Example:
      >>> from attnx.nn import WindowMixer
      >>> mixer = WindowMixer(127)
    """

    def __init__(
        self,
        left: int,
        *,
        scale: float | None = None,
        implementation: str | None = None,
    ):
        expect(isinstance(left, int) and left >= 1, "left", "at least 1", left)
        super().__init__(
            masks.Window(left, 0), scale=scale, implementation=implementation
        )
        self.left = left

    def init_cache(self, query, key, value, max_length=None):
        empty = lambda x: jnp.zeros((x.shape[0], self.left, *x.shape[2:]), x.dtype)
        lengths = jnp.zeros(key.shape[0], jnp.int32)
        return WindowCache(empty(key), empty(value), lengths)

    def step(self, query, key, value, cache, *, inputs=None):
        batch, length = query.shape[:2]
        join = lambda old, new: jnp.concatenate([old, new.astype(old.dtype)], 1)
        key, value = join(cache.key, key), join(cache.value, value)
        # A slot before the first token of the sequence belongs to no document.
        slots = jnp.arange(key.shape[1])
        is_token = slots >= self.left - cache.lengths[:, None]
        of_queries = jnp.ones((batch, length), jnp.int32)
        out = dot_product_attention(
            query,
            key,
            value,
            mask=masks.Offset(self.mask, query=self.left)
            & masks.Segments(of_queries, is_token.astype(jnp.int32)),
            scale=self.scale,
            implementation=self.implementation,
        )
        last = lambda x: x[:, -self.left :]
        return out, WindowCache(last(key), last(value), cache.lengths + length)
