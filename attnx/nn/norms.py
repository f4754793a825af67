"""Normalization without parameters."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class SRMSNorm:
    """Divides by the root mean square of the last axis; no gain, no bias.

    The norm of TransNormerLLM (arXiv:2307.14995 eq. 8), there over all heads at once.
    Computed in float32 or better; the output has x's dtype.

    Attributes:
      epsilon: added to the mean square.

    Example:
      >>> import jax.numpy as jnp
      >>> from attnx.nn import SRMSNorm
      >>> SRMSNorm()(jnp.array([3.0, 4.0, 0.0, 0.0])).round(3).tolist()
      [1.2000000476837158, 1.600000023841858, 0.0, 0.0]
    """

    epsilon: float = 1e-6

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)
        return y.astype(x.dtype)
