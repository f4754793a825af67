"""A sequence in pieces: what each adds to the state, and attention from a state."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from attnx._dispatch import dispatch
from attnx.linear import pallas, reference, xla
from attnx.linear.api import unsupported
from attnx.linear.operands import repeated, to_state


def cut_for(
    implementation: str | None,
    query: Any,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array,
) -> tuple[int, int]:
    """Into how many pieces, of multiples of how many tokens, a sequence is best cut."""
    unable = pallas.unsupported(query, key, value, log_decay, normalize=False)
    if implementation not in (None, "pallas") or unable:
        return 1, 1
    by_channel = log_decay.ndim == 4
    return 1 if by_channel else pallas.number_of_pieces(query), pallas.CHUNK


def added(
    key: jax.Array,
    value: jax.Array,
    scale: jax.Array,
    log_decay: jax.Array,
    *,
    implementation: str | None,
    transposed: bool = False,
) -> jax.Array:
    """What a piece adds to the state, `[B, N, H, V]`, without attending to it.

    `transposed`, of queries and the outputs' gradients: what a piece adds to the
    gradient of the state that enters it, by the same decays and by the scale.
    """
    candidates: dict[str, Any] = {
        name: functools.partial(fn, transposed=transposed)
        for name, fn in (
            ("reference", _added),
            ("xla", _added),
            ("pallas", pallas.added),
        )
    }
    reason = lambda name, key, value, scale, log_decay: unsupported(
        name, key, key, value, scale, log_decay, None, None
    )
    operands = key, value, scale, log_decay
    return dispatch("state of a piece", implementation, candidates, reason, *operands)


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    scale: jax.Array,
    log_decay: jax.Array,
    state: jax.Array,
    *,
    implementation: str | None,
) -> tuple[jax.Array, jax.Array]:
    """`attnx.linear_attention` of a piece, and the state that leaves it."""
    plain: dict[str, Any] = {"reverse": False, "normalize": False}
    candidates = {
        "reference": functools.partial(reference.linear_attention, **plain),
        "xla": functools.partial(xla.linear_attention, **plain),
        "pallas": pallas.piece,
    }
    operands = query, key, value, scale, log_decay, state, None
    return dispatch(
        "linear_attention", implementation, candidates, unsupported, *operands
    )


def _added(key, value, scale, log_decay, *, transposed):
    """By one product over all tokens."""
    dtype = scale.dtype
    weights = to_state(log_decay.astype(dtype), scale, key.shape[1], transposed)
    key, value = (repeated(x.astype(dtype), weights.shape[2]) for x in (key, value))
    return jnp.einsum("btnh,btnv->bnhv", weights * key, value, precision="highest")
