"""Feature maps of kernel attention: `[..., H]` to `[..., F]`, for queries and keys.

All but `identity` and `taylor` give no negative number, as `normalize` wants; of
`taylor` the inner product is at least 1/2.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def identity(x: jax.Array) -> jax.Array:
    """x itself: linear attention without a kernel."""
    return x


def elu_plus_one(x: jax.Array) -> jax.Array:
    """elu(x) + 1 (arXiv:2006.16236 eq. 7)."""
    return jax.nn.elu(x) + 1


def relu(x: jax.Array) -> jax.Array:
    """max(x, 0)."""
    return jax.nn.relu(x)


def exp(x: jax.Array) -> jax.Array:
    """The exponential of each channel."""
    return jnp.exp(x)


def hedgehog(x: jax.Array) -> jax.Array:
    """softmax(x) and softmax(-x) side by side: 2 H features (arXiv:2402.04347 eq. 6).

    Hedgehog applies it to x W with a learned matrix a head: `attnx.nn.Hedgehog`. Two
    softmaxes, as in the paper and its released weights, not one over both halves.
    """
    features = (jax.nn.softmax(x, -1), jax.nn.softmax(-x, -1))
    return jnp.maximum(jnp.concatenate(features, -1), 1e-6)


def taylor(x: jax.Array) -> jax.Array:
    """The second order of exp: 1 + H + H (H + 1) / 2 features (arXiv:2402.18668).

    The inner product of the features of q and k is 1 + a + a^2 / 2 with
    a = q k / sqrt(H), the scale being inside: use it with `scale=1.0`. Equal products
    are stored once, which is why there are not 1 + H + H^2.

    Example:
      >>> import jax.numpy as jnp
      >>> from attnx import feature_maps
      >>> x = jnp.array([1.0, 1.0, 1.0, 1.0])  # a = 4 / 2
      >>> features = feature_maps.taylor(x)
      >>> features.shape, round(float(features @ features), 4)
      ((15,), 5.0)
    """
    size = x.shape[-1]
    row, column = jnp.triu_indices(size, 1)
    parts = (
        jnp.ones_like(x[..., :1]),
        x / size**0.25,
        x * x / (2 * size) ** 0.5,
        x[..., row] * x[..., column] / size**0.5,
    )
    return jnp.concatenate(parts, -1)
