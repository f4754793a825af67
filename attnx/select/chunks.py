"""Where DHSA's chunks start: chosen from scores, and what a predictor learns."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from attnx._checks import expect, expect_float, expect_shape


def chunk_starts(
    scores: jax.Array,
    max_chunks: int,
    *,
    distance: int = 8,
    threshold: float = -jnp.inf,
) -> jax.Array:
    """Picks where chunks start: the best scores that are not close to better ones.

    Greedy: the best is taken, those up to `distance` away are dropped, and so on.

    Args:
      scores: `[B, T]`, how much token t looks like the first of a chunk; such as
        `attnx.nn.BoundaryPredictor` gives.
      max_chunks: chunks at most; the one that starts at token 0 counts.
      distance: tokens within which one start keeps others away. Token 0 keeps none.
      threshold: scores not above it start no chunk.

    Returns:
      Bool `[B, T]`, True at token 0.

    Raises:
      ValueError: shapes or options that do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from attnx.select import chunk_starts
      >>> scores = jnp.array([[0.0, 0.1, 0.8, 0.9, 0.2, 0.7]])
      >>> chunk_starts(scores, 3, distance=1).astype(int).tolist()
      [[1, 0, 0, 1, 0, 1]]
    """
    expect(scores.ndim == 2, "scores", "shape [B, T]", scores.shape)
    expect_float("scores", scores)
    expect(max_chunks >= 1, "max_chunks", "at least 1", max_chunks)
    expect(distance >= 0, "distance", "at least 0", distance)
    index = jnp.arange(scores.shape[1])

    def pick(_, carry):
        starts, scores = carry
        best = scores.argmax(-1)[:, None]
        high = jnp.take_along_axis(scores, best, -1)
        starts |= (index == best) & (high > threshold)
        near = jnp.abs(index - best) <= distance
        return starts, jnp.where(near, -jnp.inf, scores)

    first = jnp.broadcast_to(index == 0, scores.shape)
    scores = jnp.where(first, -jnp.inf, scores)
    return jax.lax.fori_loop(0, max_chunks - 1, pick, (first, scores))[0]


def boundary_ratio(attention: jax.Array, *, window: int = 4) -> jax.Array:
    """Measures how differently later queries attend to the two sides of each token.

    DHSA's labels: its predictor learns where the ratio is 2 or more.

    Args:
      attention: `[B, T, T]`, weights of causal attention, averaged over heads.
      window: tokens on each side.

    Returns:
      Float32 or better `[B, T]`: of the weight that queries from t + window on give to
      the `window` tokens before t, and to as many from t on, the larger over the
      smaller. 1 where a side is short.

    Raises:
      ValueError: shapes or options that do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from attnx.select import boundary_ratio
      >>> last_query = jnp.array([0.125, 0.125, 0.5, 0.25, 0.0])
      >>> weights = jnp.zeros((1, 5, 5)).at[0, 4].set(last_query)
      >>> boundary_ratio(weights, window=1).round().astype(int).tolist()
      [[1, 1, 4, 2, 1]]
    """
    expect(attention.ndim == 3, "attention", "shape [B, T, T]", attention.shape)
    batch, length = attention.shape[:2]
    expect_shape("attention", attention, (batch, length, length))
    expect(window >= 1, "window", "at least 1", window)
    x = attention.astype(jnp.promote_types(attention.dtype, jnp.float32))
    # Sums of `window` columns that start at each, over the rows from each on.
    shifted = (jnp.pad(x[..., i:], ((0, 0), (0, 0), (0, i))) for i in range(window))
    columns = functools.reduce(jnp.add, shifted)
    below = jnp.cumsum(columns[:, ::-1], 1)[:, ::-1]
    index = jnp.arange(length)
    row = jnp.minimum(index + window, length - 1)
    before, after = below[:, row, jnp.maximum(index - window, 0)], below[:, row, index]
    low, high = jnp.minimum(before, after), jnp.maximum(before, after)
    has_both = (index >= window) & (index + window < length)
    return jnp.where(has_both, (high + 1e-6) / (low + 1e-6), 1)
