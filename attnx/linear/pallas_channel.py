"""Linear attention with a decay a channel, by its GPU kernels."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attnx._groups import sum_of_groups
from pallas_kernels.batching import mappable
from pallas_kernels.linear_channel_decay import linear_channel_scan
from pallas_kernels.linear_channel_grad import linear_channel_grad

HEAD_SIZES = (64, 128)


@jax.custom_vjp
def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    scale: jax.Array,
    log_decay: jax.Array,
    initial_state: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The output and the final state, for whole chunks of one document a row."""
    tokens = query, key, value, log_decay, initial_state
    return mappable(linear_channel_scan)(tokens, (scale[None],))


def _forward(query, key, value, scale, log_decay, initial_state):
    tokens = query, key, value, log_decay
    out, last, states = mappable(linear_channel_scan, keep_states=True)(
        (*tokens, initial_state), (scale[None],)
    )
    return (out, last), (tokens, scale, states, out)


def _backward(residuals, cotangents):
    tokens, scale, states, out = residuals
    d_out, d_last = cotangents
    d_query, d_key, d_value, d_log_decay, d_state = mappable(linear_channel_grad)(
        (*tokens, d_out, states, d_last), (scale[None],)
    )
    d_scale = jnp.einsum("btnv,btnv->", out, d_out, preferred_element_type=jnp.float32)
    return (
        d_query,
        sum_of_groups(d_key, tokens[1]),
        sum_of_groups(d_value, tokens[2]),
        (d_scale / scale).astype(scale.dtype),
        d_log_decay,
        d_state,
    )


attention.defvjp(_forward, _backward)
