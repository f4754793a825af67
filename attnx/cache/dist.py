"""DistAttention: a cache in segments that are attended apart and merged exactly."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from attnx._checks import expect
from attnx.cache.sparse_cache import SparseCache, sparse_decode_attention
from attnx.softmax.mask import Mask
from attnx.softmax.merge import merge_attention
from attnx.softmax.pallas import KernelConfig


def dist_attention(
    query: jax.Array,
    segments: Sequence[SparseCache],
    *,
    mask: Mask | None = None,
    scale: float | jax.Array | None = None,
    implementation: str | KernelConfig | None = None,
    return_residual: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attends the last T tokens of each sequence to a cache that is cut into segments.

    DistAttention (Infinite-LLM, arXiv 2401.02669): each segment gives an output and a
    log-sum-exp, which is all that has to travel, and these merge exactly. Segments may
    be of any sizes, empty ones included, in any order.

    Args:
      query: `[B, T, N, H]`, the newest T tokens of each sequence.
      segments: caches that hold different tokens of the same sequences, such as
        `SparseCache.split` makes. The longest of their `lengths` counts, so that a
        token need only be appended to the segment that keeps it.
      mask: who sees whom, by position in the sequence; by default causal.
      scale: factor on the scores, by default `H ** -0.5`.
      implementation: as in `decode_attention`.
      return_residual: also return the log-sum-exp.

    Returns:
      As `sparse_decode_attention`.

    Raises:
      ValueError: no segment, or shapes that do not fit.
      NotImplementedError: an `implementation` that does not serve the call.

    Example:
      >>> import jax, attnx
      >>> from attnx.cache import SparseCache, dist_attention
      >>> k, v = jax.random.normal(jax.random.key(0), (2, 1, 64, 2, 16))
      >>> q = jax.random.normal(jax.random.key(1), (1, 1, 4, 16))
      >>> cache = attnx.KVCache.create(1, 64, 2, 16).append(k, v)
      >>> out = dist_attention(q, SparseCache.of(cache).split((50, 0, 13, 1)))
      >>> bool(abs(out - attnx.decode_attention(q, *cache)).max() < 1e-5)
      True
    """
    expect(len(segments) >= 1, "segments", "at least one", len(segments))
    lengths = functools.reduce(jnp.maximum, (part.lengths for part in segments))
    # A segment without slots holds nothing: one empty slot says the same.
    parts = [part if part.key.shape[2] else part.grow(1) for part in segments]
    outputs, lses = zip(
        *(
            sparse_decode_attention(
                query,
                part._replace(lengths=lengths),
                mask=mask,
                scale=scale,
                implementation=implementation,
                return_residual=True,
            )
            for part in parts
        ),
        strict=True,
    )
    out, lse = merge_attention(outputs, lses)
    return (out, lse) if return_residual else out
