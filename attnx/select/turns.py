"""Heads that take turns, so that memory holds what attention needs for a few."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from attnx._checks import is_traced

# Pairs of rows and blocks attended at a time, if one head has no more. Where heads take
# turns one run of tiles has a third more, or twice as many if these copy no tokens.
_PAIRS = 1 << 19
# How many runs a head may take, at most: each is a part of the program.
_RUNS = 16


@dataclasses.dataclass(frozen=True)
class Turn:
    """Which heads' turn it is.

    Attributes:
      number: of the turn.
      steps: turns in all.
      axis: of the heads in tokens.
    """

    number: jax.Array | int = 0
    steps: int = 1
    axis: int = 2

    def of(self, x: jax.Array, axis: int | None = None) -> jax.Array:
        """The heads whose turn it is, of an array of tokens, or along another axis."""
        if self.steps == 1:
            return x
        axis = self.axis if axis is None else axis
        size = x.shape[axis] // self.steps
        return jax.lax.dynamic_slice_in_dim(x, self.number * size, size, axis)

    def head(self, count: int) -> jax.Array | None:
        """The number of the first of so many heads a turn; None if all take it."""
        return None if self.steps == 1 else jnp.asarray(self.number * count, jnp.int32)


def by_heads(attend, arrays, lists, shared, *, pairs, begin=None):
    """Calls `attend` for so many heads at a time as memory should hold the parts of.

    Nothing that it computes is kept for the gradient but the result, by which it can
    tell what each pair weighs.

    Args:
      attend: `(query, key, value, *, lists, shared, shares, known, rest, turn) ->
        output, log-sum-exp`, of some heads. `shares` are those of its parts to hold at
        a time. With `known`, what it returned before, it returns that, with its
        gradient, and is given the tokens of these heads, as the lists always are.
        Otherwise it is given all, and `turn` says which are meant.
      arrays: query, key and value; heads are the last axis but one, in the output too.
      lists: a pytree of arrays, of which heads are the second axis. No gradient.
      shared: a tuple of pytrees, the same for all heads. No gradient.
      pairs: of rows of one query head and blocks, in the whole batch.
      begin: `(query, key, value, shared) -> output, log-sum-exp` of what all heads
        attend to beside, or None. It takes the place of the result until a head's turn,
        which has its part as `rest`; `attend` without it has it to do itself.

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
    most = 4 * _PAIRS // 3 if begin is None else 2 * _PAIRS
    if at_once < key_heads or pairs > most:
        # The first also holds what is beside, so it is smaller.
        runs = min(-(-at_once * pairs // most), _RUNS)
        shares = (7, *(9,) * (runs - 1))
    # What is known stays so: it is no argument of the program then.
    fixed = tuple(None if is_traced(x) else x for x in shared)
    given = tuple(x if is_traced(x) else None for x in shared)
    attend = functools.partial(attend, shares=shares)
    turns = _Turns(attend, key_heads // at_once, fixed, begin)
    return _in_turn(turns, arrays, lists, given)


@dataclasses.dataclass(frozen=True, eq=False)
class _Turns:
    """How heads take turns: in how many steps, and what is not an array.

    `fixed` is what `by_heads` calls `shared`, with None for what is an array.
    """

    attend: Callable
    steps: int
    fixed: tuple
    begin: Callable | None

    def shared(self, given):
        pairs = zip(given, self.fixed, strict=True)
        return tuple(x if y is None else y for x, y in pairs)

    def run(self, body, carry, axis, lists, given):
        """Runs `body(turn, attend, what was written)` a step, and writes what it gives.

        `carry()` makes what is written to.
        """
        attend = functools.partial(self.attend, shared=self.shared(given))

        def step(i, carry):
            turn = Turn(i, self.steps, axis)
            chosen = jax.tree.map(lambda x: turn.of(x, 1), lists)
            found = body(turn, functools.partial(attend, lists=chosen), carry)
            if self.steps == 1:
                return tuple(found)
            write = jax.lax.dynamic_update_slice_in_dim
            return tuple(
                write(x, y, i * y.shape[axis], axis)
                for x, y in zip(carry, found, strict=True)
            )

        if self.steps == 1:
            return step(0, carry() if self.begin else None)
        return jax.lax.fori_loop(0, self.steps, step, tuple(carry()))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_turn(turns, arrays, lists, given):
    query, _, value = arrays

    def carry():
        if turns.begin is not None:
            return turns.begin(*arrays, turns.shared(given))
        # Made from the query, so as to be laid out over devices as it is.
        zero = jnp.zeros_like(query[..., :1])
        out = jnp.broadcast_to(zero, (*zero.shape[:-1], value.shape[-1]))
        return out, zero[..., 0].astype(jnp.promote_types(query.dtype, jnp.float32))

    def run(turn, attend, carry):
        rest = None
        if turns.begin is not None:
            rest = tuple(turn.of(x) for x in carry)
        return attend(*arrays, known=None, rest=rest, turn=turn)

    return turns.run(run, carry, query.ndim - 2, lists, given)


def _in_turn_forward(turns, *operands):
    known = _in_turn(turns, *operands)
    return known, (*operands, known)


def _in_turn_backward(turns, residuals, grads):
    arrays, lists, given, known = residuals
    turns = dataclasses.replace(turns, begin=None)

    def run(turn, attend, _):
        own, part, cotangents = (
            tuple(turn.of(x) for x in some) for some in (arrays, known, grads)
        )
        attend = functools.partial(attend, known=part, rest=None, turn=Turn())
        return jax.vjp(attend, *own)[1](cotangents)

    carry = lambda: map(jnp.zeros_like, arrays)
    found = turns.run(run, carry, arrays[0].ndim - 2, lists, given)
    return found, None, None


_in_turn.defvjp(_in_turn_forward, _in_turn_backward)
