"""Mixers: what `Attention` does between its projections."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from attnx import masks
from attnx._checks import expect
from attnx.cache import KVCache
from attnx.linear import feature_maps, linear_attention, linear_attention_step
from attnx.softmax import (
    decode_attention,
    dot_product_attention,
    neighborhood_attention,
)


class Mixer(nnx.Module):
    """What every mixer answers to. Subclass it to write one.

    Arrays are query `[B, *space, N, H]`, key `[B, *space, K, H]` and value
    `[B, *space, K, V]`. `inputs` is what the layer was called with, `[B, *space, D]`,
    for mixers that read more from it. A cache is any pytree with a field `lengths`, int
    `[B]`: how many tokens it has seen.
    """

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        *,
        inputs: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> jax.Array:
        """Mixes whole sequences: `[B, *space, N, V]`."""
        raise NotImplementedError(f"{type(self).__name__} does not mix sequences")

    def init_cache(
        self,
        query: jax.ShapeDtypeStruct,
        key: jax.ShapeDtypeStruct,
        value: jax.ShapeDtypeStruct,
        max_length: int | None = None,
    ) -> Any:
        """Makes an empty cache, given the shapes and dtypes of one token's arrays."""
        raise NotImplementedError(f"{type(self).__name__} cannot generate by steps")

    def step(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        cache: Any,
        *,
        inputs: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """Mixes the tokens that follow those in the cache, and adds them to it."""
        raise NotImplementedError(f"{type(self).__name__} cannot generate by steps")


class SoftmaxMixer(Mixer):
    """Softmax attention under any mask.

    A step costs time and memory proportional to the cache's capacity. Its new tokens
    see, of all tokens so far, what the mask shows them at their positions: the same as
    in the whole sequence, unless the mask shows tokens that are still to come.

    Args:
      mask: over positions in the sequence (in a packed one, positions in the row).
      scale: multiplies the scores; `H ** -0.5` by default.
      implementation: as in `attnx.dot_product_attention`.

    Example:
      >>> from attnx import masks
      >>> from attnx.nn import SoftmaxMixer
      >>> streaming = SoftmaxMixer(masks.Window(256, 0) | masks.Prefix(4))
    """

    def __init__(
        self,
        mask: masks.Mask = masks.Causal(),  # noqa: B008 (frozen)
        *,
        scale: float | None = None,
        implementation: str | None = None,
    ):
        # Masks compare by identity. Kept apart as structure, numbers and arrays, two
        # layers built alike are equal to jit, and only arrays are traced.
        leaves, self._mask_structure = jax.tree.flatten(mask)
        is_number = [isinstance(x, bool | int | float) for x in leaves]
        pairs = list(zip(leaves, is_number, strict=True))
        self._mask_numbers = tuple(x if number else None for x, number in pairs)
        self._mask_arrays = nnx.data(tuple(x for x, number in pairs if not number))
        self.scale = scale
        self.implementation = implementation

    @property
    def mask(self) -> masks.Mask:
        arrays = iter(self._mask_arrays)
        leaves = [next(arrays) if x is None else x for x in self._mask_numbers]
        return jax.tree.unflatten(self._mask_structure, leaves)

    def __call__(self, query, key, value, *, inputs=None, segment_ids=None):
        mask = self.mask
        if segment_ids is not None:
            mask = mask & masks.Segments(segment_ids)
        return dot_product_attention(
            query,
            key,
            value,
            mask=mask,
            scale=self.scale,
            implementation=self.implementation,
        )

    def init_cache(self, query, key, value, max_length=None):
        return _kv_cache(key, value, max_length)

    def step(self, query, key, value, cache, *, inputs=None):
        cache = cache.append(key, value)
        out = decode_attention(
            query,
            *cache,
            mask=self.mask,
            scale=self.scale,
            implementation=self.implementation,
        )
        return out, cache


class NeighborhoodMixer(Mixer):
    """Neighborhood attention over sequences, images or volumes.

    Steps are for causal sequences with stride 1 only: elsewhere a window depends on
    tokens to come.

    Args:
      kernel_size: keys each query attends, along each axis or along all.
      stride: queries that share a window.
      dilation: distance between the keys of a window.
      is_causal: whether later keys are hidden, along each axis or along all.
      scale: multiplies the scores; `H ** -0.5` by default.
      implementation: as in `attnx.neighborhood_attention`.

    Example:
      >>> from attnx.nn import NeighborhoodMixer
      >>> local, dilated = NeighborhoodMixer(7), NeighborhoodMixer(7, dilation=4)
    """

    def __init__(
        self,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        is_causal: bool | Sequence[bool] = False,
        *,
        scale: float | None = None,
        implementation: str | None = None,
    ):
        self.kernel_size = _hashable(kernel_size)
        self.stride = _hashable(stride)
        self.dilation = _hashable(dilation)
        self.is_causal = _hashable(is_causal)
        self.scale = scale
        self.implementation = implementation

    def __call__(self, query, key, value, *, inputs=None, segment_ids=None):
        if segment_ids is not None:
            raise NotImplementedError(
                "NeighborhoodMixer takes no segment_ids: its windows shift inward at "
                "the ends of the axis, not at those of a segment"
            )
        return neighborhood_attention(
            query,
            key,
            value,
            kernel_size=self.kernel_size,
            stride=self.stride,
            dilation=self.dilation,
            is_causal=self.is_causal,
            scale=self.scale,
            implementation=self.implementation,
        )

    def init_cache(self, query, key, value, max_length=None):
        cache = _kv_cache(key, value, max_length)
        self._mask(max_length)
        return cache

    def step(self, query, key, value, cache, *, inputs=None):
        cache = cache.append(key, value)
        out = decode_attention(
            query,
            *cache,
            mask=self._mask(cache.key.shape[1]),
            scale=self.scale,
            implementation=self.implementation,
        )
        return out, cache

    def _mask(self, length: int) -> masks.Mask:
        """The window of a sequence, which knows its past only."""
        if self.is_causal not in (True, (True,)) or self.stride not in (1, (1,)):
            raise NotImplementedError(
                "NeighborhoodMixer cannot generate by steps unless it is causal over "
                "one axis with stride 1: other windows depend on tokens to come"
            )
        return masks.Neighborhood(
            (length,), self.kernel_size, self.stride, self.dilation, self.is_causal
        )


class LinearCache(NamedTuple):
    """What a linear mixer remembers: the same size after any number of tokens."""

    state: jax.Array
    lengths: jax.Array


class LinearMixer(Mixer):
    """Linear attention with any decay and feature map.

    A step costs constant time and memory.

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

    def __call__(self, query, key, value, *, inputs=None, segment_ids=None):
        query, key = self._features(query, key)
        return linear_attention(
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
        settings = {"scale": self.scale, "normalize": self.normalize}
        length = query.shape[1]
        if length == 1:
            if log_decay is not None and log_decay.ndim > 1:
                log_decay = log_decay[:, 0]
            out, state = linear_attention_step(
                cache.state,
                *(x[:, 0] for x in (query, key, value)),
                log_decay=log_decay,
                **settings,
            )
            out = out[:, None]
        else:
            out, state = linear_attention(
                query,
                key,
                value,
                log_decay=log_decay,
                initial_state=cache.state,
                return_state=True,
                implementation=self.implementation,
                **settings,
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


def _kv_cache(key, value, max_length):
    expect(
        isinstance(max_length, int) and max_length >= 1,
        "max_length",
        "the number of tokens the cache must hold",
        max_length,
    )
    batch, _, num_kv_heads, head_dim = key.shape
    return KVCache.create(
        batch,
        max_length,
        num_kv_heads,
        head_dim,
        value_size=value.shape[-1],
        dtype=key.dtype,
    )


def _hashable(value):
    return tuple(value) if isinstance(value, list) else value
