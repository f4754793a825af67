"""The best of very many numbers, without sorting them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attnx.select.bits import counts, first_marks, pack, running_sum

# Bits found in one pass over the numbers, by as many questions as they have values:
# where numbers are counted, and where they are summed as well.
_COUNTED, _SUMMED = 3, 2
# Parts in which numbers are summed up, at most.
_PARTS = 1024


@jax.jit
def best_of(ranked, count):
    """The `count` best of `[..., T, n]`, packed; of equals those that come first."""
    count = jnp.asarray(count)

    def holds(values):
        [found] = _sums([_reach(ranked, value) for value in values])
        return found >= count

    return _first_of(ranked, _largest(holds, ranked, _COUNTED), count)


@jax.jit
def heaviest(ranked, wanted, *, least, most):
    """The best of `[..., T, n]` up to where their sum comes to `wanted`, packed.

    At least `least` and at most `most` of them. No number is negative but -inf, which,
    like inf, adds nothing to the sum.
    """

    def holds(values):
        # To make weights in each pass is faster than to read them, and to compare anew
        # for each sum than to keep what counts and sums would share.
        now, values = jax.lax.optimization_barrier((ranked, values))
        weights = _weights(now)
        count, total = _sums(
            [_reach(now, value) for value in values],
            [jnp.where(_reach(weights, value), weights, 0) for value in values],
        )
        return (count >= most) | (total >= wanted) & (count >= least)

    last = _largest(holds, ranked, _SUMMED)
    above, equal = _beside(ranked, last)
    # Of equals as many as the sum needs: all, if they are 0 or nothing is enough.
    ties = equal.sum((-2, -1), dtype=jnp.int32)
    rest = wanted - jnp.where(above, _weights(ranked), 0).sum((-2, -1))
    weighs = jnp.isfinite(last) & (last > 0)
    few = jnp.ceil(rest / jnp.where(weighs, last, 1))
    few = jnp.minimum(few, 2.0**30).astype(jnp.int32)
    few = jnp.where(weighs, jnp.clip(few, 0, ties), jnp.where(rest > 0, ties, 0))
    count = above.sum((-2, -1), dtype=jnp.int32) + few
    return _first_of(ranked, last, jnp.minimum(jnp.maximum(count, least), most))


def _first_of(ranked, last, count):
    """What is above `last`, and of its equals the first, `count` in all."""
    above, equal = map(pack, _beside(ranked, last))
    left = count - counts(above).sum(-1)
    ties = counts(equal)
    left = left[..., None] - (running_sum(ties) - ties)
    return above | first_marks(equal, left, ranked.shape[-1])


def _weights(ranked):
    return jnp.where(jnp.isfinite(ranked), ranked, 0)


def _reach(ranked, value):
    return ranked >= value[..., None, None]


def _beside(ranked, last):
    last = last[..., None, None]
    return ranked > last, ranked == last


def _sums(*terms):
    """The sums of lists of `[..., T, n]`, `[m, ...]` for a list of m.

    All are summed in one pass, part by part, and the parts of a list in another.
    """
    rows = terms[0][0].shape[-2]
    count = max(n for n in range(1, min(rows, _PARTS) + 1) if rows % n == 0)

    def parts(x):
        dtype = jnp.int32 if x.dtype == bool else x.dtype
        return x.reshape(*x.shape[:-2], count, -1).sum(-1, dtype=dtype)

    return [jnp.stack([parts(x) for x in each]).sum(-1) for each in terms]


def _largest(holds, like, digit):
    """The largest float of which `holds`, or -inf, a digit of so many bits at a time.

    It holds of all smaller ones too. The floats are `[...]`, one for each `[T, n]` of
    `like`; `holds` is asked about several, `[m, ...]`.
    """
    bits = jnp.finfo(like.dtype).bits
    dtype = jnp.dtype(f"uint{bits}")
    top = jnp.array(1 << (bits - 1), dtype)

    def float_of(order):
        """Floats have the order of these integers."""
        x = jnp.where(order >= top, order ^ top, ~order)
        return jax.lax.bitcast_convert_type(x, like.dtype)

    def step(i, order):
        # The last digit may begin with bits that are known: what holds stays the same.
        shift = jnp.maximum(bits - digit * (1 + i), 0).astype(dtype)
        digits = jnp.arange(1, 1 << digit, dtype=dtype)
        more = order | (digits << shift).reshape(-1, *[1] * order.ndim)
        values = float_of(more)
        held = holds(values) & ~jnp.isnan(values)
        return jnp.where(held, more, order).max(0)

    order = jnp.zeros(like.shape[:-2], dtype)
    last = float_of(jax.lax.fori_loop(0, -(-bits // digit), step, order))
    return jnp.where(jnp.isnan(last), -jnp.inf, last)
