"""The mixer of Taylor attention."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attnx.linear import feature_maps, linear_attention_step, taylor_attention
from attnx.nn.linear import LinearCache
from attnx.nn.mixers import Mixer


class TaylorMixer(Mixer):
    """Linear attention with exp to the second order, as in Based (arXiv:2402.18668).

    For small heads of queries and keys, 16 in Based: the cache is a state that grows
    with the square of their size and not with the sequence.

    Args:
      implementation: as in `attnx.taylor_attention`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from attnx.nn import Attention, TaylorMixer
      >>> based = Attention(
      ...     64, 4, TaylorMixer(), head_dim=8, value_dim=16, rngs=nnx.Rngs(0)
      ... )
      >>> based(jnp.ones((1, 10, 64))).shape
      (1, 10, 64)
    """

    def __init__(self, *, implementation: str | None = None):
        self.implementation = implementation

    def __call__(self, query, key, value, *, inputs=None, segment_ids=None):
        return taylor_attention(
            query,
            key,
            value,
            segment_ids=segment_ids,
            implementation=self.implementation,
        )

    def init_cache(self, query, key, value, max_length=None):
        features = jax.eval_shape(feature_maps.taylor, query)
        batch, _, num_heads, rows = features.shape
        dtype = jnp.promote_types(jnp.result_type(query, key, value), jnp.float32)
        return LinearCache(
            jnp.zeros((batch, num_heads, rows, value.shape[-1] + 1), dtype),
            jnp.zeros(batch, jnp.int32),
        )

    def step(self, query, key, value, cache, *, inputs=None):
        length = query.shape[1]
        if length == 1:
            # In bfloat16 the products of features could cancel to a denominator near 0.
            wide = (x[:, 0].astype(cache.state.dtype) for x in (query, key))
            out, state = linear_attention_step(
                cache.state,
                *map(feature_maps.taylor, wide),
                value[:, 0],
                scale=1.0,
                normalize=True,
            )
            out = out[:, None].astype(query.dtype)
        else:
            out, state = taylor_attention(
                query,
                key,
                value,
                initial_state=cache.state,
                implementation=self.implementation,
                return_state=True,
            )
        return out, LinearCache(state, cache.lengths + length)
