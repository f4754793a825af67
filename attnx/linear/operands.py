"""Checks of arguments, and what those stand for that are missing."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attnx._checks import expect, expect_float, expect_shape

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


def to_state(log_decay, scale, length, transposed) -> jax.Array:
    """What tokens weigh in the state that leaves them, `[B or 1, T, N, H or 1]`.

    `transposed`, what they weigh the state by that enters.
    """
    if log_decay.ndim == 1:
        log_decay = jnp.broadcast_to(log_decay, (1, length, *log_decay.shape))
    log_decay = log_decay if log_decay.ndim == 4 else log_decay[..., None]
    if transposed:
        return scale * jnp.exp(jax.lax.cumsum(log_decay, axis=1))
    # Summed from behind: a difference of long sums would lose the small ones.
    later = jnp.pad(log_decay[:, 1:], ((0, 0), (0, 1), (0, 0), (0, 0)))
    return jnp.exp(jax.lax.cumsum(later, axis=1, reverse=True))


def repeated(x, num_heads: int) -> jax.Array:
    """Keys or values with a head for each of the queries'."""
    return jnp.repeat(x, num_heads // x.shape[2], axis=2)


def check_decay(log_decay, query) -> None:
    """Raises `ValueError` unless it is one a head, a token and head, or a channel."""
    shape = query.shape
    expect_shape("log_decay", log_decay, shape[2:3], shape[:3], shape)
    expect_float("log_decay", log_decay)


def check_tokens(
    query, key, value, initial_state, segment_ids, state_size: tuple[int, int]
) -> None:
    """Raises `ValueError` unless shapes and dtypes agree; all have a batch axis.

    `state_size` is that of one head's state: rows and columns.
    """
    for name, array in (("key", key), ("value", value)):
        expect(array.ndim == query.ndim, name, "query's rank", f"shape {array.shape}")
    batch, length, num_heads, head_size = query.shape
    num_groups, value_size = value.shape[2:]
    expect(length > 0, "query", "at least one token", f"shape {query.shape}")
    expect_shape("key", key, (batch, length, num_groups, head_size))
    expect_shape("value", value, (batch, length, num_groups, value_size))
    expect(
        num_groups > 0 and num_heads % num_groups == 0,
        "key",
        f"a number of heads that divides query's {num_heads}",
        num_groups,
    )
    floats = {"query": query, "key": key, "value": value}
    if initial_state is not None:
        floats["initial_state"] = initial_state
        expect_shape("initial_state", initial_state, (batch, num_heads, *state_size))
    for name, array in floats.items():
        expect_float(name, array)
    if segment_ids is not None:
        expect_shape("segment_ids", segment_ids, (batch, length))
        expect(
            jnp.issubdtype(segment_ids.dtype, jnp.integer),
            "segment_ids",
            "an integer dtype",
            segment_ids.dtype,
        )
