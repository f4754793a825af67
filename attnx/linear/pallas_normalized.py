"""Normalised linear attention by its GPU kernels: a quotient, and its gradient."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from attnx.linear import xla
from attnx.linear.pallas_scan import (
    decay_of,
    entering_states,
    parted,
    scan,
    to_operands,
)
from pallas_kernels.batching import mappable
from pallas_kernels.chunks import EPS, inverse
from pallas_kernels.linear_attention import Offset
from pallas_kernels.linear_attention_grad import CHUNK as GRAD_CHUNK
from pallas_kernels.linear_attention_grad import linear_grad


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attention(pieces, query, key, value, scale, log_decay, initial_state):
    """Outputs divided by the sums of weights; states have a last column for those."""
    operands = query, key, value, scale, log_decay, initial_state
    return _outputs(pieces, *operands)[0]


def _forward(pieces, *operands):
    outputs, (entering, total, rows, rest) = _outputs(pieces, *operands, keep_rest=True)
    return outputs, (*operands[:5], entering, outputs[0], rest, total, rows)


def _outputs(
    pieces, query, key, value, scale, log_decay, initial_state, *, keep_rest=False
):
    decay = decay_of(log_decay, scale)
    entering = entering_states(pieces, (key, value), initial_state, decay, counted=True)
    states, counted = parted(entering)
    out, leaving, sums, total, rows, *rest = scan(
        *((query, key, value), states, decay),
        counted=counted,
        keep_rest=keep_rest,
    )
    last = jnp.concatenate([leaving, sums[..., None]], -1)[:, :, -1]
    return (out, last), (entering, total, rows, *rest)


def _backward(pieces, residuals, cotangents):
    """Gradients of sums, values with a column of ones, and of their quotient."""
    query, key, value, scale, log_decay, entering, out, rest, total, rows = residuals
    d_out, d_last = cotangents
    decay = decay_of(log_decay, scale)
    shares = jnp.swapaxes(inverse(total), 1, 2)
    d_sum = (d_out * shares[..., None]).astype(value.dtype)
    # Of rounded gradients but of whole outputs: their products with values, less this,
    # are what queries get, and where few tokens weigh most that is little.
    whole = out.astype(jnp.float32) + rest
    delta = jnp.sum(d_sum.astype(jnp.float32) * whole, -1)
    d_total = -jnp.swapaxes(delta, 1, 2)
    states, _ = parted(entering)
    d_query, _ = scan(
        *((d_sum, value, key), states.mT, decay),
        offset=Offset(d_total, rows),
        return_state=False,
    )
    d_leaving = entering_states(
        *(pieces, (query, d_sum), d_last, decay),
        counted=True,
        by=d_total,
        transposed=True,
    )
    d_states, d_counted = parted(d_leaving, d_total)
    run = mappable(
        lambda q, k, v, do, state, counted, decay: linear_grad(
            q, k, v, do, state, decay, counted
        )
    )
    d_key, d_value, d_entering, d_sums = run(
        (query, key, value, d_sum, d_states, d_counted),
        (decay_of(log_decay, scale, GRAD_CHUNK),),
    )
    d_entering = jnp.concatenate([d_entering, d_sums[..., None]], -1)
    options: dict[str, Any] = {"reverse": False, "normalize": True}
    of_decay = lambda log_decay: xla.linear_attention(
        query, key, value, scale, log_decay, entering[:, :, 0], None, **options
    )
    (d_log_decay,) = jax.vjp(of_decay, log_decay)[1](cotangents)
    # What EPS leaves: else the scale cancels.
    d_scale = EPS * jnp.sum(delta)
    grads = (d_query, d_key, d_value), d_scale / scale, d_log_decay, d_entering
    return to_operands((key, value, scale), *grads)


attention.defvjp(_forward, _backward)
