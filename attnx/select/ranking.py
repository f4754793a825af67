"""The best of very many numbers, without sorting them."""

from __future__ import annotations

import jax
import jax.numpy as jnp


@jax.jit
def best_of(ranked, count):
    """The `count` best of `[..., size]`, bool; of equals those that come first."""
    count = jnp.asarray(count)
    last = _largest(lambda value: _sums(ranked >= value[..., None]) >= count, ranked)
    return _first_of(ranked, last, count)


@jax.jit
def heaviest(ranked, wanted, *, least, most):
    """The best of `[..., size]` up to where their sum comes to `wanted`, bool.

    At least `least` and at most `most` of them. No number is negative but -inf, which,
    like inf, adds nothing to the sum.
    """

    def holds(value):
        seen = ranked >= value[..., None]
        count = _sums(seen)
        total = _sums(jnp.where(seen & jnp.isfinite(ranked), ranked, 0))
        return (count >= most) | (total >= wanted) & (count >= least)

    last = _largest(holds, ranked)
    above, equal = _beside(ranked, last)
    # Of equals as many as the sum needs: all, if they are 0 or nothing is enough.
    ties = _sums(equal)
    rest = wanted - _sums(jnp.where(above & jnp.isfinite(ranked), ranked, 0))
    weighs = jnp.isfinite(last) & (last > 0)
    few = jnp.ceil(rest / jnp.where(weighs, last, 1))
    few = jnp.minimum(few, 2.0**30).astype(jnp.int32)
    few = jnp.where(weighs, jnp.clip(few, 0, ties), jnp.where(rest > 0, ties, 0))
    count = jnp.minimum(jnp.maximum(_sums(above) + few, least), most)
    return _first_of(ranked, last, count)


def _first_of(ranked, last, count):
    """What is above `last`, and of its equals the first, `count` in all."""
    above, equal = _beside(ranked, last)
    left = count - _sums(above)
    return above | equal & (running_sum(equal) <= left[..., None])


def _beside(ranked, last):
    return ranked > last[..., None], ranked == last[..., None]


def _sums(x):
    return x.sum(-1, dtype=jnp.int32 if x.dtype == bool else x.dtype)


def _largest(holds, like):
    """The largest float of which `holds(value)`, or -inf, two bits at a time.

    It holds of all smaller ones too. The floats are `[...]`, one for each row of
    `like`, `[..., size]`.
    """
    bits = jnp.finfo(like.dtype).bits
    dtype = jnp.dtype(f"uint{bits}")
    top = jnp.array(1 << (bits - 1), dtype)

    def float_of(order):
        """Floats have the order of these integers."""
        x = jnp.where(order >= top, order ^ top, ~order)
        return jax.lax.bitcast_convert_type(x, like.dtype)

    def step(i, order):
        shift = (bits - 2 - 2 * i).astype(dtype)
        base = order
        # Three questions, which the compiler asks in one pass over the numbers.
        for digit in (1, 2, 3):
            more = base | jnp.left_shift(jnp.array(digit, dtype), shift)
            value = float_of(more)
            order = jnp.where(holds(value) & ~jnp.isnan(value), more, order)
        return order

    start = jnp.zeros_like(like[..., 0], dtype)
    last = float_of(jax.lax.fori_loop(0, bits // 2, step, start))
    return jnp.where(jnp.isnan(last), -jnp.inf, last)


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
