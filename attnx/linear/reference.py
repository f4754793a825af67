"""Linear attention token by token, and Taylor attention pair by pair.

The specifications, written to be read.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from attnx.linear.feature_maps import taylor
from attnx.linear.normalizer import append_ones, divide_by_last
from attnx.linear.operands import empty_state


def linear_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    scale: jax.Array,
    log_decay: jax.Array | None,
    initial_state: jax.Array | None,
    segment_ids: jax.Array | None,
    *,
    reverse: bool,
    normalize: bool,
) -> tuple[jax.Array, jax.Array]:
    """See `attnx.linear_attention`; returns the output and the final state."""
    batch, length, num_heads, head_size = query.shape
    dtype = scale.dtype
    q = scale * query.astype(dtype)
    group = num_heads // key.shape[2]
    k = jnp.repeat(key.astype(dtype), group, axis=2)
    v = jnp.repeat(value.astype(dtype), group, axis=2)
    if normalize:
        v = append_ones(v)

    if log_decay is None:
        log_decay = jnp.zeros(num_heads)
    decay = jnp.exp(log_decay.astype(dtype))
    if decay.ndim < 4:
        decay = decay[..., None]
    decay = jnp.broadcast_to(decay, (batch, length, num_heads, head_size))
    if segment_ids is None:
        segment_ids = jnp.zeros_like(query[:, :, 0, 0], jnp.int32)
    if initial_state is None:
        initial_state = empty_state(query, v.shape[-1], dtype)

    def step(carry, token):
        state, last_segment = carry
        q, k, v, decay, segment = token
        same = (segment == last_segment)[:, None, None, None]
        state = jnp.where(same, decay[..., None] * state, 0)
        state = state + k[..., :, None] * v[..., None, :]
        out = jnp.einsum("bnh,bnhv->bnv", q, state, precision="highest")
        return (state, segment), out

    tokens = jax.tree.map(
        lambda x: jnp.moveaxis(x, 1, 0), (q, k, v, decay, segment_ids)
    )
    carry = initial_state, segment_ids[:, -1 if reverse else 0]
    (state, _), out = jax.lax.scan(step, carry, tokens, reverse=reverse)
    out = jnp.moveaxis(out, 0, 1)
    if normalize:
        out = divide_by_last(out)
    return out.astype(query.dtype), state


def taylor_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    initial_state: jax.Array | None,
    segment_ids: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """See `attnx.taylor_attention`; returns the output and the final state."""
    _, length, num_heads, head_size = query.shape
    dtype = jnp.promote_types(jnp.result_type(query, key, value), jnp.float32)
    group = num_heads // key.shape[2]
    q = query.astype(dtype)
    k = jnp.repeat(key.astype(dtype), group, axis=2)
    v = append_ones(jnp.repeat(value.astype(dtype), group, axis=2))

    if segment_ids is None:
        segment_ids = jnp.zeros_like(query[:, :, 0, 0], jnp.int32)
    starts = segment_ids[:, 1:] != segment_ids[:, :-1]
    document = jnp.pad(jnp.cumsum(starts, axis=1), ((0, 0), (1, 0)))
    seen = jnp.tril(jnp.ones((length, length), bool))
    seen &= document[:, :, None] == document[:, None, :]

    einsum = functools.partial(jnp.einsum, precision="highest")
    a = einsum("binh,bjnh->bnij", q, k) / head_size**0.5
    weights = jnp.where(seen[:, None], 1 + a + a**2 / 2, 0)
    out = einsum("bnij,bjnv->binv", weights, v)
    last = (document == document[:, -1:])[..., None, None]
    state = einsum("bjnf,bjnv->bnfv", jnp.where(last, taylor(k), 0), v)
    if initial_state is not None:
        first = document == 0
        before = einsum("binf,bnfv->binv", taylor(q), initial_state)
        out += jnp.where(first[..., None, None], before, 0)
        state += jnp.where(first[:, -1, None, None, None], initial_state, 0)
    return divide_by_last(out).astype(query.dtype), state
