"""Heads that share keys."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def sum_of_groups(gradient: jax.Array, array: jax.Array) -> jax.Array:
    """The gradient of `array` `[B, T, K, H]` from those of N heads `[B, T, N, H]`."""
    *tokens, n, size = gradient.shape
    heads = array.shape[2]
    if n == heads:
        return gradient
    gradient = gradient.reshape(*tokens, heads, -1, size)
    return gradient.astype(jnp.float32).sum(3).astype(array.dtype)
