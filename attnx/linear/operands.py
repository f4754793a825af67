"""What arguments that are missing, or that say the same otherwise, stand for."""

from __future__ import annotations

import jax
import jax.numpy as jnp

# A log decay that forgets everything: e^-1000 is 0 in float32 and in float64.
FORGET = -1000.0


def by_token(log_decay, segment_ids, query, dtype, reverse, filled) -> jax.Array:
    """`[N]` if every token decays alike, or `[B, T, N]`, or `[B, T, N, H]`.

    The first token of a new document forgets the old one.
    """
    batch, length, num_heads, _ = query.shape
    if log_decay is None:
        log_decay = jnp.zeros_like(query, dtype, shape=(num_heads,))
        filled = False
    log_decay = jnp.maximum(log_decay.astype(dtype), FORGET)
    if log_decay.ndim == 1 and (filled or segment_ids is not None):
        log_decay = jnp.broadcast_to(log_decay, (batch, length, num_heads))
    if segment_ids is not None:
        starts = segment_ids[:, 1:] != segment_ids[:, :-1]
        starts = jnp.pad(starts, ((0, 0), (0, 1) if reverse else (1, 0)))
        starts = starts.reshape(batch, length, *[1] * (log_decay.ndim - 2))
        log_decay = jnp.where(starts, FORGET, log_decay)
    return log_decay


def empty_state(query: jax.Array, columns: int, dtype) -> jax.Array:
    """Zeros `[B, N, H, columns]`."""
    # Made from the query, so as to be laid out over devices as it is.
    empty = jnp.zeros_like(query[:, 0, ..., None], dtype)
    return jnp.broadcast_to(empty, (*empty.shape[:3], columns))
