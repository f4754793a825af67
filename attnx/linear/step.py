"""One token of linear attention: generation in constant time and memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attnx._checks import expect, expect_float, expect_shape
from attnx.linear.normalizer import append_ones, divide_by_last


def linear_attention_step(
    state: jax.Array,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    log_decay: jax.Array | None = None,
    scale: float | jax.Array | None = None,
    normalize: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Takes one token of `linear_attention`: the same recurrence, from a state.

    A prompt goes through `linear_attention(..., return_state=True)`, what follows
    through this, one token after the other.

    Args:
      state: `[B, N, H, V]`, or `[B, N, H, V + 1]` with `normalize`, as
        `linear_attention` returns it; zeros before the first token.
      query: `[B, N, H]`.
      key: `[B, K, H]`, where K divides N.
      value: `[B, K, V]`.
      log_decay: None, `[N]`, `[B, N]` or `[B, N, H]`.
      scale: multiplies the query, by default `H ** -0.5`.
      normalize: as in `linear_attention`.

    Returns:
      The output `[B, N, V]` in query's dtype, and the state with the token in it.

    Raises:
      ValueError: an argument of a wrong shape or dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> from attnx.linear import linear_attention_step
      >>> state, x = jnp.zeros((1, 1, 1, 1)), jnp.ones((1, 1, 1))
      >>> for _ in range(3):
      ...     out, state = linear_attention_step(state, x, x, x)
      >>> out.item()
      3.0
    """
    state, query, key, value = (jnp.asarray(x) for x in (state, query, key, value))
    for name, x in (("query", query), ("key", key), ("value", value)):
        expect(x.ndim == 3, name, "[batch, heads, size]", f"shape {x.shape}")
        expect_float(name, x)
    batch, heads, head_size = query.shape
    key_heads, value_size = value.shape[1:]
    expect_shape("key", key, (batch, key_heads, head_size))
    expect_shape("value", value, (batch, key_heads, value_size))
    expect(
        key_heads > 0 and heads % key_heads == 0,
        "key",
        f"a number of heads that divides query's {heads}",
        key_heads,
    )
    expect_float("state", state)
    expect_shape("state", state, (batch, heads, head_size, value_size + normalize))

    q, k, v = (x.astype(state.dtype) for x in (query, key, value))
    k, v = (jnp.repeat(x, heads // key_heads, 1) for x in (k, v))
    if normalize:
        v = append_ones(v)
    if log_decay is not None:
        log_decay = jnp.asarray(log_decay)
        shapes = ((heads,), (batch, heads), (batch, heads, head_size))
        expect_float("log_decay", log_decay)
        expect_shape("log_decay", log_decay, *shapes)
        if log_decay.ndim < 3:
            log_decay = jnp.broadcast_to(log_decay, shapes[1])[..., None]
        state = jnp.exp(log_decay.astype(state.dtype))[..., None] * state
    state = state + k[..., :, None] * v[..., None, :]
    scale = head_size**-0.5 if scale is None else scale
    out = jnp.einsum("bnh,bnhv->bnv", q * scale, state)
    if normalize:
        out = divide_by_last(out)
    return out.astype(query.dtype), state
