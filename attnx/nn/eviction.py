"""A mixer whose cache forgets."""

from __future__ import annotations

from collections.abc import Callable

import jax

from attnx import masks
from attnx._checks import expect
from attnx.cache import SparseCache, evict, sparse_decode_attention
from attnx.nn.mixers import SoftmaxMixer, kv_cache


class EvictionMixer(SoftmaxMixer):
    """Softmax attention that generates from a compressed cache.

    Whole sequences are mixed as by `SoftmaxMixer`. A step of at least `observed`
    tokens, a prompt, attends to the cache and to itself in full; then the cache keeps
    the `budget` best tokens of each head. Shorter steps attend to what is left and are
    kept whole, so `max_length` is the budget and the tokens to generate.

    Args:
      policy: `(query, cache) -> scores`, such as `attnx.cache.snapkv_scores` or a
        `functools.partial` of one.
      budget: tokens that each head keeps.
      observed: newest queries that the policy sees. 1 evicts at each step: with
        `streaming_scores` generation goes on forever in constant memory.
      mask: over positions in the sequence.
      scale: multiplies the scores; `H ** -0.5` by default.
      implementation: as in `attnx.dot_product_attention`.

    Example:
      >>> import functools
      >>> from attnx.cache import snapkv_scores, streaming_scores
      >>> from attnx.nn import EvictionMixer
      >>> snapkv = EvictionMixer(snapkv_scores, budget=1024)
      >>> sinks = functools.partial(streaming_scores, sinks=4)
      >>> streaming = EvictionMixer(sinks, budget=4 + 1020, observed=1)
    """

    def __init__(
        self,
        policy: Callable[[jax.Array, SparseCache], jax.Array],
        budget: int,
        *,
        observed: int = 32,
        mask: masks.Mask = masks.Causal(),  # noqa: B008 (frozen)
        scale: float | None = None,
        implementation: str | None = None,
    ):
        super().__init__(mask, scale=scale, implementation=implementation)
        expect(budget >= 1, "budget", "at least 1", budget)
        expect(observed >= 1, "observed", "at least 1", observed)
        self.policy = policy
        self.budget = budget
        self.observed = observed

    def init_cache(self, query, key, value, max_length=None):
        cache = kv_cache(key, value, max_length)
        capacity, budget = cache.key.shape[1], self.budget
        expect(capacity >= budget, "max_length", f"at least {budget}", capacity)
        return SparseCache.of(cache)

    def step(self, query, key, value, cache, *, inputs=None):
        tokens, capacity = query.shape[1], cache.key.shape[2]
        evicts = tokens >= self.observed
        cache = (cache.grow(tokens) if evicts else cache).append(key, value)
        out = sparse_decode_attention(
            query,
            cache,
            mask=self.mask,
            scale=self.scale,
            implementation=self.implementation,
        )
        if evicts:
            scores = self.policy(query[:, -self.observed :], cache)
            cache = evict(cache, scores, self.budget, capacity=capacity)
        return out, cache
