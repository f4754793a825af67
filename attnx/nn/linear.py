"""What a linear mixer may learn: its decay, its feature map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from attnx._checks import expect
from attnx.linear import feature_maps


class LogDecay(nnx.Module):
    """The data-dependent decay of Gated Linear Attention (arXiv:2312.06635 sec. 4.4).

    `log_sigmoid(x A B + b) / temperature`, A and B meeting in `rank` features. Computed
    in float32 from the product on, since decays are used as differences of long sums.

    Args:
      in_features: D.
      features: `N` for a decay per head and token, `(N, H)` for one per channel too.
      rank: of the projection.
      temperature: the higher, the slower the decay.
      dtype: of the projections; by default that of input and parameters.
      param_dtype: of the parameters.
      kernel_metadata: metadata, sharding for one, of the `[rank, *features]` kernel.
      bias_metadata: of its `[*features]` bias.
      rngs: keys for the parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from attnx.nn import Attention, LinearMixer, LogDecay
      >>> rngs = nnx.Rngs(0)
      >>> mixer = LinearMixer(LogDecay(64, (4, 16), rngs=rngs))
      >>> gated = Attention(64, 4, mixer, gate=nnx.silu, rngs=rngs)
      >>> gated(jnp.ones((1, 10, 64))).shape
      (1, 10, 64)
    """

    def __init__(
        self,
        in_features: int,
        features: int | Sequence[int],
        *,
        rank: int = 16,
        temperature: float = 16.0,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        rngs: nnx.Rngs,
    ):
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        self.down = nnx.Linear(in_features, rank, use_bias=False, rngs=rngs, **dtypes)
        self.up = nnx.LinearGeneral(
            rank,
            features,
            kernel_metadata=kernel_metadata,
            bias_metadata=bias_metadata,
            rngs=rngs,
            **dtypes,
        )
        self.temperature = temperature

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps inputs `[B, T, D]` to log decays `[B, T, *features]`, at most 0."""
        gate = self.up(self.down(x))
        gate = gate.astype(jnp.promote_types(gate.dtype, jnp.float32))
        return jax.nn.log_sigmoid(gate) / self.temperature


class Hedgehog(nnx.Module):
    """A feature map learned to mimic softmax (Hedgehog, arXiv:2402.04347 eq. 6).

    `attnx.feature_maps.hedgehog` of each head times a matrix of its own, which
    starts as the identity. Queries and keys each have their own map.

    Args:
      num_heads: heads of the queries, or of the keys.
      head_dim: H; the features are 2 H.
      dtype: of the computation; by default that of input and parameters.
      param_dtype: of the parameters.
      kernel_metadata: metadata, sharding for one, of the `[heads, H, H]` kernel.

    Example:
      >>> import jax.numpy as jnp
      >>> from attnx.nn import Hedgehog, LinearMixer
      >>> mixer = LinearMixer(
      ...     feature_map=Hedgehog(4, 16),
      ...     key_feature_map=Hedgehog(2, 16),
      ...     normalize=True,
      ... )
      >>> query, key = jnp.ones((1, 10, 4, 16)), jnp.ones((1, 10, 2, 16))
      >>> mixer(query, key, value=key).shape
      (1, 10, 4, 16)
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
    ):
        eye = jnp.broadcast_to(
            jnp.eye(head_dim, dtype=param_dtype), (num_heads, head_dim, head_dim)
        )
        self.kernel = nnx.Param(eye, **kernel_metadata)
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps heads `[..., heads, H]` to features `[..., heads, 2 H]`."""
        kernel = self.kernel[...]
        heads = kernel.shape[:2]
        expect(x.shape[-2:] == heads, "x", f"last axes {heads}", x.shape)
        dtype = self.dtype or jnp.result_type(x, kernel)
        x = jnp.einsum("...nh,nhf->...nf", x.astype(dtype), kernel.astype(dtype))
        return feature_maps.hedgehog(x)
