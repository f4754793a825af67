"""A sequence in pieces, side by side, and the scans that this takes.

What each piece adds to the state is summed first, and the states that enter the pieces
are sums of that (arXiv 2401.04658 with section 4.2 of arXiv 2312.06635).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.batching import mappable
from pallas_kernels.chunks import CHUNK
from pallas_kernels.linear_attention import Counted, Decay, linear_scan
from pallas_kernels.mosaic import LOG2E

# Streaming multiprocessors of an H100: a block of threads fills one.
_BLOCKS = 132
# Shorter pieces spend more on their states than they gain.
_MIN_CHUNKS = 4
# What a piece adds to the state may be summed in so many parts, of so many chunks at
# least: heads that forget read little of it, and those that do not are left alone.
_PARTS, _PART_CHUNKS = 4, 32


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
    chunks = tokens[0].shape[1] // CHUNK
    most = min(_PARTS, chunks // pieces // _PART_CHUNKS)
    parts = max(n for n in range(1, max(most, 1) + 1) if chunks // pieces % n == 0)
    served = (pieces - 1) * parts
    shape = (*state.shape[:2], served, *state.shape[2:])
    empty = jnp.broadcast_to(jnp.zeros_like(state)[:, :, None], shape)
    options = {"pieces": pieces * parts, "parts": parts, "transposed": transposed}
    if counted:
        empty, sums = parted(empty, by)
        _, *added = scan((None, *tokens), empty, decay, counted=sums, **options)
        added = jnp.concatenate([added[0], added[1][..., None]], -1)
    else:
        _, added = scan((None, *tokens), empty, decay, **options)
    # The state, and what each part adds to it, by the part that it enters: from the
    # first of the first piece on, or if transposed to the last of the last one.
    first = jnp.broadcast_to(state, (added.shape[0], *state.shape[1:]))[:, :, None]
    sums = jnp.concatenate([added, first] if transposed else [first, added], axis=2)
    total = decay.since[..., -1]
    total = jnp.broadcast_to(total, (*total.shape[:2], chunks))
    total = total.reshape(*total.shape[:2], pieces * parts, -1).sum(-1)
    ages = jax.lax.cumsum(total, axis=2, reverse=transposed) - total
    ages = ages[..., parts - 1 :] if transposed else ages[..., : served + 1]
    ages = ages[..., ::parts, None] - ages[..., None, :]
    seen = jnp.triu if transposed else jnp.tril
    seen = seen(jnp.ones((served + 1, served + 1), bool))[::parts]
    weights = jnp.exp2(jnp.where(seen, ages, -jnp.inf))
    weights = jnp.broadcast_to(weights, (*sums.shape[:2], *weights.shape[2:]))
    return jnp.einsum("bnpr,bnrhv->bnphv", weights, sums, precision="highest")


def parted(state, by=None):
    """A state without its last column, and that."""
    return state[..., :-1], Counted(state[..., -1], by)


def decay_of(log_decay, scale, chunk_size=CHUNK) -> Decay:
    """Of log decays `[N]`, or `[B, T, N]`."""
    if log_decay.ndim == 1:
        log_decay = jnp.broadcast_to(log_decay[:, None], (*log_decay.shape, chunk_size))
        log_decay = log_decay[None, :, None]
    else:
        log_decay = jnp.swapaxes(log_decay, 1, 2)
        log_decay = log_decay.reshape(*log_decay.shape[:2], -1, chunk_size)
    return Decay(jnp.cumsum(log_decay * LOG2E, -1), scale[None])
