"""One attention layer: projections, and between them any mixer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from attnx._checks import expect, expect_shape
from attnx.nn.mixers import Mixer

default_kernel_init = nnx.initializers.lecun_normal()
default_bias_init = nnx.initializers.zeros_init()


class Attention(nnx.Module):
    """Self-attention over sequences or grids, with interchangeable mixers.

    `query`, `key`, `value` (and `gate`) projections, `activation` and `position` on
    queries and keys, the mixer, `norm` over all heads at once, the gate, and the `out`
    projection. Parameters are named and shaped as in `nnx.MultiHeadAttention`.

    Args:
      in_features: D, the size of the input and of the output.
      num_heads: N, query heads.
      mixer: what mixes tokens: `SoftmaxMixer`, `NeighborhoodMixer`, `LinearMixer`, or
        your own `Mixer`.
      num_kv_heads: K, key and value heads, which divides N; N by default.
      head_dim: H, the size of a query or key head; D // N by default.
      value_dim: V, the size of a value head; H by default.
      activation: applied to queries and keys as projected, such as `jax.nn.silu`.
      position: `(x [B, *space, N, H], *positions) -> [B, *space, N, H']`, applied to
        queries and keys, such as `Rotary()`. `positions` has one integer array an axis
        of space, broadcastable to `[B, *space]`.
      norm: applied to the mixer's output, all heads in one axis `[B, *space, N * V]`,
        such as `SRMSNorm()` or an `nnx.RMSNorm`.
      gate: makes the layer gated: applied to one more projection of the input,
        `[B, *space, N, V]`, that multiplies the heads after `norm`. `jax.nn.sigmoid`,
        `jax.nn.silu`, or `nnx.identity` as in TransNormerLLM.
      use_bias: whether projections have biases.
      dtype: of the computation; by default that of input and parameters.
      param_dtype: of the parameters.
      kernel_init: initializer of the projections' kernels.
      out_kernel_init: of the output projection's; `kernel_init` by default.
      bias_init: initializer of the biases.
      kernel_metadata: metadata, sharding for one, of the `[D, heads, size]` kernels.
      bias_metadata: of their `[heads, size]` biases.
      out_kernel_metadata: of the `[N, V, D]` output kernel.
      out_bias_metadata: of its `[D]` bias.
      rngs: keys for the parameters.

    Raises:
      ValueError: sizes that do not divide.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from attnx.nn import Attention, Rotary, SoftmaxMixer
      >>> layer = Attention(
      ...     64, 4, SoftmaxMixer(), num_kv_heads=2, position=Rotary(), rngs=nnx.Rngs(0)
      ... )
      >>> x = jnp.ones((2, 10, 64))
      >>> y = layer(x)
      >>> cache = layer.init_cache(2, max_length=16)
      >>> prompt, cache = layer.step(x[:, :7], cache)
      >>> token, cache = layer.step(x[:, 7:8], cache)
      >>> bool(abs(token - y[:, 7:8]).max() < 1e-5), cache.lengths.tolist()
      (True, [8, 8])
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        mixer: Mixer,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        activation: Callable[[jax.Array], jax.Array] | None = None,
        position: Callable[..., jax.Array] | None = None,
        norm: Callable[[jax.Array], jax.Array] | None = None,
        gate: Callable[[jax.Array], jax.Array] | None = None,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        kernel_init: Initializer = default_kernel_init,
        out_kernel_init: Initializer | None = None,
        bias_init: Initializer = default_bias_init,
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        out_kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        out_bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        rngs: nnx.Rngs,
    ):
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        divides = num_kv_heads > 0 and num_heads % num_kv_heads == 0
        expect(divides, "num_kv_heads", f"a divisor of {num_heads} heads", num_kv_heads)
        if head_dim is None:
            divides = in_features % num_heads == 0
            expect(divides, "in_features", f"a multiple of {num_heads}", in_features)
            head_dim = in_features // num_heads
        value_dim = head_dim if value_dim is None else value_dim

        self.in_features = in_features
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.activation = activation
        self.position = position
        self.gate_activation = gate or nnx.identity

        linear = functools.partial(
            nnx.LinearGeneral,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            bias_init=bias_init,
            rngs=rngs,
        )
        project = functools.partial(
            linear,
            in_features,
            kernel_init=kernel_init,
            kernel_metadata=kernel_metadata,
            bias_metadata=bias_metadata,
        )
        self.query = project((num_heads, head_dim))
        self.key = project((num_kv_heads, head_dim))
        self.value = project((num_kv_heads, value_dim))
        self.out = linear(
            (num_heads, value_dim),
            in_features,
            axis=(-2, -1),
            kernel_init=out_kernel_init or kernel_init,
            kernel_metadata=out_kernel_metadata,
            bias_metadata=out_bias_metadata,
        )
        self.gate = None if gate is None else project((num_heads, value_dim))
        self.mixer = mixer
        self.norm = norm

    def __call__(
        self, x: jax.Array, *, segment_ids: jax.Array | None = None
    ) -> jax.Array:
        """Attends over whole sequences or grids.

        Args:
          x: `[B, T, D]`, or `[B, *space, D]` for mixers over grids.
          segment_ids: integers `[B, T]` that tell packed documents apart; each run of
            equal ids, which no other run of the row may share, is one document, gets
            its positions from 0, and comes out as it would alone.

        Returns:
          `[B, *space, D]`.

        Raises:
          ValueError: an argument of a wrong shape.
          NotImplementedError: segment_ids for a mixer that does not support them.
        """
        self._check(x)
        space = x.shape[1:-1]
        if segment_ids is None:
            positions = jnp.meshgrid(
                *map(jnp.arange, space), indexing="ij", sparse=True
            )
        else:
            expect_shape("segment_ids", segment_ids, x.shape[:-1])
            expect(len(space) == 1, "segment_ids", "x [B, T, D]", f"x {x.shape}")
            positions = [_positions_in_segments(segment_ids)]
        query, key, value = self._project(x, positions)
        out = self.mixer(query, key, value, inputs=x, segment_ids=segment_ids)
        return self._output(out, x)

    def init_cache(
        self,
        batch_size: int,
        max_length: int | None = None,
        dtype: DTypeLike | None = None,
    ) -> Any:
        """Makes an empty cache for `step`.

        Args:
          batch_size: B.
          max_length: tokens the cache must hold; linear mixers do not need it.
          dtype: of the inputs to come; the layer's by default. Cached keys and values
            have the dtype the layer computes in, states at least float32.

        Returns:
          A pytree whose field `lengths`, int `[B]`, counts the tokens seen.

        Raises:
          ValueError: no `max_length` for a mixer that needs one.
          NotImplementedError: the mixer cannot generate by steps.
        """
        if dtype is None:
            dtype = self.param_dtype if self.dtype is None else self.dtype
        token = jax.ShapeDtypeStruct((batch_size, 1, self.in_features), dtype)
        position = jax.ShapeDtypeStruct((batch_size, 1), jnp.int32)
        projected = jax.eval_shape(self._project, token, [position])
        return self.mixer.init_cache(*projected, max_length)

    def step(self, x: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        """Continues the sequences in the cache by one token or many.

        Args:
          x: `[B, T_new, D]`; a whole prompt, or the token last generated.
          cache: from `init_cache` or the last step.

        Returns:
          `[B, T_new, D]`, what `__call__` gives these tokens within the whole sequence,
          and the cache to go on with.

        Raises:
          ValueError: an argument of a wrong shape, or more tokens than the cache holds.
        """
        self._check(x)
        expect(x.ndim == 3, "x", "shape [B, T_new, D]", x.shape)
        expect_shape("x", x, (*cache.lengths.shape, *x.shape[1:]))
        positions = cache.lengths[:, None] + jnp.arange(x.shape[1])
        query, key, value = self._project(x, [positions])
        out, cache = self.mixer.step(query, key, value, cache, inputs=x)
        return self._output(out, x), cache

    def _check(self, x):
        fits = x.ndim >= 3 and x.shape[-1] == self.in_features
        expect(fits, "x", f"shape [B, *space, {self.in_features}]", x.shape)

    def _project(self, x, positions):
        query, key, value = self.query(x), self.key(x), self.value(x)
        if self.activation is not None:
            query, key = self.activation(query), self.activation(key)
        if self.position is not None:
            query = self.position(query, *positions)
            key = self.position(key, *positions)
        return query, key, value

    def _output(self, heads, x):
        if self.norm is not None:
            flat = heads.reshape(*heads.shape[:-2], -1)
            heads = self.norm(flat).reshape(heads.shape)
        if self.gate is not None:
            heads = heads * self.gate_activation(self.gate(x))
        return self.out(heads)


def _positions_in_segments(segment_ids):
    """How far each token is from the first of its document."""
    index = jnp.arange(segment_ids.shape[1])
    before = jnp.roll(segment_ids, 1, axis=1)
    starts = jnp.where(segment_ids != before, index, 0)
    return index - jax.lax.cummax(starts, axis=1)
