"""A sequence in pieces, side by side, and the scans that this takes.

What each piece adds to the state is summed first, and the states that enter the pieces
are sums of that (arXiv 2401.04658 with section 4.2 of arXiv 2312.06635).
"""

from __future__ import annotations

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


def number_of_pieces(query: jax.Array) -> int:
    """As many pieces as fill the device, if need be at the price of padding."""
    batch, length, heads, _ = query.shape
    chunks = -(-length // CHUNK)
    most = max(1, min(_BLOCKS // (batch * heads), chunks // _MIN_CHUNKS))
    even = max(n for n in range(1, most + 1) if chunks % n == 0)
    return even if 2 * even > most else most


def scan(tokens, state, decay, counted=None, offset=None, **options):
    """`linear_scan`, which `vmap` may map; `tokens` are query, key and value."""

    def run(query, key, value, counted, offset, state, decay):
        more = counted, offset
        return linear_scan(query, key, value, state, decay, *more, **options)

    return mappable(run)((*tokens, counted, offset), (state, decay))


def entering_states(
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
        empty, sums = parted(empty, by)
        _, *added = scan((None, *tokens), empty, decay, counted=sums, **options)
        added = jnp.concatenate([added[0], added[1][..., None]], -1)
    else:
        _, added = scan((None, *tokens), empty, decay, **options)
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
