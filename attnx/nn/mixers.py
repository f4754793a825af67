"""Mixers: what `Attention` does between its projections. Those with a softmax."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from attnx import masks
from attnx._checks import expect
from attnx.cache import KVCache
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

    The cache keeps all keys and values. The new tokens of a step see, of all tokens so
    far, what the mask shows them at their positions: the same as in the whole sequence,
    unless the mask shows tokens that are still to come.

    Args:
      mask: over positions in the sequence (in a packed one, positions in the row).
      scale: multiplies the scores; `H ** -0.5` by default.
      implementation: as in `attnx.dot_product_attention`.

    Attributes:
      attend: what attends to whole sequences, `dot_product_attention` or such as
        `parallel.sharded(parallel.ring_attention)`; set it for a layer under a mesh.

    Example:
      >>> from attnx import masks
      >>> from attnx.nn import SoftmaxMixer
      >>> sink = masks.Causal() & masks.Prefix(4)
      >>> streaming = SoftmaxMixer(masks.Window(256, 0) | sink)
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
        self.attend = dot_product_attention

    @property
    def mask(self) -> masks.Mask:
        arrays = iter(self._mask_arrays)
        leaves = [next(arrays) if x is None else x for x in self._mask_numbers]
        return jax.tree.unflatten(self._mask_structure, leaves)

    def __call__(self, query, key, value, *, inputs=None, segment_ids=None):
        mask = self.mask
        if segment_ids is not None:
            mask = mask & masks.Segments(segment_ids)
        return self.attend(
            query,
            key,
            value,
            mask=mask,
            scale=self.scale,
            implementation=self.implementation,
        )

    def init_cache(self, query, key, value, max_length=None):
        return kv_cache(key, value, max_length)

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
        cache = kv_cache(key, value, max_length)
        self._mask(cache.key.shape[1])
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


def kv_cache(key, value, max_length):
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
