"""Linear attention by the GPU kernel of `pallas_kernels`.

Where batch and heads leave the device idle, the sequence is cut into pieces: what each
adds to the state is summed first, a scan over pieces gives the states that enter them,
and then all pieces are attended side by side (arXiv 2401.04658 with section 4.2 of
arXiv 2312.06635).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from attnx.linear import pallas_channel, pallas_normalized, xla
from attnx.linear.operands import by_token, empty_state, repeated, to_state
from attnx.linear.pallas_scan import (
    added_states,
    decay_of,
    entering_states,
    no_state,
    number_of_pieces,
    scan,
    summed,
    to_operands,
)
from pallas_kernels.batching import mappable
from pallas_kernels.chunks import CHUNK
from pallas_kernels.linear_attention_grad import CHUNK as GRAD_CHUNK
from pallas_kernels.linear_attention_grad import LARGEST, linear_grad
from pallas_kernels.linear_decay_grad import linear_decay_grad
from pallas_kernels.mosaic import wrong_device

HEAD_SIZES = (64, 128, 256)
# A log decay below which float32 knows no weight: e^-128 is 0.
_LEAST = -128.0
_PLAIN: dict[str, Any] = {"reverse": False, "normalize": False}


class _Options(NamedTuple):
    """What is known of a call when it is traced."""

    pieces: int
    one_decay: bool
    return_state: bool


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
    return_state: bool,
) -> tuple[jax.Array, jax.Array | None]:
    """See `attnx.linear_attention`; a state that is not wanted may be None."""
    length = query.shape[1]
    one_decay = log_decay is not None and log_decay.ndim == 1
    by_channel = log_decay is not None and log_decay.ndim == 4
    if initial_state is None and (normalize or by_channel):
        columns = value.shape[-1] + normalize
        initial_state = empty_state(query, columns, jnp.float32)
    pieces = 1 if by_channel else number_of_pieces(query)
    fill = -length % (CHUNK * pieces)
    # One decay a channel is as large as the keys: its kernels take it as it comes.
    if not by_channel or segment_ids is not None or log_decay.dtype == jnp.float64:
        log_decay = by_token(
            log_decay, segment_ids, query, jnp.float32, reverse, fill > 0
        )
        log_decay = jnp.maximum(log_decay, _LEAST)
    tokens = [query, key, value]
    tokens += [log_decay] if log_decay.ndim > 1 else []
    if reverse:
        tokens = [jnp.flip(x, 1) for x in tokens]
    if fill:  # Keys that add nothing, and no decay.
        rest = lambda x: ((0, 0),) * (x.ndim - 2)
        tokens = [jnp.pad(x, ((0, 0), (0, fill), *rest(x))) for x in tokens]
    query, key, value, *by = tokens
    log_decay = by[0] if by else log_decay
    options = _Options(pieces, one_decay, return_state)
    attend = functools.partial(_attention, options)
    if normalize:
        attend = functools.partial(pallas_normalized.attention, pieces)
    if by_channel:
        attend = pallas_channel.attention
    out, state = attend(query, key, value, scale, log_decay, initial_state)
    out = out[:, :length]
    return (jnp.flip(out, 1) if reverse else out), state


def unsupported(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array | None,
    *,
    normalize: bool,
) -> str | None:
    """Why the kernel cannot serve a call, or None."""
    for x in (query, key, value):
        if x.dtype not in (jnp.bfloat16, jnp.float16):
            return f"the kernel takes bfloat16 and float16, not {x.dtype}"
        if x.dtype != query.dtype:
            return f"the kernel takes one dtype, not {query.dtype} and {x.dtype}"
        if x.shape[-1] not in HEAD_SIZES:
            return f"the kernel takes head sizes {HEAD_SIZES}, not {x.shape[-1]}"
    if log_decay is not None and log_decay.ndim == 4:
        sizes = key.shape[-1], value.shape[-1]
        if normalize:
            return "the kernel does not normalize with a decay per channel"
        if not set(sizes) <= set(pallas_channel.HEAD_SIZES):
            return (
                "with a decay per channel the kernel takes head sizes "
                f"{pallas_channel.HEAD_SIZES}, not {sizes}"
            )
    if normalize and key.shape[-1] * value.shape[-1] > LARGEST:
        return (
            f"the kernel normalizes key sizes times value sizes up to {LARGEST}, "
            f"not {key.shape[-1]} times {value.shape[-1]}"
        )
    return wrong_device()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(options, query, key, value, scale, log_decay, initial_state):
    decay = decay_of(log_decay, scale)
    return _outputs(options, query, key, value, decay, initial_state)[:2]


def _outputs(options, query, key, value, decay, initial_state):
    pieces, _, return_state = options
    entering = entering_states(pieces, (key, value), initial_state, decay)
    tokens = query, key, value
    out, leaving = scan(tokens, entering, decay, return_state=return_state)
    return out, leaving[:, :, -1] if return_state else None, entering


def _forward(options, *primals):
    wants_decay = primals[4].perturbed
    # There may be no initial state.
    values = (x and x.value for x in primals)
    query, key, value, scale, log_decay, initial_state = values
    decay = decay_of(log_decay, scale)
    out, last, entering = _outputs(options, query, key, value, decay, initial_state)
    # By their presence these say which gradients are wanted.
    kept = (last,) if wants_decay else None
    given = None if initial_state is None else ()
    residuals = query, key, value, scale, log_decay, entering, out, kept, given
    return (out, last), residuals


def _backward(options, residuals, cotangents):
    """Each gradient is again a sum over earlier tokens, or over later ones."""
    pieces, one_decay, _ = options
    query, key, value, scale, log_decay, entering, out, kept, given = residuals
    d_out, d_last = cotangents
    if isinstance(d_out, SymbolicZero):
        d_out = jnp.zeros(d_out.shape, d_out.dtype)
    if isinstance(d_last, SymbolicZero):
        d_last = None
    small = entering.shape[-2] * entering.shape[-1] <= LARGEST
    # One for all tokens sums up what bfloat16 states leave over: xla keeps float32.
    by_kernel = small and not one_decay
    decay = decay_of(log_decay, scale)
    d_query, _, *states = scan(
        *((d_out, value, key), entering.mT, decay),
        keep_states=by_kernel and kept is not None,
        return_state=False,
    )
    d_leaving = entering_states(pieces, (query, d_out), d_last, decay, transposed=True)
    first = {"return_state": given is not None}
    if small:
        d_key, d_value, d_entering = mappable(linear_grad, **first)(
            (query, key, value, d_out),
            (d_leaving, decay_of(log_decay, scale, GRAD_CHUNK)),
        )
    else:
        d_key, _ = scan(
            *((value, d_out, query), d_leaving.mT, decay),
            transposed=True,
            return_state=False,
        )
        d_value, d_entering = scan(
            *((key, query, d_out), d_leaving, decay), transposed=True, **first
        )
    if kept is None:
        d_log_decay = jnp.zeros_like(log_decay)
    elif by_kernel:
        tokens = query, key, value, d_out, *states
        sums, changes = mappable(linear_decay_grad)(tokens, (d_leaving.mT, decay))
        (last,) = kept
        after = 0.0
        if last is not None and d_last is not None:
            after = (last * d_last).sum((2, 3))
        d_log_decay = _of_decay(sums, changes, after)
    else:
        batch = query.shape[0]
        whole = lambda state: jnp.broadcast_to(state, (batch, *state.shape[1:]))
        if d_last is None:
            d_last = no_state((key, value), decay)[:, :, 0]
        of_decay = lambda log_decay: xla.linear_attention(
            *(query, key, value, scale, log_decay, whole(entering[:, :, 0]), None),
            **_PLAIN,
        )
        pull = jax.vjp(of_decay, log_decay)[1]
        (d_log_decay,) = pull((d_out, whole(d_last)))
    d_scale = jnp.einsum("btnv,btnv->", out, d_out, preferred_element_type=jnp.float32)
    d_entering = None if given is None else d_entering
    grads = (d_query, d_key, d_value), d_scale / scale, d_log_decay, d_entering
    return to_operands((key, value, scale), *grads)


_attention.defvjp(_forward, _backward, symbolic_zeros=True)


def _of_decay(sums, changes, after):
    """The gradient `[B, T, N]` from what `linear_decay_grad` returns.

    `after` is the sum that the last chunk should end with, `[B, N]`.
    """
    changes = changes.reshape(*sums.shape, CHUNK)
    until = jnp.cumsum(changes, -1)
    after = jnp.broadcast_to(after, sums.shape[:2])
    ends = jnp.concatenate([sums[..., 1:], after[..., None]], -1)
    # Rounding is shared by the tokens between two sums that are known.
    missing = (ends - (sums - until[..., -1])) / CHUNK
    grads = sums[..., None] - (until - changes)
    grads += missing[..., None] * jnp.arange(CHUNK)
    return jnp.swapaxes(grads.reshape(*sums.shape[:2], -1), 1, 2)


def added(
    key: jax.Array,
    value: jax.Array,
    scale: jax.Array,
    log_decay: jax.Array,
    *,
    transposed: bool,
) -> jax.Array:
    """See `attnx.linear.pieces.added`; of whole chunks."""
    heads = log_decay.shape[min(2, log_decay.ndim - 1)]
    if log_decay.ndim == 4:  # Weighed beforehand, for the scan has a decay a head.
        weights = to_state(log_decay, scale, key.shape[1], transposed)
        key = (weights * repeated(key, heads)).astype(key.dtype)
        scale, log_decay = jnp.ones_like(scale), jnp.zeros_like(scale, shape=heads)
    decay = decay_of(jnp.maximum(log_decay, _LEAST), scale)
    states, until = added_states(1, (key, value), decay, transposed=transposed)
    return summed("bns,bnshv->bnhv", until[:, :, 0], states)


def piece(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    scale: jax.Array,
    log_decay: jax.Array,
    state: jax.Array,
    segment_ids: None,
) -> tuple[jax.Array, jax.Array]:
    """`linear_attention` of whole chunks that are a piece already."""
    if log_decay.ndim == 4:
        return pallas_channel.attention(query, key, value, scale, log_decay, state)
    options = _Options(1, log_decay.ndim == 1, True)
    log_decay = jnp.maximum(log_decay, _LEAST)
    return _attention(options, query, key, value, scale, log_decay, state)
