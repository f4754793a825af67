"""The linear mixer, and what it may learn: its decay, its feature map."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from attnx._checks import expect
from attnx.linear import feature_maps, linear_attention, linear_attention_step
from attnx.nn.mixers import Mixer


class LinearCache(NamedTuple):
    """What a linear mixer remembers: the same size after any number of tokens."""

    state: jax.Array
    lengths: jax.Array


class LinearMixer(Mixer):
    """Linear attention with any decay and feature map.

    The cache is the state: a step costs constant time and memory.

    Args:
      log_decay: None; an array `[N]`, fixed; an `nnx.Param` `[N]`, learned; or a
        function of the layer's input `[B, T, D]` giving `[B, T, N]` or `[B, T, N, H]`,
        such as `LogDecay`.
      feature_map: applied to queries and keys, such as one of
        `attnx.feature_maps`.
      key_feature_map: applied to the keys in its place, where a map learns.
      scale: multiplies the queries; `H ** -0.5` by default, of the mapped size H.
      normalize: divide by the sum of the weights.
      implementation: as in `attnx.linear_attention`.

    Attributes:
      attend: what attends to whole sequences, `linear_attention` or such as
        `parallel.sharded(parallel.linear_attention)`; set it for a layer under a mesh.

    Example:
      >>> from attnx.linear.feature_maps import elu_plus_one
      >>> from attnx.nn import LinearMixer
      >>> kernel_attention = LinearMixer(feature_map=elu_plus_one, normalize=True)
    """

    def __init__(
        self,
        log_decay: jax.Array | nnx.Variable | Callable | None = None,
        *,
        feature_map: Callable[[jax.Array], jax.Array] = feature_maps.identity,
        key_feature_map: Callable[[jax.Array], jax.Array] | None = None,
        scale: float | None = None,
        normalize: bool = False,
        implementation: str | None = None,
    ):
        self.log_decay = log_decay
        self.feature_map = feature_map
        self.key_feature_map = key_feature_map
        self.scale = scale
        self.normalize = normalize
        self.implementation = implementation
        self.attend = linear_attention

    def __call__(self, query, key, value, *, inputs=None, segment_ids=None):
        query, key = self._features(query, key)
        return self.attend(
            query,
            key,
            value,
            log_decay=self._decay(inputs),
            scale=self.scale,
            segment_ids=segment_ids,
            normalize=self.normalize,
            implementation=self.implementation,
        )

    def init_cache(self, query, key, value, max_length=None):
        query, key = jax.eval_shape(self._features, query, key)
        batch, _, num_heads, head_dim = query.shape
        columns = value.shape[-1] + self.normalize
        dtype = jnp.promote_types(jnp.result_type(query, key, value), jnp.float32)
        return LinearCache(
            jnp.zeros((batch, num_heads, head_dim, columns), dtype),
            jnp.zeros(batch, jnp.int32),
        )

    def step(self, query, key, value, cache, *, inputs=None):
        query, key = self._features(query, key)
        log_decay = self._decay(inputs)
        length = query.shape[1]
        if length == 1:
            if log_decay is not None and log_decay.ndim > 1:
                log_decay = log_decay[:, 0]
            out, state = linear_attention_step(
                cache.state,
                *(x[:, 0] for x in (query, key, value)),
                log_decay=log_decay,
                scale=self.scale,
                normalize=self.normalize,
            )
            out = out[:, None]
        else:
            out, state = linear_attention(
                query,
                key,
                value,
                log_decay=log_decay,
                scale=self.scale,
                initial_state=cache.state,
                normalize=self.normalize,
                implementation=self.implementation,
                return_state=True,
            )
        return out, LinearCache(state, cache.lengths + length)

    def _features(self, query, key):
        key_map = self.key_feature_map or self.feature_map
        return self.feature_map(query), key_map(key)

    def _decay(self, inputs):
        if self.log_decay is None:
            return None
        if isinstance(self.log_decay, nnx.Variable):
            return self.log_decay[...]
        if callable(self.log_decay):
            return self.log_decay(inputs)
        # An array is a setting: whoever wants it learned passes an nnx.Param.
        return jax.lax.stop_gradient(jnp.asarray(self.log_decay))


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
        self.down = nnx.Linear(
            in_features,
            rank,
            use_bias=False,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.up = nnx.LinearGeneral(
            rank,
            features,
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_metadata=kernel_metadata,
            bias_metadata=bias_metadata,
            rngs=rngs,
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
        dtype = jnp.result_type(x, kernel) if self.dtype is None else self.dtype
        x = jnp.einsum("...nh,nhf->...nf", x.astype(dtype), kernel.astype(dtype))
        return feature_maps.hedgehog(x)
