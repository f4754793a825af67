"""What DHSA keeps of dense attention with chunks that follow the text, and with others.

Nothing is trained: keys and queries are drawn as those of a text that goes from topic
to topic, and the mass of dense attention on the tokens that DHSA chooses is summed.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from attnx import masks
from attnx.select import chunk_starts, dhsa_mask

LENGTH = 2048
BUDGETS = (256, 512)
# Tokens on one topic, from and to.
SEGMENT = (8, 140)
TOPICS = 8
HEAD_DIM = 64


def measure(seed: int) -> dict[str, dict[str, float]]:
    """Measures the share of the mass of dense attention that is kept.

    Three ways of cutting into as many chunks: `fixed` ones of equal size, `found` ones
    that start where mean keys before and after differ most, and the `true` segments.

    Args:
      seed: of the text.

    Returns:
      For each way and each budget of keys the mean over the later half of the queries.
    """
    query, key, true = text(seed)
    count = int(true.sum())
    fixed = np.zeros_like(true)
    fixed[:, np.arange(count) * LENGTH // count] = True
    cuts = {"fixed": fixed, "found": chunk_starts(change(key), count), "true": true}
    # Of the same shape for all texts, so that they share a program.
    most = LENGTH // SEGMENT[0]
    return {
        way: {str(n): float(kept(query, key, starts, most, n)) for n in BUDGETS}
        for way, starts in cuts.items()
    }


def text(seed: int) -> tuple[jax.Array, jax.Array, np.ndarray]:
    """Draws queries and keys of a text whose topics come back.

    Each token's are its topic's vector and noise.

    Returns:
      Queries and keys `[1, T, 1, H]`, and bool `[1, T]` where the topic changes.

    Example:
      >>> query, key, starts = text(0)
      >>> query.shape, bool(starts[0, 0])
      ((1, 2048, 1, 64), True)
    """
    random = np.random.default_rng(seed)
    low, high = SEGMENT
    sizes = random.integers(low, high, LENGTH // low, endpoint=True)
    segment = np.repeat(np.arange(len(sizes)), sizes)[:LENGTH]
    # A step from 1 to TOPICS - 1: never to the same topic.
    topic = np.cumsum(random.integers(1, TOPICS, len(sizes))) % TOPICS
    vectors = random.standard_normal((TOPICS, HEAD_DIM), np.float32)
    noise = random.standard_normal((2, LENGTH, HEAD_DIM), np.float32)
    query, key = (0.75 * vectors[topic[segment]] + noise)[:, None, :, None]
    starts = np.diff(segment, prepend=-1) > 0
    return jnp.asarray(query), jnp.asarray(key), starts[None]


def change(key: jax.Array, window: int = 8) -> jax.Array:
    """How far apart the mean keys before and after the start of each token are.

    Args:
      key: `[B, T, K, H]`.
      window: tokens on each side.

    Returns:
      `[B, T]`; 0 where a side is short.
    """
    total = jnp.pad(jnp.cumsum(key, 1), ((0, 0), (1, 0), (0, 0), (0, 0)))
    sums = total[:, window:] - total[:, :-window]
    distance = jnp.sqrt(((sums[:, window:] - sums[:, :-window]) ** 2).sum((2, 3)))
    return jnp.pad(distance / window, ((0, 0), (window, window - 1)))


@functools.partial(jax.jit, static_argnums=(3, 4))
def kept(
    query: jax.Array, key: jax.Array, starts: jax.Array, max_chunks: int, budget: int
) -> jax.Array:
    """The share of mass of the later half's queries on keys that DHSA chooses."""
    length = query.shape[1]
    mask = dhsa_mask(query, key, starts, max_chunks=max_chunks, budget=budget)
    scores = jnp.einsum("btnh,bsnh->bnts", query, key) * query.shape[-1] ** -0.5
    causal = masks.Causal().to_dense(length, length)
    weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf))
    mass = jnp.where(mask.to_dense(length, length), weights, 0).sum(-1)
    return mass[..., length // 2 :].mean()
