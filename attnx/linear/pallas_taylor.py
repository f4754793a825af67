"""Taylor attention by the GPU kernel of `pallas_kernels`.

Long sequences of few heads are cut into pieces, as in `pallas.py`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from attnx._groups import sum_of_groups
from attnx.linear.operands import empty_state
from attnx.linear.pallas_scan import number_of_pieces
from pallas_kernels.batching import mappable
from pallas_kernels.chunks import CHUNK, inverse
from pallas_kernels.mosaic import wrong_device
from pallas_kernels.taylor_attention import Slope, taylor_scan
from pallas_kernels.taylor_features import FEATURES, KEY_FACTORS, SIZE, STATE_ROWS

VALUE_SIZES = (64, 128)


def taylor_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    initial_state: jax.Array | None,
    segment_ids: None,
) -> tuple[jax.Array, jax.Array]:
    """See `attnx.taylor_attention`; returns the output and the final state."""
    length = query.shape[1]
    if initial_state is None:
        shape = (*query.shape[:3], FEATURES)
        like = jnp.broadcast_to(query[..., :1], shape)
        initial_state = empty_state(like, value.shape[-1] + 1, jnp.float32)
    pieces = number_of_pieces(query)
    fill = -length % (CHUNK * pieces)
    tokens = query, key, value
    if fill:
        width = (0, 0), (0, fill), (0, 0), (0, 0)
        tokens = [jnp.pad(x, width) for x in tokens]
    out, state = _attention(pieces, *tokens, initial_state)
    # The first feature of a key is 1, also of those that fill up.
    return out[:, :length], state.at[:, :, 0, -1].add(-fill)


def unsupported(
    query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array | None
) -> str | None:
    """Why the kernel cannot serve a call, or None."""
    for x in (query, key, value):
        if x.dtype != jnp.bfloat16:  # In float16 the states' sums would overflow.
            return f"the kernel takes bfloat16, not {x.dtype}"
    if query.shape[-1] != SIZE:
        return f"the kernel takes queries and keys of {SIZE}, not {query.shape[-1]}"
    if value.shape[-1] not in VALUE_SIZES:
        return f"the kernel takes values of {VALUE_SIZES}, not {value.shape[-1]}"
    if segment_ids is not None:
        return "the kernel takes one document a row"
    return wrong_device()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(pieces, query, key, value, state):
    return _forward(pieces, query, key, value, state)[0]


def _forward(pieces, query, key, value, state):
    entering = _entering(pieces, key, value, *_inside(state))
    tokens = query, key, value, *entering
    *leaving, out, total = _scan(tokens, pieces=pieces, outputs="quotients")
    last = _outside(*(x[:, :, -1] for x in leaving))
    return (out, last), (query, key, value, entering, out, total)


def _backward(pieces, residuals, cotangents):
    """Of the sums of values and of ones, given those of their quotient."""
    query, key, value, entering, out, total = residuals
    d_out, d_last = cotangents
    shares = jnp.swapaxes(inverse(total), 1, 2)
    d_sum = (d_out * shares[..., None]).astype(value.dtype)
    # Of what was rounded, for the two gradients nearly cancel.
    d_total = -jnp.sum(d_sum.astype(jnp.float32) * out, -1)
    d_total = jnp.swapaxes(d_total, 1, 2)
    *_, d_query = _scan(
        (query, key, value, *entering, None, Slope(d_sum, d_total)),
        pieces=pieces,
        outputs="none",
    )
    # Keys are to later queries what queries are to earlier keys.
    leaving = _entering(
        pieces, query, d_sum, *_inside(d_last), d_total, transposed=True
    )
    *d_entering, d_value, d_key = _scan(
        (key, query, d_sum, *leaving, d_total, Slope(value, None)),
        pieces=pieces,
        outputs="sums",
        transposed=True,
    )
    return (
        d_query,
        sum_of_groups(d_key, key),
        sum_of_groups(d_value, value),
        _outside(*(x[:, :, 0] for x in d_entering)),
    )


_attention.defvjp(_forward, _backward)


def _scan(tokens, **options):
    return mappable(taylor_scan, **options)(tokens, ())


def _entering(pieces, key, value, state, sums, by=None, *, transposed=False):
    """The states and sums that enter the pieces, from those that enter the first."""
    first = state[:, :, None], sums[:, :, None]
    if pieces == 1:
        return first
    empty = [jnp.repeat(jnp.zeros_like(x), pieces - 1, axis=2) for x in first]
    added = _scan(
        (None, key, value, *empty, by),
        pieces=pieces,
        outputs="none",
        transposed=transposed,
    )
    parts = [
        jnp.concatenate(pair[::-1] if transposed else pair, axis=2)
        for pair in zip(first, added, strict=True)
    ]
    return tuple(jax.lax.cumsum(x, axis=2, reverse=transposed) for x in parts)


def _inside(state):
    """A state, or the cotangent of one, as the kernel has it, and its last column."""
    state = state * KEY_FACTORS[:, None]
    state = jnp.pad(state, ((0, 0), (0, 0), (0, STATE_ROWS - FEATURES), (0, 0)))
    return state[..., :-1], state[..., -1]


def _outside(state, sums):
    """`_inside` undone."""
    state = jnp.concatenate([state, sums[..., None]], -1)
    return state[:, :, :FEATURES] / KEY_FACTORS[:, None]
