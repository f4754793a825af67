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

from attnx._groups import sum_of_groups
from attnx.linear import pallas_channel, xla
from attnx.linear.operands import by_token, empty_state, repeated, to_state
from pallas_kernels.batching import mappable
from pallas_kernels.chunks import CHUNK, EPS, inverse
from pallas_kernels.linear_attention import Counted, Decay, Offset, linear_scan
from pallas_kernels.linear_attention_grad import CHUNK as GRAD_CHUNK
from pallas_kernels.linear_attention_grad import LARGEST, linear_grad
from pallas_kernels.linear_decay_grad import linear_decay_grad
from pallas_kernels.mosaic import LOG2E, wrong_device

HEAD_SIZES = (64, 128, 256)
# Streaming multiprocessors of an H100: a block of threads fills one.
_BLOCKS = 132
# Shorter pieces spend more on their states than they gain.
_MIN_CHUNKS = 4
# Pieces of so many chunks may be twice as many as fill the device: heads that forget
# have summed their states at once, and those that do not are left with more of it.
_LONG_CHUNKS = 64
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
        attend = functools.partial(_normalized, pieces)
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
    decay = _decay(log_decay, scale)
    return _outputs(options, query, key, value, decay, initial_state)[:2]


def _outputs(options, query, key, value, decay, initial_state):
    pieces, _, return_state = options
    if initial_state is None:
        initial_state = _no_state(query, value)
    entering = _entering(pieces, (key, value), initial_state, decay)
    out, leaving = _scan(
        *((query, key, value), entering, decay),
        pieces=pieces,
        return_state=return_state,
    )
    return out, leaving[:, :, -1] if return_state else None, entering


def _forward(options, *primals):
    wants_decay = primals[4].perturbed
    # There may be no initial state.
    values = (x and x.value for x in primals)
    query, key, value, scale, log_decay, initial_state = values
    decay = _decay(log_decay, scale)
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
    if d_last is None or isinstance(d_last, SymbolicZero):
        d_last = _no_state(query, value)
    small = entering.shape[-2] * entering.shape[-1] <= LARGEST
    # One for all tokens sums up what bfloat16 states leave over: xla keeps float32.
    by_kernel = small and not one_decay
    decay = _decay(log_decay, scale)
    d_query, _, *states = _scan(
        *((d_out, value, key), entering.mT, decay),
        pieces=pieces,
        keep_states=by_kernel and kept is not None,
        return_state=False,
    )
    d_leaving = _entering(pieces, (query, d_out), d_last, decay, transposed=True)
    backwards = {"pieces": pieces, "transposed": True}
    first = {"return_state": given is not None}
    if small:
        d_key, d_value, d_entering = mappable(linear_grad, **first)(
            (query, key, value, d_out),
            (d_leaving, _decay(log_decay, scale, GRAD_CHUNK)),
        )
    else:
        d_key, _ = _scan(
            *((value, d_out, query), d_leaving.mT, decay),
            **backwards,
            return_state=False,
        )
        d_value, d_entering = _scan(
            *((key, query, d_out), d_leaving, decay), **backwards, **first
        )
    if kept is None:
        d_log_decay = jnp.zeros_like(log_decay)
    elif by_kernel:
        tokens = query, key, value, d_out, *states
        sums, changes = mappable(linear_decay_grad)(tokens, (d_leaving.mT, decay))
        (last,) = kept
        after = 0.0 if last is None else (last * d_last).sum((2, 3))
        d_log_decay = _of_decay(sums, changes, after)
    else:
        batch = query.shape[0]
        whole = lambda state: jnp.broadcast_to(state, (batch, *state.shape[1:]))
        of_decay = lambda log_decay: xla.linear_attention(
            *(query, key, value, scale, log_decay, whole(entering[:, :, 0]), None),
            **_PLAIN,
        )
        pull = jax.vjp(of_decay, log_decay)[1]
        (d_log_decay,) = pull((d_out, whole(d_last)))
    d_scale = jnp.einsum("btnv,btnv->", out, d_out, preferred_element_type=jnp.float32)
    return (
        d_query,
        sum_of_groups(d_key, key),
        sum_of_groups(d_value, value),
        (d_scale / scale).astype(scale.dtype),
        d_log_decay,
        None if given is None else d_entering[:, :, 0],
    )


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normalized(pieces, query, key, value, scale, log_decay, initial_state):
    """The same, divided by the sums of weights; states have a last column for those."""
    operands = query, key, value, scale, log_decay, initial_state
    return _outputs_normalized(pieces, *operands)[0]


def _forward_normalized(pieces, *operands):
    outputs, (entering, total, rows, rest) = _outputs_normalized(
        pieces, *operands, keep_rest=True
    )
    return outputs, (*operands[:5], entering, outputs[0], rest, total, rows)


def _outputs_normalized(
    pieces, query, key, value, scale, log_decay, initial_state, *, keep_rest=False
):
    decay = _decay(log_decay, scale)
    entering = _entering(pieces, (key, value), initial_state, decay, counted=True)
    states, counted = _parted(entering)
    out, leaving, sums, total, rows, *rest = _scan(
        *((query, key, value), states, decay),
        counted=counted,
        pieces=pieces,
        keep_rest=keep_rest,
    )
    last = jnp.concatenate([leaving, sums[..., None]], -1)[:, :, -1]
    return (out, last), (entering, total, rows, *rest)


def _backward_normalized(pieces, residuals, cotangents):
    """Gradients of sums, values with a column of ones, and of their quotient."""
    query, key, value, scale, log_decay, entering, out, rest, total, rows = residuals
    d_out, d_last = cotangents
    decay = _decay(log_decay, scale)
    shares = jnp.swapaxes(inverse(total), 1, 2)
    d_sum = (d_out * shares[..., None]).astype(value.dtype)
    # Of rounded gradients but of whole outputs: their products with values, less this,
    # are what queries get, and where few tokens weigh most that is little.
    whole = out.astype(jnp.float32) + rest
    delta = jnp.sum(d_sum.astype(jnp.float32) * whole, -1)
    d_total = -jnp.swapaxes(delta, 1, 2)
    states, _ = _parted(entering)
    d_query, _ = _scan(
        *((d_sum, value, key), states.mT, decay),
        offset=Offset(d_total, rows),
        pieces=pieces,
        return_state=False,
    )
    d_leaving = _entering(
        *(pieces, (query, d_sum), d_last, decay),
        counted=True,
        by=d_total,
        transposed=True,
    )
    d_states, d_counted = _parted(d_leaving, d_total)
    run = mappable(
        lambda q, k, v, do, state, counted, decay: linear_grad(
            q, k, v, do, state, decay, counted
        )
    )
    d_key, d_value, d_entering, d_sums = run(
        (query, key, value, d_sum, d_states, d_counted),
        (_decay(log_decay, scale, GRAD_CHUNK),),
    )
    d_entering = jnp.concatenate([d_entering, d_sums[..., None]], -1)
    options: dict[str, Any] = {"reverse": False, "normalize": True}
    of_decay = lambda log_decay: xla.linear_attention(
        query, key, value, scale, log_decay, entering[:, :, 0], None, **options
    )
    (d_log_decay,) = jax.vjp(of_decay, log_decay)[1](cotangents)
    # What EPS leaves: else the scale cancels.
    d_scale = EPS * jnp.sum(delta)
    return (
        d_query,
        sum_of_groups(d_key, key),
        sum_of_groups(d_value, value),
        (d_scale / scale).astype(scale.dtype),
        d_log_decay,
        d_entering[:, :, 0],
    )


_normalized.defvjp(_forward_normalized, _backward_normalized)


def _parted(state, by=None):
    """A state without its last column, and that."""
    return state[..., :-1], Counted(state[..., -1], by)


def _no_state(query, value):
    """Zeros, one row for the whole batch."""
    shape = (1, *query.shape[2:], value.shape[-1])
    return jnp.zeros_like(query, jnp.float32, shape=shape)


def _scan(tokens, state, decay, counted=None, offset=None, **options):
    def run(query, key, value, counted, offset, state, decay):
        more = counted, offset
        return linear_scan(query, key, value, state, decay, *more, **options)

    return mappable(run)((*tokens, counted, offset), (state, decay))


def _entering(
    pieces, tokens, state, decay, *, counted=False, by=None, transposed=False
):
    """The states that enter the pieces, from the one that enters the first.

    `counted`, they have a last column, the sums of keys that count for `by`.
    """
    if pieces == 1:
        return state[:, :, None]
    shape = (*state.shape[:2], pieces - 1, *state.shape[2:])
    empty = jnp.broadcast_to(jnp.zeros_like(state)[:, :, None], shape)
    options = {"pieces": pieces, "transposed": transposed}
    if counted:
        empty, sums = _parted(empty, by)
        _, *added = _scan((None, *tokens), empty, decay, counted=sums, **options)
        added = jnp.concatenate([added[0], added[1][..., None]], -1)
    else:
        _, added = _scan((None, *tokens), empty, decay, **options)
    # The state, and what each piece adds to it, by the piece that it enters.
    first = jnp.broadcast_to(state, (added.shape[0], *state.shape[1:]))[:, :, None]
    parts = [added, first] if transposed else [first, added]
    parts = jnp.concatenate(parts, axis=2)
    total = decay.since[..., -1]
    total = jnp.broadcast_to(total, (*total.shape[:2], tokens[0].shape[1] // CHUNK))
    total = total.reshape(*total.shape[:2], pieces, -1).sum(-1)
    ages = jax.lax.cumsum(total, axis=2, reverse=transposed) - total
    ages = ages[..., :, None] - ages[..., None, :]
    seen = jnp.triu if transposed else jnp.tril
    weights = jnp.exp2(jnp.where(seen(jnp.ones(ages.shape[-2:], bool)), ages, -jnp.inf))
    weights = jnp.broadcast_to(weights, (*parts.shape[:2], pieces, pieces))
    return jnp.einsum("bnpr,bnrhv->bnphv", weights, parts, precision="highest")


def _decay(log_decay, scale, chunk_size=CHUNK) -> Decay:
    """Of log decays `[N]`, or `[B, T, N]`."""
    if log_decay.ndim == 1:
        log_decay = jnp.broadcast_to(log_decay[:, None], (*log_decay.shape, chunk_size))
        log_decay = log_decay[None, :, None]
    else:
        log_decay = jnp.swapaxes(log_decay, 1, 2)
        log_decay = log_decay.reshape(*log_decay.shape[:2], -1, chunk_size)
    return Decay(jnp.cumsum(log_decay * LOG2E, -1), scale[None])


def number_of_pieces(query: jax.Array) -> int:
    """As many pieces as fill the device, if need be at the price of padding."""
    batch, length, heads, _ = query.shape
    chunks = -(-length // CHUNK)
    most = max(1, min(_BLOCKS // (batch * heads), chunks // _MIN_CHUNKS))
    if most > 1 and chunks >= 2 * most * _LONG_CHUNKS:
        most *= 2
    even = max(n for n in range(1, most + 1) if chunks % n == 0)
    return even if 2 * even > most else most


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
    decay = _decay(jnp.maximum(log_decay, _LEAST), scale)
    shape = key.shape[0], heads, 1, key.shape[-1], value.shape[-1]
    empty = jnp.zeros_like(key, jnp.float32, shape=shape)
    options = {"pieces": 1, "transposed": transposed}
    _, leaving = _scan((None, key, value), empty, decay, **options)
    return leaving[:, :, 0]


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
