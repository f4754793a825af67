"""Linear attention over a sequence cut in pieces: a state for each goes round."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from attnx._checks import expect, expect_shape
from attnx._dispatch import varying_alike
from attnx.linear.normalizer import append_ones, divide_by_last
from attnx.linear.operands import (
    FORGET,
    by_token,
    check_decay,
    check_tokens,
    empty_state,
)
from attnx.linear.pieces import added, attend, cut_for
from attnx.parallel.axes import AxisName, axis_size, from_neighbour, side_by_side


def linear_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    axis_name: AxisName,
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
    """Computes `attnx.linear_attention` of a sequence that is cut over a mesh axis.

    What each piece adds to the state, and its decay, go to all devices, however many
    tokens it has (LASP-2, arXiv 2502.07563). What enters a piece follows from these,
    and then all are attended as on one device; the gradient goes the same way back.

    For the inside of `jax.shard_map`; `sharded(parallel.linear_attention)` takes whole
    arrays. Device i has the i-th piece.

    Args:
      query: `[B, T / P, N, H]`, this device's.
      key: `[B, T / P, K, H]`; K divides N.
      value: `[B, T / P, K, V]`.
      axis_name: the mesh axis that the tokens are cut over.
      log_decay: None, `[N]`, `[B, T / P, N]` or `[B, T / P, N, H]`.
      scale: multiplies the query, by default `H ** -0.5`.
      initial_state: `[B, N, H, V]`, or V + 1 with `normalize`: before the first token
        of the whole sequence, the same on all devices.
      segment_ids: integers `[B, T / P]`.
      reverse: run from the last token of the whole sequence to the first.
      normalize: divide by the sum of the weights.
      implementation: as in `attnx.linear_attention`, of a piece. With `normalize` a
        piece has V + 1 value columns, in float32.
      return_state: also return the state after the whole sequence, which all devices
        then have.

    Returns:
      As `attnx.linear_attention`, for this device's tokens.

    Raises:
      ValueError: arrays that do not fit, or an axis that there is not.
      NotImplementedError: an `implementation` that does not serve the call.

    Example:
      >>> import jax
      >>> from attnx import parallel
      >>> mesh = jax.make_mesh((1,), ("context",))
      >>> tokens = jax.NamedSharding(mesh, jax.P(None, "context"))
      >>> attend = parallel.sharded(parallel.linear_attention, sharding=tokens)
      >>> x = jax.random.normal(jax.random.key(0), (1, 64, 2, 16))
      >>> attend(x, x, x).shape
      (1, 64, 2, 16)
    """
    axis_size(axis_name)
    expect(query.ndim == 4, "query", "[B, T, N, H]", query.shape)
    state_size = query.shape[-1], value.shape[-1] + normalize
    check_tokens(query, key, value, initial_state, segment_ids, state_size)
    if log_decay is not None:
        check_decay(log_decay, query)
    dtype = jnp.promote_types(jnp.result_type(query, key, value), jnp.float32)
    scale = jnp.asarray(query.shape[-1] ** -0.5 if scale is None else scale, dtype)
    expect_shape("scale", scale, ())
    wanted, length = query.dtype, query.shape[1]
    tokens = [query, key, value]
    if normalize:
        tokens = [x.astype(dtype) for x in (query, key, append_ones(value))]
    first = empty_state(query, state_size[1], dtype)
    if initial_state is not None:
        first += initial_state

    decay = by_token(log_decay, segment_ids, query, dtype, reverse, False)
    if segment_ids is not None:
        decay = _forget_others(decay, segment_ids, axis_name, reverse)
    shape = (query.shape[0] * side_by_side(axis_name), *query.shape[1:])
    of_all = jax.ShapeDtypeStruct(shape, tokens[0].dtype)
    rows, unit = cut_for(implementation, of_all, *tokens[1:], decay)
    fill = -length % (rows * unit)
    if fill and decay.ndim == 1:
        decay = jnp.broadcast_to(decay, query.shape[:3])
    tokens += [decay] if decay.ndim > 1 else []
    if reverse:
        tokens = [jnp.flip(x, 1) for x in tokens]
    if fill:  # Keys that add nothing, and no decay.
        rest = lambda x: ((0, 0),) * (x.ndim - 2)
        tokens = [jnp.pad(x, ((0, 0), (0, fill), *rest(x))) for x in tokens]
    tokens = [x.reshape(-1, x.shape[1] // rows, *x.shape[2:]) for x in tokens]
    query, key, value, *by = tokens
    call = _Call(axis_name, rows, reverse, implementation)
    operands = query, key, value, scale, by[0] if by else decay, first
    out, last = _compiled(call, *varying_alike(operands))
    out = out.reshape(-1, out.shape[1] * rows, *out.shape[2:])[:, :length]
    out = jnp.flip(out, 1) if reverse else out
    if normalize:
        out = divide_by_last(out)
    out = out.astype(wanted)
    return (out, last) if return_state else out


@dataclasses.dataclass(frozen=True)
class _Call:
    """What of a call is not an array.

    Attributes:
      axis_name: the mesh axis.
      rows: that a device's tokens are cut into, each being a row of the batch.
      reverse: the first piece is the last device's.
      implementation: of a piece.
    """

    axis_name: AxisName
    rows: int
    reverse: bool
    implementation: str | None

    def states(self, key, value, scale, log_decay, first, *, transposed=False):
        """What enters each row of this device, and what leaves the last row of all.

        `transposed`, of queries and the outputs' gradients: the gradients of what
        leaves each row, and of what enters the first row of all.
        """
        parts = added(
            *(key, value, scale, log_decay),
            implementation=self.implementation,
            transposed=transposed,
        )
        parts = parts.reshape(-1, self.rows, *parts.shape[1:])
        if log_decay.ndim == 1:
            total = log_decay[None, None, :, None] * key.shape[1]
        else:
            total = log_decay.sum(1)
            total = total.reshape(-1, self.rows, total.shape[1], *total.shape[2:])
            total = total if total.ndim == 4 else total[..., None]
        total = jnp.broadcast_to(total, parts.shape[:-1])
        if transposed:
            parts, total = jnp.flip(parts, 1), jnp.flip(total, 1)
        size, here = axis_size(self.axis_name), jax.lax.axis_index(self.axis_name)
        own = _entering(jnp.zeros_like(first), parts, total, self.rows)
        # One array, so that one message a device is all.
        own = jnp.concatenate([own, total.sum(1)[..., None]], -1)
        pieces = jax.lax.all_gather(own, self.axis_name)
        if self.reverse != transposed:
            pieces, here = jnp.flip(pieces, 0), size - 1 - here
        pieces = jnp.moveaxis(pieces, 0, 1)
        pieces = pieces[..., :-1], pieces[..., -1]
        last, mine = (_entering(first, *pieces, at) for at in (size, here))
        entering = mine[:, None]
        if self.rows > 1:
            at = functools.partial(_entering, mine, parts, total)
            entering = jax.vmap(at, out_axes=1)(jnp.arange(self.rows))
        if transposed:
            entering = jnp.flip(entering, 1)
        return entering.reshape(-1, *entering.shape[2:]), last


def _entering(first, parts, total, at):
    """The state that enters piece `at`, of what pieces add, `[B, pieces, N, H, V]`.

    `first` enters piece 0, and `total` are their log decays `[B, pieces, N, H]`.
    """
    before = (jnp.arange(total.shape[1]) < at)[:, None, None]
    total = jnp.where(before, total, 0)
    since = jax.lax.cumsum(total, axis=1, reverse=True)
    # Not a difference, which would lose small decays beside large ones.
    after = jnp.pad(since[:, 1:], ((0, 0), (0, 1), (0, 0), (0, 0)))
    weights = jnp.where(before, jnp.exp(after), 0)
    faded = jnp.exp(since[:, 0])[..., None] * first
    return faded + (weights[..., None] * parts).sum(1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(call, query, key, value, scale, log_decay, first):
    """The outputs of a device's rows, and the state after the whole sequence."""
    entering, last = call.states(key, value, scale, log_decay, first)
    operands = query, key, value, scale, log_decay, entering
    return attend(*operands, implementation=call.implementation)[0], last


def _forward(call, *primals):
    query, key, value, scale, log_decay, first = (x.value for x in primals)
    entering, last = call.states(key, value, scale, log_decay, first)

    def rows(query, key, value, scale, entering, log_decay=log_decay):
        operands = query, key, value, scale, log_decay, entering
        return attend(*operands, implementation=call.implementation)

    operands = query, key, value, scale, entering
    # The gradient of decays costs much, so it is asked for only where it is wanted.
    operands += (log_decay,) if primals[4].perturbed else ()
    (out, _), pull = jax.vjp(rows, *operands)
    return (out, last), (pull, query, scale, log_decay, first)


def _backward(call, residuals, cotangents):
    pull, query, scale, log_decay, first = residuals
    d_out, d_last = cotangents
    if isinstance(d_out, SymbolicZero):
        d_out = jnp.zeros_like(query, shape=d_out.shape)
    d_final = jnp.zeros_like(first)
    if not isinstance(d_last, SymbolicZero):  # All devices have the last state.
        d_final += jax.lax.psum(d_last, call.axis_name)
    d_leaving, d_first = call.states(
        query, d_out, scale, log_decay, d_final, transposed=True
    )
    d_query, d_key, d_value, d_scale, _, *d_decay = pull((d_out, d_leaving))
    d_decay = d_decay[0] if d_decay else jnp.zeros_like(log_decay)
    # All devices are given the first state, and one of them has its gradient.
    size, here = axis_size(call.axis_name), jax.lax.axis_index(call.axis_name)
    d_first = jnp.where(here == (size - 1 if call.reverse else 0), d_first, 0)
    return d_query, d_key, d_value, d_scale, d_decay, d_first


_attention.defvjp(_forward, _backward, symbolic_zeros=True)
# Symbolic zeros are there where programs are traced; a `jax.shard_map` outside of one
# runs its operations at once.
_compiled = jax.jit(_attention, static_argnums=0)


def _forget_others(log_decay, segment_ids, axis_name, reverse):
    """Forgets what enters where the piece before ends with another document."""
    first, last, steps = (-1, 0, -1) if reverse else (0, -1, 1)
    before = from_neighbour(axis_name, segment_ids[:, last], steps)
    here, pieces = jax.lax.axis_index(axis_name), axis_size(axis_name)
    # The initial state belongs to the first document.
    other = (before != segment_ids[:, first]) & (here != (pieces - 1 if reverse else 0))
    other = other.reshape(-1, *[1] * (log_decay.ndim - 2))
    entering = jnp.where(other, FORGET, log_decay[:, first])
    return log_decay.at[:, first].set(entering)
