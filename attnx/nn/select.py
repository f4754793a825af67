"""Mixers that choose by content what to attend to."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from attnx import masks
from attnx._checks import expect, expect_shape
from attnx.nn.attention import Attention
from attnx.nn.mixers import Mixer, SoftmaxMixer, kv_cache
from attnx.select import (
    chunk_starts,
    dhsa_attention,
    moba_attention,
    moba_mask,
    vmoba_attention,
)
from attnx.softmax import decode_attention


class MoBAMixer(Mixer):
    """Mixture of Block Attention: the own block and the best ones before it.

    The cache keeps all keys and values. A step chooses and gives what the whole
    sequence does; it reads all keys to average them.

    Args:
      block_size: tokens of a block.
      top_k: blocks that a query attends, its own included.
      scale: multiplies the scores; `H ** -0.5` by default.
      implementation: as in `attnx.moba_attention`.

    Example:
      >>> from attnx.nn import MoBAMixer
      >>> mixer = MoBAMixer(block_size=512, top_k=3)
    """

    def __init__(
        self,
        block_size: int,
        top_k: int,
        *,
        scale: float | None = None,
        implementation: str | None = None,
    ):
        self.block_size = block_size
        self.top_k = top_k
        self.scale = scale
        self.implementation = implementation

    def __call__(self, query, key, value, *, inputs=None, segment_ids=None):
        return moba_attention(
            query,
            key,
            value,
            block_size=self.block_size,
            top_k=self.top_k,
            segment_ids=segment_ids,
            scale=self.scale,
            implementation=self.implementation,
        )

    def init_cache(self, query, key, value, max_length=None):
        return kv_cache(key, value, max_length)

    def step(self, query, key, value, cache, *, inputs=None):
        query_start = cache.lengths
        cache = cache.append(key, value)
        mask = moba_mask(
            query,
            cache.key,
            block_size=self.block_size,
            top_k=self.top_k,
            query_start=query_start,
        )
        out = decode_attention(
            query,
            *cache,
            mask=mask,
            scale=self.scale,
            implementation=self.implementation,
        )
        return out, cache


class VMoBAMixer(Mixer):
    """Mixture of Block Attention for video, over `[B, *space, D]`.

    Args:
      block_size: tokens of a box along each axis; `attnx.select.vmoba_block_sizes`
        gives those through which the layers of a model cycle.
      top_k: as in `attnx.vmoba_attention`.
      threshold: as in `attnx.vmoba_attention`.
      max_blocks: as in `attnx.vmoba_attention`.
      scope: as in `attnx.vmoba_attention`.
      normalize: as in `attnx.vmoba_attention`.
      scale: multiplies the scores; `H ** -0.5` by default.
      implementation: as in `attnx.vmoba_attention`.

    Example:
      >>> from attnx.nn import VMoBAMixer
      >>> from attnx.select import vmoba_block_sizes
      >>> sizes = vmoba_block_sizes(
      ...     (8, 12, 20), temporal=2, spatial=(4, 5), spatiotemporal=(4, 6, 5)
      ... )
      >>> mixers = [
      ...     VMoBAMixer(sizes[layer % 3], threshold=0.25, max_blocks=6)
      ...     for layer in range(12)
      ... ]
    """

    def __init__(
        self,
        block_size: Sequence[int],
        *,
        top_k: int | None = None,
        threshold: float | None = None,
        max_blocks: int | None = None,
        scope: str = "head",
        normalize: str = "min_max",
        scale: float | None = None,
        implementation: str | None = None,
    ):
        self.block_size = tuple(block_size)
        self.top_k = top_k
        self.threshold = threshold
        self.max_blocks = max_blocks
        self.scope = scope
        self.normalize = normalize
        self.scale = scale
        self.implementation = implementation

    def __call__(self, query, key, value, *, inputs=None, segment_ids=None):
        if segment_ids is not None:
            raise NotImplementedError(
                "VMoBAMixer takes no segment_ids: its boxes are of one video"
            )
        return vmoba_attention(
            query,
            key,
            value,
            block_size=self.block_size,
            top_k=self.top_k,
            threshold=self.threshold,
            max_blocks=self.max_blocks,
            scope=self.scope,
            normalize=self.normalize,
            scale=self.scale,
            implementation=self.implementation,
        )


class DHSAMixer(Mixer):
    """Dynamic Hierarchical Sparse Attention over sequences.

    It does not generate by steps: the choice looks to the end of a query's chunk.

    Args:
      boundaries: `key [B, T, K, H] -> [B, T]`, how much each token looks like the first
        of a chunk, such as a `BoundaryPredictor`, which layers may share. It gets no
        gradient from the mixer.
      max_chunks: the most chunks.
      budget: keys that each query attends.
      distance: as in `attnx.select.chunk_starts`.
      threshold: as in `attnx.select.chunk_starts`.
      scale: multiplies the scores; `H ** -0.5` by default.
      implementation: as in `attnx.dhsa_attention`.

    Example:
      >>> from attnx.nn import BoundaryPredictor, DHSAMixer
      >>> from flax import nnx
      >>> predictor = BoundaryPredictor(2, 16, rngs=nnx.Rngs(0))
      >>> mixer = DHSAMixer(predictor, max_chunks=64, budget=1024)
    """

    def __init__(
        self,
        boundaries: Callable[[jax.Array], jax.Array],
        max_chunks: int,
        budget: int,
        *,
        distance: int = 8,
        threshold: float = 0.0,
        scale: float | None = None,
        implementation: str | None = None,
    ):
        self.boundaries = boundaries
        self.max_chunks = max_chunks
        self.budget = budget
        self.distance = distance
        self.threshold = threshold
        self.scale = scale
        self.implementation = implementation

    def __call__(self, query, key, value, *, inputs=None, segment_ids=None):
        if segment_ids is not None:
            raise NotImplementedError(
                "DHSAMixer takes no segment_ids: boundaries compete over a whole row"
            )
        starts = chunk_starts(
            self.boundaries(key),
            self.max_chunks,
            distance=self.distance,
            threshold=self.threshold,
        )
        return dhsa_attention(
            query,
            key,
            value,
            starts,
            max_chunks=self.max_chunks,
            budget=self.budget,
            scale=self.scale,
            implementation=self.implementation,
        )


class BoundaryPredictor(nnx.Module):
    """Says where the topic of a sequence changes, from its keys: DHSA's predictor.

    The `window` keys before a token and the `window` from it on attend to one another;
    the two sides' means, how they differ and how they agree go through an MLP
    (arXiv 2510.24606). Train it to tell where `attnx.select.boundary_ratio` is 2 or
    more: its output is a logit.

    Args:
      num_kv_heads: K.
      head_dim: H.
      window: tokens on each side of a boundary.
      num_heads: heads of the attention between them.
      hidden_features: of the MLP.
      rngs: keys for the parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> from attnx.nn import BoundaryPredictor
      >>> from flax import nnx
      >>> predictor = BoundaryPredictor(2, 16, rngs=nnx.Rngs(0))
      >>> predictor(jnp.ones((1, 20, 2, 16))).shape
      (1, 20)
    """

    def __init__(
        self,
        num_kv_heads: int,
        head_dim: int,
        *,
        window: int = 4,
        num_heads: int = 4,
        hidden_features: int = 256,
        rngs: nnx.Rngs,
    ):
        expect(window >= 1, "window", "at least 1", window)
        features = num_kv_heads * head_dim
        self.shape = (num_kv_heads, head_dim)
        self.window = window
        mixer = SoftmaxMixer(masks.Full())
        self.attention = Attention(features, num_heads, mixer, rngs=rngs)
        self.norm = nnx.LayerNorm(features, rngs=rngs)
        self.hidden = nnx.Linear(4 * features + 1, hidden_features, rngs=rngs)
        self.out = nnx.Linear(hidden_features, 1, rngs=rngs)

    def __call__(self, key: jax.Array) -> jax.Array:
        """Scores every token.

        Args:
          key: `[B, T, K, H]`.

        Returns:
          Logits `[B, T]` that token t is the first of a chunk; -inf where fewer than
          `window` tokens are on a side.

        Raises:
          ValueError: keys of another shape.
        """
        expect(key.ndim == 4, "key", "[B, T, K, H]", key.shape)
        batch, length = key.shape[:2]
        expect_shape("key", key, (batch, length, *self.shape))
        index = jnp.arange(length)
        around = index[:, None] + jnp.arange(-self.window, self.window)
        x = key.reshape(batch, length, -1)[:, jnp.clip(around, 0, length - 1)]
        x = x.reshape(-1, *x.shape[2:])
        x = self.norm(self.attention(x))
        left, right = (side.mean(1) for side in jnp.split(x, 2, axis=1))
        norms = jnp.linalg.norm(left, axis=-1) * jnp.linalg.norm(right, axis=-1)
        cosine = (left * right).sum(-1) / jnp.maximum(norms, 1e-6)
        pair = (left, right, jnp.abs(left - right), left * right, cosine[:, None])
        logits = self.out(nnx.relu(self.hidden(jnp.concatenate(pair, -1))))
        has_both = (index >= self.window) & (index + self.window <= length)
        return jnp.where(has_both, logits.reshape(batch, length), -jnp.inf)
