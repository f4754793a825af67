"""Linear attention over a sequence cut in pieces: a state for each goes round."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attnx._checks import expect
from attnx.linear import linear_attention as one_device
from attnx.linear.normalizer import append_ones, divide_by_last
from attnx.linear.operands import FORGET, by_token
from attnx.parallel.axes import AxisName, axis_size, from_neighbour


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

    Each device takes its piece from an empty state. Of each piece, its last state and
    its decay go to all devices, however many tokens it has (LASP-2, arXiv 2502.07563);
    what enters a piece follows from these, and is added to the outputs.

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
    pieces, here = axis_size(axis_name), jax.lax.axis_index(axis_name)
    expect(query.ndim == 4, "query", "[B, T, N, H]", query.shape)
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    scale = jnp.asarray(query.shape[-1] ** -0.5 if scale is None else scale, dtype)
    tokens = query, key, value
    if normalize:
        tokens = (x.astype(dtype) for x in (query, key, append_ones(value)))
    out, state = one_device(
        *tokens,
        log_decay=log_decay,
        scale=scale,
        segment_ids=segment_ids,
        reverse=reverse,
        implementation=implementation,
        return_state=True,
    )
    decay = by_token(log_decay, segment_ids, query, dtype, reverse, False)
    if segment_ids is not None:
        decay = _forget_others(decay, segment_ids, axis_name, reverse)
    since, total = _sums(decay, query.shape[1], reverse)
    # One array, so that one message a device is all.
    total = jnp.broadcast_to(total[..., None], (*state.shape[:-1], 1))
    piece = jnp.concatenate([state, total], -1)
    all_pieces = jax.lax.all_gather(piece, axis_name)
    if reverse:
        all_pieces, here = jnp.flip(all_pieces, 0), pieces - 1 - here

    def step(state, piece):
        return jnp.exp(piece[..., -1:]) * state + piece[..., :-1], state

    first = jnp.zeros_like(state)
    if initial_state is not None:
        first += initial_state
    last, entering = jax.lax.scan(step, first, all_pieces)
    entering = jax.lax.dynamic_index_in_dim(entering, here, keepdims=False)
    faded = scale * jnp.exp(since) * query.astype(dtype)
    out = out.astype(dtype) + jnp.einsum("btnh,bnhv->btnv", faded, entering)
    if normalize:
        out = divide_by_last(out)
    out = out.astype(query.dtype)
    return (out, last) if return_state else out


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


def _sums(log_decay, length, reverse):
    """Log decays up to each token, `[B or 1, T, N, H or 1]`, and of all tokens."""
    if log_decay.ndim == 1:
        age = jnp.arange(1, length + 1, dtype=log_decay.dtype)
        age = jnp.flip(age) if reverse else age
        return (age[:, None] * log_decay)[None, ..., None], (length * log_decay)[
            None, :, None
        ]
    log_decay = log_decay if log_decay.ndim == 4 else log_decay[..., None]
    since = jax.lax.cumsum(log_decay, axis=1, reverse=reverse)
    return since, since[:, 0 if reverse else -1]
