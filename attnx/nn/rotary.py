"""Rotary positions."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from attnx._checks import expect


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Rotates pairs of features by angles proportional to the position.

    Two rotated vectors' inner product depends only on the difference of their positions
    (RoFormer, arXiv:2104.09864 eq. 34). Feature i is paired with feature i + H/2, as in
    GPT-NeoX and Llama. With several axes the pairs are shared out evenly, the first
    ones to the first axis.

    Attributes:
      base: the longest wavelength is about `2 * pi * base`.

    Example:
      >>> import jax.numpy as jnp
      >>> from attnx.nn import Rotary
      >>> x = jnp.ones((1, 8, 1, 64))
      >>> x = Rotary()(x, jnp.arange(8))[0, :, 0]
      >>> bool(abs(x[0] @ x[3] - x[4] @ x[7]) < 1e-4)
      True
    """

    base: float = 10_000.0

    def __call__(self, x: jax.Array, *positions: jax.Array) -> jax.Array:
        """Rotates every head of every token.

        Args:
          x: `[B, *space, N, H]`.
          *positions: one array an axis of space, each broadcastable to `[B, *space]`:
            `[T]` or `[B, T]` for sequences; `[X, 1]` and `[1, Y]` for images.

        Returns:
          `[B, *space, N, H]` in x's dtype, computed in float32 or better.

        Raises:
          ValueError: H is not a multiple of twice the number of axes.
        """
        rank, head_dim = len(positions), x.shape[-1]
        expect(rank >= 1, "positions", "one array for each axis", "none")
        expect(
            head_dim % (2 * rank) == 0,
            "x",
            f"a head size that is a multiple of {2 * rank} for {rank} axes",
            head_dim,
        )
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        frequency = self.base ** -jnp.linspace(
            0, 1, head_dim // (2 * rank), endpoint=False, dtype=dtype
        )
        angles = [p.astype(dtype)[..., None] * frequency for p in positions]
        angles = jnp.concatenate(jnp.broadcast_arrays(*angles), axis=-1)[..., None, :]
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        a, b = jnp.split(x.astype(dtype), 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(
            x.dtype
        )
