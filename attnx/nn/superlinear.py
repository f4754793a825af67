"""The mixer of superlinear attention, and its router."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from attnx._checks import expect
from attnx.nn.mixers import Mixer, kv_cache
from attnx.select import superlinear_attention
from attnx.select.blocks import document_starts


class SuperlinearMixer(Mixer):
    """Superlinear multi-step attention: a window, and spans that a router finds.

    The cache keeps all keys and values. A step reads O(sqrt(S)) of them in its search
    and in its spans. Put a recurrent layer below, such as one with a `LinearMixer`:
    an anchor's key tells of the keys near it only if something gathered it there.

    Args:
      router: projects the layer's input `[B, T, D]` to the queries that search,
        `[B, T, N, H]`, such as an `nnx.LinearGeneral(D, (N, H))`.
      position: as in `attnx.nn.Attention`, where its keys have one: applied to the
        queries that search.
      num_spans: as in `attnx.superlinear_attention`, like all that follow.
      window_index: see there.
      backward: see there.
      forward: see there.
      search_power: see there.
      span_power: see there.
      scale: multiplies the scores of attention; `H ** -0.5` by default.
      implementation: as in `attnx.superlinear_attention`.

    Example:
      >>> from attnx.nn import Attention, SuperlinearMixer
      >>> from flax import nnx
      >>> rngs = nnx.Rngs(0)
      >>> router = nnx.LinearGeneral(64, (4, 16), rngs=rngs)
      >>> layer = Attention(64, 4, SuperlinearMixer(router), rngs=rngs)
    """

    def __init__(
        self,
        router: Callable[[jax.Array], jax.Array],
        *,
        position: Callable[..., jax.Array] | None = None,
        num_spans: int = 3,
        window_index: int = 3,
        backward: float = 2.0,
        forward: float = 0.0,
        search_power: float = 0.5,
        span_power: float = 0.5,
        scale: float | None = None,
        implementation: str | None = None,
    ):
        self.router = router
        self.position = position
        self.num_spans = num_spans
        self.window_index = window_index
        self.backward = backward
        self.forward = forward
        self.search_power = search_power
        self.span_power = span_power
        self.scale = scale
        self.implementation = implementation

    def __call__(self, query, key, value, *, inputs=None, segment_ids=None):
        positions = jnp.arange(query.shape[1])
        if segment_ids is not None:
            positions = positions - document_starts(segment_ids)
        router = self._route(inputs, positions, query)
        return self._attend(router, query, key, value, segment_ids=segment_ids)

    def init_cache(self, query, key, value, max_length=None):
        return kv_cache(key, value, max_length)

    def step(self, query, key, value, cache, *, inputs=None):
        start = cache.lengths
        cache = cache.append(key, value)
        positions = start[:, None] + jnp.arange(query.shape[1])
        router = self._route(inputs, positions, query)
        held = (x.astype(query.dtype) for x in (cache.key, cache.value))
        return self._attend(router, query, *held, query_start=start), cache

    def _route(self, inputs, positions, query):
        expect(inputs is not None, "inputs", "what the layer was called with", None)
        router = self.router(inputs)
        if self.position is not None:
            router = self.position(router, positions)
        return router.astype(query.dtype)

    def _attend(self, *arrays, **options):
        return superlinear_attention(
            *arrays,
            num_spans=self.num_spans,
            window_index=self.window_index,
            backward=self.backward,
            forward=self.forward,
            search_power=self.search_power,
            span_power=self.span_power,
            scale=self.scale,
            implementation=self.implementation,
            **options,
        )
