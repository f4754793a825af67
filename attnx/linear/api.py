"""Linear attention: the public function, its checks, and what supports a call."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from attnx._checks import expect, expect_shape
from attnx._dispatch import dispatch
from attnx.linear import pallas, reference, xla
from attnx.linear.operands import check_decay, check_tokens


def linear_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    log_decay: jax.Array | None = None,
    scale: float | jax.Array | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    reverse: bool = False,
    normalize: bool = False,
    implementation: str | None = None,
    return_state: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Computes causal linear attention, optionally with decay, in time linear in T.

    Per head, with decay `a_t = exp(log_decay_t)`, from the first token to the last:

        S_t = a_t S_{t-1} + k_t^T v_t        o_t = scale * q_t S_t

    A token's own key and value enter undecayed. Settings of it: linear attention (no
    decay), RetNet and Lightning Attention (one decay per head: arXiv:2307.08621,
    arXiv:2401.04658 eq. 2), the scalar gates of Mamba-2 (one per token), Gated Linear
    Attention (one per channel: arXiv:2312.06635 eq. 4). Differentiable in every array
    argument but `segment_ids`, and through the returned state.

    Args:
      query: `[B, T, N, H]`, or `[T, N, H]` and then no argument has a batch axis.
      key: `[B, T, K, H]`, where K divides N: query head n reads key and value head
        `n // (N // K)`.
      value: `[B, T, K, V]`; V may differ from H.
      log_decay: natural logarithm of the decay: None (no decay), `[N]` (one per head),
        `[B, T, N]` (one per token) or `[B, T, N, H]` (one per channel of the key). At
        most 0 by convention, which is not checked; -inf forgets everything.
      scale: multiplies the query; a number or a scalar array. `H ** -0.5` by default;
        Lightning Attention, TransNormerLLM and MiniMax-01 use 1.
      initial_state: `[B, N, H, V]`, the state before the first token, one per *query*
        head; with `normalize`, `[B, N, H, V + 1]`. Zeros by default.
      segment_ids: integers `[B, T]` that tell packed documents apart: wherever two
        neighbouring tokens differ, the state restarts from 0. The initial state
        belongs to each row's first document.
      reverse: run from the last token to the first: `S_t = a_t S_{t+1} + k_t^T v_t`.
        The initial state then enters at the end and belongs to the last document.
      normalize: divide by the sum of the weights, as kernel attention does
        (arXiv:2006.16236 eq. 12): `o_t = q_t S_t / (q_t z_t + 1e-12)`, `z_t` being the
        decayed sum of the keys, and the scale cancelling. Meant for feature maps
        without negative values. A row whose denominator is 0 gives 0. The state then
        has one more column, the last, which holds z.
      implementation: "reference" (token by token), "xla" (by chunks, any device), or
        None for the fastest that supports the call where it is lowered.
      return_state: also return the state after the last token processed.

    Returns:
      The output `[B, T, N, V]` in query's dtype; with `return_state`, a pair of it and
      the state, `[B, N, H, V]` (or `V + 1`), in float32 or, for float64 inputs,
      float64.

    Raises:
      ValueError: an argument of a wrong shape or dtype, or an unknown implementation.
      NotImplementedError: the implementation asked for cannot serve this call.

    Example:
      >>> import jax.numpy as jnp
      >>> from attnx.linear import linear_attention
      >>> x = jnp.ones((1, 4, 1, 1))
      >>> linear_attention(x, x, x)[0, :, 0, 0].tolist()
      [1.0, 2.0, 3.0, 4.0]
      >>> half = jnp.log(jnp.array([0.5]))
      >>> out, state = linear_attention(x, x, x, log_decay=half, return_state=True)
      >>> out[0, :, 0, 0].tolist(), state.shape
      ([1.0, 1.5, 1.75, 1.875], (1, 1, 1, 1))
    """
    arrays: list[Any] = [query, key, value, log_decay, initial_state, segment_ids]
    arrays = [x if x is None else jnp.asarray(x) for x in arrays]
    query, key, value, log_decay, *_ = arrays
    expect(query.ndim in (3, 4), "query", "rank 3 or 4", f"shape {query.shape}")
    unbatched = query.ndim == 3
    if unbatched:
        per_head = log_decay is not None and log_decay.ndim == 1
        arrays = [x if x is None else x[None] for x in arrays]
        if per_head:
            arrays[3] = log_decay
    query, key, value, log_decay, initial_state, segment_ids = arrays
    state_size = query.shape[-1], value.shape[-1] + normalize
    check_tokens(query, key, value, initial_state, segment_ids, state_size)
    if log_decay is not None:
        check_decay(log_decay, query)

    if scale is None:
        scale = query.shape[-1] ** -0.5
    dtype = jnp.promote_types(jnp.result_type(query, key, value), jnp.float32)
    scale = jnp.asarray(scale, dtype)
    expect_shape("scale", scale, ())
    if initial_state is not None:
        initial_state = initial_state.astype(dtype)

    static = {"reverse": reverse, "normalize": normalize}
    candidates = {
        "reference": functools.partial(reference.linear_attention, **static),
        "xla": functools.partial(xla.linear_attention, **static),
        "pallas": functools.partial(
            pallas.linear_attention, **static, return_state=return_state
        ),
    }
    if not return_state:
        only_out = lambda attend: lambda *operands: attend(*operands)[0]
        candidates = {name: only_out(attend) for name, attend in candidates.items()}
    result = dispatch(
        "linear_attention",
        implementation,
        candidates,
        functools.partial(unsupported, normalize=normalize),
        *(query, key, value, scale, log_decay, initial_state, segment_ids),
    )
    return jax.tree.map(lambda x: x[0], result) if unbatched else result


def unsupported(
    name: str,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    scale: jax.Array,
    log_decay: jax.Array | None,
    initial_state: jax.Array | None,
    segment_ids: jax.Array | None,
    *,
    normalize: bool = False,
) -> str | None:
    """Says why the implementation `name` cannot serve these operands, or None."""
    if name == "pallas":
        return pallas.unsupported(query, key, value, log_decay, normalize=normalize)
    return None
