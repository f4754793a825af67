"""Exact combination of attention over parts of the keys."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from attnx._checks import expect, expect_float, expect_shape


def merge_attention(
    outputs: Sequence[jax.Array], lses: Sequence[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Merges attention over disjoint parts of the keys into attention over all of them.

    Exact for any split, parts that a query does not see at all included: they come with
    log-sum-exp -inf and weigh nothing.

    Args:
      outputs: one `[..., V]` a part.
      lses: one `[...]` a part, the natural log-sum-exp that came with it.

    Returns:
      The output `[..., V]` in the first output's dtype, and the log-sum-exp `[...]`.

    Raises:
      ValueError: no part, or shapes that differ.

    Example:
      >>> import jax, attnx
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 8, 2, 16))
      >>> parts = [
      ...     attnx.dot_product_attention(q, k[:, s], v[:, s], return_residual=True)
      ...     for s in (slice(0, 3), slice(3, 8))
      ... ]
      >>> out, lse = attnx.merge_attention(*zip(*parts))
      >>> bool(abs(out - attnx.dot_product_attention(q, k, v)).max() < 1e-5)
      True
    """
    outputs, lses = list(outputs), list(lses)
    expect(len(outputs) >= 1, "outputs", "at least one part", len(outputs))
    expect(len(lses) == len(outputs), "lses", f"{len(outputs)} parts", len(lses))
    for out, lse in zip(outputs, lses, strict=True):
        expect_float("outputs", out)
        expect_shape("outputs", out, outputs[0].shape)
        expect_shape("lses", lse, outputs[0].shape[:-1])
    return _merged(outputs, lses)


@jax.jit
def _merged(outputs, lses):
    dtype = jnp.promote_types(outputs[0].dtype, jnp.float32)
    lse = jnp.stack(lses).astype(dtype)
    peak = jax.lax.stop_gradient(lse.max(0))
    peak = jnp.where(jnp.isfinite(peak), peak, 0)
    weights = jnp.exp(lse - peak)
    total = weights.sum(0)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    # Part by part, so that XLA can make one loop of several merges.
    parts = zip(weights / total, outputs, strict=True)
    out: jax.Array = sum(
        weight[..., None] * part.astype(dtype) for weight, part in parts
    )
    merged = jnp.where(empty, -jnp.inf, peak + jnp.log(total))
    return out.astype(outputs[0].dtype), merged


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def as_part(attend, known, *operands):
    """`known`, of which `attend(*operands)` is a part, with the gradient of the part.

    Both are an output `[..., V]` and a log-sum-exp `[...]`, as `merge_attention` takes
    and returns.
    """
    return known


def _part_forward(attend, known, *operands):
    return known, (known, operands)


def _part_backward(attend, residuals, cotangents):
    (out, lse), operands = residuals
    d_out, d_lse = (x.astype(lse.dtype) for x in cotangents)
    # A query that saw nothing weighs every part exp(-inf).
    lse = jnp.where(jnp.isfinite(lse), lse, jnp.inf)
    (part, part_lse), pull = jax.vjp(attend, *operands)
    # out = sum_j w_j out_j with w_j = exp(lse_j - lse).
    weight = jnp.exp(part_lse - lse)
    along = (d_out * (part.astype(lse.dtype) - out.astype(lse.dtype))).sum(-1)
    d_part = (weight[..., None] * d_out).astype(part.dtype)
    return None, *pull((d_part, weight * (along + d_lse)))


as_part.defvjp(_part_forward, _part_backward)
