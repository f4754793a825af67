"""The best of very many numbers, without sorting them."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def best_of(ranked, count):
    """The `count` best of `[..., size]`, bool; of equals those that come first."""
    order = _ordered(ranked)
    count = jnp.asarray(count)
    last = _largest(order, lambda x: x.sum(-1) >= count)[..., None]
    above, equal = order > last, order == last
    left = count - above.sum(-1)
    return above | equal & (running_sum(equal) <= left[..., None])


def reach(ranked, mass, wanted):
    """How many of the best are begun before their mass comes to what is wanted."""
    order = _ordered(ranked)
    sum_of = lambda x: jnp.where(x, mass, 0).sum(-1)
    last = _largest(order, lambda x: sum_of(x) >= wanted)
    above, equal = order > last[..., None], order == last[..., None]
    each = jnp.max(jnp.where(equal, mass, 0), -1)
    rest = wanted - sum_of(above)
    ties = jnp.ceil(rest / jnp.where(each > 0, each, 1))
    ties = jnp.where(each > 0, ties, jnp.where(rest > 0, jnp.inf, 0))
    return above.sum(-1) + jnp.minimum(ties, equal.sum(-1)).astype(jnp.int32)


def _ordered(x):
    """Floats as unsigned integers in the same order."""
    x = x + 0  # -0 and 0 are equal.
    bits = jnp.finfo(x.dtype).bits
    dtype = jnp.dtype(f"uint{bits}")
    top = jnp.array(1 << (bits - 1), dtype)
    x = jax.lax.bitcast_convert_type(x, dtype)
    return jnp.where(x >= top, ~x, x | top)


def _largest(order, holds):
    """The largest value of which `holds(order >= value)`, or 0, two bits at a time."""
    bits = jnp.iinfo(order.dtype).bits

    def step(i, value):
        shift = (bits - 2 - 2 * i).astype(order.dtype)
        base = value
        # Three questions, which the compiler asks in one pass over the numbers.
        for digit in (1, 2, 3):
            more = base | jnp.left_shift(jnp.array(digit, order.dtype), shift)
            value = jnp.where(holds(order >= more[..., None]), more, value)
        return value

    start = jnp.zeros_like(order[..., 0])
    return jax.lax.fori_loop(0, bits // 2, step, start)


def running_sum(x):
    """The inclusive sums of bool `[..., size]`, in two levels."""
    size = x.shape[-1]
    width = 1 << (max(size - 1, 1).bit_length() // 2)
    pad = [(0, 0)] * (x.ndim - 1) + [(0, -size % width)]
    x = jnp.pad(x, pad).reshape(*x.shape[:-1], -1, width).astype(jnp.int32)
    inner = jnp.cumsum(x, -1)
    outer = jnp.cumsum(inner[..., -1], -1)
    sums = inner + (outer - inner[..., -1])[..., None]
    return sums.reshape(*x.shape[:-2], -1)[..., :size]
