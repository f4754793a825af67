"""Heads that take turns, so that memory holds what attention needs for a few."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from attnx._checks import is_traced

# Pairs of rows and blocks attended at a time, if one head has no more; and those of one
# run of tiles where heads take turns.
_PAIRS = 1 << 19
# How many runs a head may take, at most: each is a part of the program.
_RUNS = 16


def by_heads(attend, arrays, lists, shared, *, pairs):
    """Calls `attend` for so many heads at a time as memory should hold the parts of.

    Nothing that it computes is kept for the gradient but the result, by which it can
    tell what each pair weighs.

    Args:
      attend: `(query, key, value, *, lists, shared, shares, known) -> output,
        log-sum-exp`, of some heads. `shares` are those of its parts to hold at a time.
        With `known`, what it returned before, it returns that, with its gradient.
      arrays: query, key and value; heads are the last axis but one, in the output too.
      lists: a pytree of arrays, of which heads are the second axis. No gradient.
      shared: a tuple of pytrees, the same for all heads. No gradient.
      pairs: of rows of one query head and blocks, in the whole batch.

    Returns:
      The output and the log-sum-exp.
    """
    heads, key_heads = (x.shape[-2] for x in arrays[:2])
    pairs *= heads // key_heads
    at_once = max(
        n
        for n in range(1, key_heads + 1)
        if key_heads % n == 0 and (n == 1 or n * pairs <= _PAIRS)
    )
    shares = (1,)
    if at_once < key_heads or pairs > _PAIRS:
        # The first also holds what is beside, so it is smaller.
        runs = min(max(2, -(-at_once * pairs // _PAIRS)), _RUNS)
        shares = (7, *(9,) * (runs - 1))
    # What is known stays so: it is no argument of the program then.
    fixed = tuple(None if is_traced(x) else x for x in shared)
    given = tuple(x if is_traced(x) else None for x in shared)
    attend = functools.partial(attend, shares=shares)
    turns = _Turns(attend, key_heads // at_once, fixed)
    return _in_turn(turns, arrays, lists, given)


@dataclasses.dataclass(frozen=True, eq=False)
class _Turns:
    """How heads take turns: in how many steps, and what is not an array.

    `fixed` is what `by_heads` calls `shared`, with None for what is an array.
    """

    attend: Callable
    steps: int
    fixed: tuple

    def run(self, body, carry, arrays, lists, given):
        """Runs `body(heads of arrays, attend)` a step, and writes what it gives.

        `carry()` makes what is written to.
        """
        pairs = zip(given, self.fixed, strict=True)
        shared = tuple(x if y is None else y for x, y in pairs)
        attend = functools.partial(self.attend, shared=shared)
        if self.steps == 1:
            return body(arrays, functools.partial(attend, lists=lists))
        axis = arrays[0].ndim - 2

        def step(i, carry):
            def part(x, axis):
                size = x.shape[axis] // self.steps
                return jax.lax.dynamic_slice_in_dim(x, i * size, size, axis)

            chosen = jax.tree.map(lambda x: part(x, 1), lists)
            found = body(
                [part(x, axis) for x in arrays], functools.partial(attend, lists=chosen)
            )
            write = jax.lax.dynamic_update_slice_in_dim
            return tuple(
                write(x, y, i * y.shape[axis], axis)
                for x, y in zip(carry, found, strict=True)
            )

        return jax.lax.fori_loop(0, self.steps, step, tuple(carry()))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_turn(turns, arrays, lists, given):
    query, _, value = arrays

    def carry():
        # Made from the query, so as to be laid out over devices as it is.
        zero = jnp.zeros_like(query[..., :1])
        out = jnp.broadcast_to(zero, (*zero.shape[:-1], value.shape[-1]))
        return out, zero[..., 0].astype(jnp.promote_types(query.dtype, jnp.float32))

    run = lambda heads, attend: attend(*heads, known=None)
    return turns.run(run, carry, arrays, lists, given)


def _in_turn_forward(turns, *operands):
    known = _in_turn(turns, *operands)
    return known, (*operands, known)


def _in_turn_backward(turns, residuals, grads):
    arrays, lists, given, known = residuals

    def run(heads, attend):
        known, grads = tuple(heads[3:5]), tuple(heads[5:])
        return jax.vjp(functools.partial(attend, known=known), *heads[:3])[1](grads)

    carry = lambda: map(jnp.zeros_like, arrays)
    found = turns.run(run, carry, (*arrays, *known, *grads), lists, given)
    return tuple(found), None, None


_in_turn.defvjp(_in_turn_forward, _in_turn_backward)
