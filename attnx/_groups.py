"""Heads that share keys."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def sum_of_groups(gradient: jax.Array, array: jax.Array) -> jax.Array:
    """The gradient of `array` `[B, T, K, H]` from those of N heads `[B, T, N, H]`."""
    *tokens, heads, size = array.shape
    if gradient.shape[2] == heads:
        return gradient
    gradient = gradient.reshape(*tokens, heads, -1, size)
    return gradient.astype(jnp.float32).sum(3).astype(array.dtype)
