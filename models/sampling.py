"""How a language model writes: token after token, from its caches."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from models.lm import LM


@functools.partial(jax.jit, static_argnames="num_tokens")
def generate(
    model: LM,
    prompt: jax.Array,
    num_tokens: int,
    *,
    key: jax.Array,
    temperature: float | jax.Array = 1.0,
    top_k: int | jax.Array | None = None,
    top_p: float | jax.Array = 1.0,
) -> jax.Array:
    """Samples a continuation, one step a token.

    Args:
      model: the decoder.
      prompt: int `[B, T]`, T at least 1.
      num_tokens: how many to sample.
      key: of the random numbers.
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: only so many of the likeliest tokens are sampled; None for all.
      top_p: of those, only the fewest likeliest that together are so probable.

    Returns:
      int32 `[B, num_tokens]`.
    """
    batch, length = prompt.shape
    cache = model.init_cache(batch, length + num_tokens)
    logits, cache = model.step(prompt, cache)
    sampling = (temperature, top_k, top_p)
    return go_on(model, logits[:, -1], cache, num_tokens, key, *sampling)[0]


def go_on(
    model: LM,
    logits: jax.Array,
    cache: tuple[Any, ...],
    num_tokens: int,
    key: jax.Array,
    temperature: float | jax.Array = 1.0,
    top_k: int | jax.Array | None = None,
    top_p: float | jax.Array = 1.0,
) -> tuple[jax.Array, tuple[Any, ...]]:
    """Samples what follows the sequences in a cache; arguments as in `generate`.

    Args:
      logits: of the next token, `[B, V]`.
      cache: with room for `num_tokens` more.

    Returns:
      int32 `[B, num_tokens]`, and the cache with them.
    """

    def next_token(carry, key):
        logits, cache = carry
        token = sample(key, logits, temperature, top_k, top_p)
        logits, cache = model.step(token[:, None], cache)
        return (logits[:, -1], cache), token

    keys = jax.random.split(key, num_tokens)
    (_, cache), tokens = jax.lax.scan(next_token, (logits, cache), keys)
    return tokens.T, cache


def sample(
    key: jax.Array,
    logits: jax.Array,
    temperature: float | jax.Array = 1.0,
    top_k: int | jax.Array | None = None,
    top_p: float | jax.Array = 1.0,
) -> jax.Array:
    """Samples from logits `[..., V]`: int32 `[...]`; arguments as in `generate`."""
    # Of logits divided by nearly 0 the likeliest has all of the probability.
    scaled = logits / jnp.maximum(temperature, 1e-6)
    kept = likeliest(scaled, logits.shape[-1] if top_k is None else top_k, top_p)
    # The maximum of logits with Gumbel noise is a sample of their softmax.
    noise = temperature * jax.random.gumbel(key, logits.shape, logits.dtype)
    token = jnp.argmax(jnp.where(kept, logits + noise, -jnp.inf), axis=-1)
    return token.astype(jnp.int32)


def likeliest(
    logits: jax.Array, top_k: int | jax.Array, top_p: float | jax.Array
) -> jax.Array:
    """Says which tokens are sampled: the `top_k` likeliest, and of these the nucleus.

    The nucleus (arXiv:1904.09751) is the fewest likeliest tokens whose probabilities,
    among the `top_k`, sum to `top_p` or more; the likeliest token always is in it. Of
    equal tokens the first counts as likelier.

    Args:
      logits: `[..., V]`.
      top_k: at least 1.
      top_p: in (0, 1].

    Returns:
      bool `[..., V]`.

    Example:
      >>> logits = jnp.log(jnp.array([0.1, 0.4, 0.3, 0.2]))
      >>> likeliest(logits, 3, 1.0).tolist(), likeliest(logits, 4, 0.6).tolist()
      ([False, True, True, True], [False, True, True, False])
    """
    order = jnp.argsort(logits, axis=-1, descending=True)
    rank = jnp.argsort(order, axis=-1)
    best = rank < top_k
    probability = jax.nn.softmax(jnp.where(best, logits, -jnp.inf), axis=-1)
    ranked = jnp.take_along_axis(probability, order, axis=-1)
    before = jnp.take_along_axis(jnp.cumsum(ranked, -1) - ranked, rank, axis=-1)
    return best & ((before < top_p) | (jnp.asarray(top_p) >= 1) | (rank == 0))
