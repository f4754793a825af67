"""Taylor attention: the public function, and what supports a call."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from attnx._checks import expect
from attnx._dispatch import dispatch
from attnx.linear import pallas_taylor, reference, xla
from attnx.linear.operands import check_tokens


def taylor_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
    return_state: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Computes causal attention with exp to the second order, in time linear in T.

    Per head, with `a_ij = q_i k_j / sqrt(H)`, as Based does (arXiv:2402.18668 sec.
    4.1):

        w_ij = 1 + a_ij + a_ij^2 / 2        o_i = sum_{j <= i} w_ij v_j / sum w_ij

    It is `linear_attention` of `feature_maps.taylor`, normalized and with scale 1, but
    the features, F = 1 + H + H (H + 1) / 2 a token, are never all in memory. The state
    is the same, so `linear_attention_step` of features goes on from it. Differentiable
    in every array argument but `segment_ids`, and through the returned state.

    Args:
      query: `[B, T, N, H]`, or `[T, N, H]` and then no argument has a batch axis. H is
        small, 16 in Based: the state grows with its square.
      key: `[B, T, K, H]`, where K divides N: query head n reads key and value head
        `n // (N // K)`.
      value: `[B, T, K, V]`.
      initial_state: `[B, N, F, V + 1]`, the state before the first token, one per
        *query* head, whose last column sums the features of keys. Zeros by default.
      segment_ids: integers `[B, T]` that tell packed documents apart: wherever two
        neighbouring tokens differ, the state restarts from 0. The initial state
        belongs to each row's first document.
      implementation: "reference" (every pair), "xla" (by chunks, any device), "pallas"
        (a GPU kernel), or None for the fastest that supports the call where it is
        lowered.
      return_state: also return the state after the last token.

    Returns:
      The output `[B, T, N, V]` in query's dtype; with `return_state`, a pair of it and
      the state, `[B, N, F, V + 1]`, in float32 or, for float64 inputs, float64.

    Raises:
      ValueError: an argument of a wrong shape or dtype, or an unknown implementation.
      NotImplementedError: the implementation asked for cannot serve this call.

    Example:
      >>> import jax.numpy as jnp
      >>> from attnx import taylor_attention
      >>> query = key = jnp.array([0.0, 2.0]).reshape(2, 1, 1)  # weights 1, and 1, 13
      >>> taylor_attention(query, key, jnp.array([0.0, 14.0]).reshape(2, 1, 1)).ravel()
      Array([ 0., 13.], dtype=float32)
    """
    arrays: list[Any] = [query, key, value, initial_state, segment_ids]
    arrays = [x if x is None else jnp.asarray(x) for x in arrays]
    query = arrays[0]
    expect(query.ndim in (3, 4), "query", "rank 3 or 4", f"shape {query.shape}")
    unbatched = query.ndim == 3
    if unbatched:
        arrays = [x if x is None else x[None] for x in arrays]
    query, key, value, initial_state, segment_ids = arrays
    size = query.shape[-1]
    state_size = 1 + size + size * (size + 1) // 2, value.shape[-1] + 1
    check_tokens(*arrays, state_size)
    if initial_state is not None:
        dtype = jnp.promote_types(jnp.result_type(query, key, value), jnp.float32)
        initial_state = initial_state.astype(dtype)

    candidates = {
        "reference": reference.taylor_attention,
        "xla": xla.taylor_attention,
        "pallas": pallas_taylor.taylor_attention,
    }
    operands = query, key, value, initial_state, segment_ids
    out, state = dispatch(
        "taylor_attention", implementation, candidates, unsupported, *operands
    )
    if unbatched:
        out, state = out[0], state[0]
    return (out, state) if return_state else out


def unsupported(
    name: str,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    initial_state: jax.Array | None,
    segment_ids: jax.Array | None,
) -> str | None:
    """Says why the implementation `name` cannot serve these operands, or None."""
    if name == "pallas":
        return pallas_taylor.unsupported(query, key, value, segment_ids)
    return None
