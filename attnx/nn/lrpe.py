"""Linearized relative positional encoding, which linear attention can learn."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from attnx._checks import expect


class LRPE(nnx.Module):
    """Positions for linear attention: `[x cos(t theta), x sin(t theta)]` at position t.

    TransNormerLLM's LRPE-d without its decay (arXiv:2307.14995 sec. 3.1): the inner
    product of a query at t and a key at s is `sum_j q_j k_j cos((t - s) theta_j)`, with
    an angle to learn for every channel of every head. It doubles the size of the heads.
    TransNormerLLM has it in its first layer.

    Args:
      num_heads: N.
      head_dim: H.
      base: angles start from 1 and fall to `base ** -2` geometrically, over all heads.
      param_dtype: of the angles.

    Example:
      >>> import jax.numpy as jnp
      >>> from attnx.nn import LRPE
      >>> x = LRPE(1, 64)(jnp.ones((1, 8, 1, 64)), jnp.arange(8))[0, :, 0]
      >>> x.shape, bool(abs(x[0] @ x[3] - x[4] @ x[7]) < 1e-4)
      ((8, 128), True)
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        *,
        base: float = 10_000.0,
        param_dtype: DTypeLike = jnp.float32,
    ):
        size = num_heads * head_dim
        theta = base ** (-2 * jnp.arange(size) / size)
        theta = theta.reshape(num_heads, head_dim)
        self.theta = nnx.Param(theta.astype(param_dtype))

    def __call__(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """Encodes every head of every token.

        Args:
          x: `[B, T, N, H]`.
          positions: integers `[T]` or `[B, T]`.

        Returns:
          `[B, T, N, 2 H]` in x's dtype, computed in float32 or better.

        Raises:
          ValueError: heads of another number or size.
        """
        theta = self.theta[...]
        expect(x.shape[-2:] == theta.shape, "x", f"last axes {theta.shape}", x.shape)
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        angles = positions.astype(dtype)[..., None, None] * theta.astype(dtype)
        wide = x.astype(dtype)
        parts = (wide * jnp.cos(angles), wide * jnp.sin(angles))
        return jnp.concatenate(parts, -1).astype(x.dtype)
