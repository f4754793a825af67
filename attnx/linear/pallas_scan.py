"""A sequence in pieces, side by side, and the scans that this takes.

What each piece adds to the state is summed first, and the states that enter the pieces
are sums of that (arXiv 2401.04658 with section 4.2 of arXiv 2312.06635).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from attnx._groups import sum_of_groups
from pallas_kernels.batching import mappable
from pallas_kernels.chunks import CHUNK
from pallas_kernels.linear_attention import Counted, Decay, linear_scan
from pallas_kernels.mosaic import LOG2E

# Streaming multiprocessors of an H100: a block of threads fills one.
_BLOCKS = 132
# Shorter pieces spend more on their states than they gain.
_MIN_CHUNKS = 4
# What a shorter part of a piece saves is less than its state is to write and to read.
_LEAST_CHUNKS = 32
# Tokens that weigh less than this to the last one's 1, as a power of 2, are not read:
# unless they are 2^8 times as large, float32 rounds them away, and unless they are 2^24
# times as large, the outputs' bfloat16.
_FORGOTTEN = -32.0


def number_of_pieces(query: jax.Array) -> int:
    """As many pieces as fill the device, if need be at the price of padding."""
    batch, length, heads, _ = query.shape
    chunks = -(-length // CHUNK)
    most = max(1, min(_BLOCKS // (batch * heads), chunks // _MIN_CHUNKS))
    even = max(n for n in range(1, most + 1) if chunks % n == 0)
    return even if 2 * even > most else most


def scan(tokens, state, decay, counted=None, offset=None, spans=None, **options):
    """`linear_scan`, which `vmap` may map; `tokens` are query, key and value."""

    def run(query, key, value, counted, offset, state, decay, spans):
        more = counted, offset, spans
        return linear_scan(query, key, value, state, decay, *more, **options)

    return mappable(run)((*tokens, counted, offset), (state, decay, spans))


def entering_states(
    pieces, tokens, state, decay, *, counted=False, by=None, transposed=False
):
    """The states that enter the pieces, from the one that enters the first.

    That may be None for 0. `counted`, states have a last column, the sums of keys that
    count for `by`.
    """
    if pieces == 1:
        return no_state(tokens, decay) if state is None else state[:, :, None]
    served = slice(1, None) if transposed else slice(pieces - 1)
    counted = Counted(None, by) if counted else None
    options = {"counted": counted, "transposed": transposed}
    added, until = added_states(pieces, tokens, decay, served, **options)
    # What enters piece `to` has decayed over those between it and the piece that added
    # it; the first state comes from before the first piece.
    of = jnp.arange(pieces + 1) - (not transposed)
    to, of, over = jnp.ix_(jnp.arange(pieces), of, jnp.arange(pieces))
    if transposed:
        to, of, over = -to, -of, -over
    totals = _totals(tokens, decay, pieces).sum(-1)
    ages = jnp.where((of < over) & (over < to), totals[..., None, None, :], 0.0).sum(-1)
    ages = jnp.where((of < to)[..., 0], ages, -jnp.inf)
    weights = ages[..., 1:-1, None] + until[..., None, :, :]
    weights = weights.reshape(*weights.shape[:3], -1)
    entering = summed("bnps,bnshv->bnphv", weights, added)
    if state is not None:
        first = jnp.exp2(ages[..., -1 if transposed else 0])[..., None, None]
        entering += first * state[:, :, None]
    return entering


def added_states(
    pieces, tokens, decay, served=slice(None), *, counted=None, transposed=False
):
    """What the pieces `served` add to the state, in parts that are yet to be summed.

    Returns:
      What the parts add, `[B, N, pieces * parts, H, V]`, and the base-2 logarithm of
      the decay from there to the end of the piece, `[B or 1, N, pieces, parts]`.
    """
    totals = _totals(tokens, decay, pieces)[:, :, served]
    blocks = tokens[0].shape[0] * math.prod(totals.shape[1:3])
    parts = min(2 * _BLOCKS // blocks, totals.shape[-1] // _LEAST_CHUNKS)
    spans, until = _spans(totals, max(1, parts), transposed)
    first = jnp.arange(pieces)[served, None, None] * totals.shape[-1]
    spans = (first + spans).reshape(*spans.shape[:2], -1, 2)
    operands = (None, *tokens), None, decay, counted
    _, added, *sums = scan(*operands, spans=spans, transposed=transposed)
    if counted:
        added = jnp.concatenate([added, sums[0][..., None]], -1)
    return added, until


def summed(equation, weights, states):
    """An einsum of states in float32, by base-2 logarithms of weights."""
    weights = jnp.exp2(weights)
    weights = jnp.broadcast_to(weights, (states.shape[0], *weights.shape[1:]))
    return jnp.einsum(equation, weights, states, precision="highest")


def no_state(tokens, decay):
    """Zeros that enter the one piece, a row for the whole batch."""
    key, value = tokens
    shape = 1, decay.since.shape[1], 1, key.shape[-1], value.shape[-1]
    return jnp.zeros_like(decay.since, shape=shape)


def parted(state, by=None):
    """A state without its last column, and that."""
    return state[..., :-1], Counted(state[..., -1], by)


def to_operands(operands, d_tokens, d_scale, d_log_decay, d_entering):
    """Gradients of query, key, value, scale, decay and initial state, as these are.

    `operands` are key, value and scale; `d_tokens` have a head of keys for each of the
    queries; `d_entering` is of the states that enter the pieces, or None.
    """
    key, value, scale = operands
    d_query, d_key, d_value = d_tokens
    return (
        d_query,
        sum_of_groups(d_key, key),
        sum_of_groups(d_value, value),
        d_scale.astype(scale.dtype),
        d_log_decay,
        None if d_entering is None else d_entering[:, :, 0],
    )


def decay_of(log_decay, scale, chunk_size=CHUNK) -> Decay:
    """Of log decays `[N]`, or `[B, T, N]`."""
    if log_decay.ndim == 1:
        log_decay = jnp.broadcast_to(log_decay[:, None], (*log_decay.shape, chunk_size))
        log_decay = log_decay[None, :, None]
    else:
        log_decay = jnp.swapaxes(log_decay, 1, 2)
        log_decay = log_decay.reshape(*log_decay.shape[:2], -1, chunk_size)
    return Decay(jnp.cumsum(log_decay * LOG2E, -1), scale[None])


def _totals(tokens, decay, pieces):
    """Base-2 log decays of whole chunks, `[B or 1, N, pieces, chunks]`."""
    total = decay.since[..., -1]
    shape = *total.shape[:2], tokens[0].shape[1] // CHUNK
    return jnp.broadcast_to(total, shape).reshape(*shape[:2], pieces, -1)


def _spans(totals, parts, transposed):
    """Equal parts of what pieces do not forget before they end, or if transposed start.

    Returns:
      The first chunk of each part and the one after its last, counted in its piece,
      int32 `[B or 1, N, pieces, parts, 2]`, and the base-2 logarithm of the decay from
      there to the piece's end.
    """
    chunks = totals.shape[-1]
    if transposed:
        totals = jnp.flip(totals, -1)
    # What remains of a state after so many chunks, to the end.
    ages = jax.lax.cumsum(totals, axis=3, reverse=True)
    ages = jnp.pad(ages, ((0, 0), (0, 0), (0, 0), (0, 1)))
    first = (ages[..., 1:] < _FORGOTTEN).sum(-1, dtype=jnp.int32)[..., None]
    ends = first + (chunks - first) * jnp.arange(parts + 1) // parts
    until = jnp.take_along_axis(ages, ends[..., 1:], -1)
    spans = jnp.stack([ends[..., :-1], ends[..., 1:]], -1)
    return (chunks - jnp.flip(spans, -1) if transposed else spans), until
