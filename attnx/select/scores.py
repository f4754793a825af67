"""Scores of all blocks for a few heads at a time, from where their queries lie."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from attnx._dispatch import dispatch
from attnx.select.blocks import block_scores
from attnx.select.turns import Turn
from pallas_kernels.batching import mappable
from pallas_kernels.block_scores import BLOCKS, FEWEST, TILE
from pallas_kernels.block_scores import block_scores as kernel
from pallas_kernels.mosaic import wrong_device

HEAD_SIZES = (32, 64, 96, 128)
# bfloat16 numbers that add up to one float32.
_PARTS = 3


def scores_in_turn(
    query: jax.Array,
    means: jax.Array,
    turn: Turn,
    *,
    own: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """`block_scores` of the heads whose turn it is.

    Args:
      query: `[B, T, N, H]`.
      means: float32 or better `[B, n, K, H]`, of the blocks' keys; K divides N.
      turn: of which heads.
      own: int32 `[T]`, a block for each query that scores inf.
      implementation: None or a name. The GPU kernel adds products of bfloat16 parts of
        `means` in float32.

    Returns:
      Float32 or better `[B, N / turns, T, n]`.

    Raises:
      NotImplementedError: an `implementation` that does not serve the call.
    """
    return dispatch(
        "block_scores",
        implementation,
        {
            "xla": functools.partial(_by_xla, turn.steps),
            "pallas": functools.partial(_by_kernel, turn.steps),
        },
        _unsupported,
        query,
        means,
        jnp.asarray(turn.number, jnp.int32),
        own,
    )


def bfloat16_parts(x: jax.Array, dtype) -> jax.Array:
    """`[B, n, K, H]` as a sum of `[B, P, n, K, H]` in a shorter dtype."""
    parts = []
    for _ in range(_PARTS):
        # Written so that no compiler keeps the precision that is to be taken off.
        part = jax.lax.reduce_precision(x, 8, 7)
        parts.append(part.astype(dtype))
        x = x - part
    return jnp.stack(parts, 1)


def unsupported_query(query: jax.Array) -> str | None:
    """Why kernels that add products of bfloat16 parts do not take a query, or None."""
    if query.dtype != jnp.bfloat16:
        return f"the kernel takes bfloat16 queries, not {query.dtype}"
    if query.shape[-1] not in HEAD_SIZES:
        return f"the kernel takes head sizes {HEAD_SIZES}, not {query.shape[-1]}"
    return None


def _by_xla(steps, query, means, number, own):
    turn = Turn(number, steps)
    scores = block_scores(turn.of(query), turn.of(means))
    if own is None:
        return scores
    return jnp.where(own[:, None] == jnp.arange(means.shape[1]), jnp.inf, scores)


def _by_kernel(steps, query, means, number, own):
    turn = Turn(number, steps)
    length, heads, count = *query.shape[1:3], means.shape[1]
    if own is None:
        own = jnp.full(length, jnp.iinfo(jnp.int32).max)
    most = FEWEST if count <= BLOCKS else BLOCKS
    parts = bfloat16_parts(turn.of(means).astype(jnp.float32), query.dtype)
    pad = [(0, 0)] * parts.ndim
    pad[2] = (0, -count % most)
    run = mappable(kernel, heads=heads // steps)
    first = jnp.reshape(number * (heads // steps), 1)
    scores = run((query, jnp.pad(parts, pad)), (own[None].astype(jnp.int32), first))
    return scores[..., :count]


def _unsupported(implementation, query, means, number, own):
    if implementation != "pallas":
        return None
    if reason := unsupported_query(query):
        return reason
    if query.shape[1] % TILE:
        return f"the kernel takes multiples of {TILE} queries, not {query.shape[1]}"
    return wrong_device()
