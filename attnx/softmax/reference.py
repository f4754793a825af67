"""Softmax attention by its definition: the specification of all implementations."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attnx.softmax.block_mask import BlockMask
from attnx.softmax.mask import Mask


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    *,
    mask: Mask | BlockMask,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Attends with the whole score matrix in memory, in float32 or better.

    Args:
      query: `[B, T, N, H]`.
      key: `[B, S, K, H]`, K dividing N.
      value: `[B, S, K, V]`.
      bias: broadcastable to `[B, N, T, S]`, or None.
      mask: who sees whom.
      scale: factor on the scores, before the bias.

    Returns:
      The output `[B, T, N, V]` in query's dtype and the natural log-sum-exp
      `[B, T, N]`; 0 and -inf for a query that sees no key.
    """
    batch, query_len, heads, _ = query.shape
    key_len, groups = key.shape[1], heads // key.shape[2]
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    q, k, v = (x.astype(dtype) for x in (query, key, value))
    k, v = jnp.repeat(k, groups, 2), jnp.repeat(v, groups, 2)

    scores = scale * jnp.einsum("btnh,bsnh->bnts", q, k, precision="highest")
    if bias is not None:
        scores += bias.astype(dtype)
    if isinstance(mask, BlockMask):
        visible = mask.to_dense(batch=batch, heads=heads)
    else:
        visible = mask.to_dense(query_len, key_len, batch=batch, heads=heads)
    scores = jnp.where(visible, scores, -jnp.inf)

    peak = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    peak = jnp.where(jnp.isfinite(peak), peak, 0)
    weights = jnp.exp(scores - peak)
    total = weights.sum(-1, keepdims=True)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    out = jnp.einsum("bnts,bsnv->btnv", weights / total, v, precision="highest")
    lse = jnp.where(empty, -jnp.inf, peak + jnp.log(total))[..., 0]
    return out.astype(query.dtype), jnp.swapaxes(lse, 1, 2)
