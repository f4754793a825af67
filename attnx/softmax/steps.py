"""Keys that come in several steps, which share their sums."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax

from attnx._tree import tree_class
from attnx.softmax.merge import merge_attention


@tree_class(meta=("is_last",))
class Step:
    """One of several steps, each with other keys. It has no gradient of its own.

    Without `cotangents` it attends, and `sums` are the output `[B, T, N, V]` and the
    log-sum-exp `[B, T, N]` so far, at first 0 and -inf. With them it adds up gradients
    of an output and a log-sum-exp that are known, and `sums` are those of the query
    `[B, T, N, H]`, the key `[B, S, K, H]` and the value `[B, S, K, V]`, at first 0.

    Attributes:
      sums: in float32 or better. Between steps their numbers are in an order that is
        the implementation's own.
      cotangents: of the output and the log-sum-exp over all steps, or None.
      is_last: whether the sums are then wanted in their own order, all but the
        log-sum-exp in the query's dtype. Of gradients, others than these may go on.
    """

    sums: tuple[jax.Array, ...]
    cotangents: tuple[jax.Array, jax.Array] | None = None
    is_last: bool = False


def take(
    attend: Callable, step: Step, known: tuple[jax.Array, jax.Array] | None, *operands
) -> tuple[jax.Array, ...]:
    """A step by what knows of none: `attend(*operands, known=known)`.

    Args:
      attend: gives an output and a log-sum-exp, as `engine.attend`.
      step: what to add to.
      known: as in `engine.attend`.
      *operands: query, key and value.

    Returns:
      The sums after the step, in their own order.
    """
    if step.cotangents is None:
        part = attend(*operands)
        out, lse = merge_attention(*zip(step.sums, part, strict=True))
        return (out.astype(operands[0].dtype) if step.is_last else out), lse
    _, pull = jax.vjp(functools.partial(attend, known=known), *operands)
    grads = zip(step.sums, pull(step.cotangents), strict=True)
    sums = (x + y.astype(x.dtype) for x, y in grads)
    return tuple(x.astype(operands[0].dtype) if step.is_last else x for x in sums)
