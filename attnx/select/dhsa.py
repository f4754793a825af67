"""Dynamic Hierarchical Sparse Attention: tokens chosen by scores of variable chunks."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attnx._checks import expect, expect_shape
from attnx._tree import tree_class
from attnx.select.blocks import Blocks, block_scores, pool_sqrt
from attnx.softmax import KernelConfig, dot_product_attention
from attnx.softmax.engine import check_arrays
from attnx.softmax.mask import Mask
from attnx.softmax.masks import Segments


def dhsa_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    starts: jax.Array,
    *,
    max_chunks: int,
    budget: int,
    segment_ids: jax.Array | None = None,
    scale: float | jax.Array | None = None,
    implementation: str | KernelConfig | None = None,
    return_residual: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attends causally to the `budget` tokens whose chunks score best.

    Dynamic Hierarchical Sparse Attention (arXiv 2510.24606). The sequence is cut into
    chunks of any length. Two chunks score the product of their queries and keys, each
    pooled to the sum over the root of the length; a token has its chunk's score. The
    choice has no gradient.

    No value comes from the future, but the choice looks ahead: a query's chunk is
    pooled whole, so which earlier tokens it attends depends on queries and keys up to
    the end of its chunk. Not for generation by steps.

    Args:
      query: `[B, T, N, H]`.
      key: `[B, T, K, H]`; K divides N. Each query head chooses for itself.
      value: `[B, T, K, V]`.
      starts: bool `[B or 1, T]`, where chunks start, such as from `chunk_starts`. The
        first token starts one in any case.
      max_chunks: the most chunks; the last takes the rest. With packed documents no
        fewer than these: those that share a chunk share its budget.
      budget: keys that each query attends, all where there are fewer. Of a chunk that
        does not fit whole, and of chunks with equal scores, the first tokens.
      segment_ids: integers `[B, T]` that tell packed documents apart: each run of equal
        ids is a document, whose first token starts a chunk.
      scale: factor on the scores of attention, by default `H ** -0.5`.
      implementation: as in `dot_product_attention`.
      return_residual: also return the log-sum-exp.

    Returns:
      As `dot_product_attention`.

    Raises:
      ValueError: shapes or options that do not fit.
      NotImplementedError: an `implementation` that does not serve the call.

    Example:
      >>> import jax, jax.numpy as jnp, attnx
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 64, 2, 16))
      >>> starts = jnp.isin(jnp.arange(64), jnp.array([5, 30, 33]))[None]
      >>> attnx.dhsa_attention(q, k, v, starts, max_chunks=8, budget=16).shape
      (1, 64, 2, 16)
    """
    query, key, value, batched = check_arrays(query, key, value)
    expect(batched, "query", "[B, T, N, H]", query.shape[1:])
    mask = dhsa_mask(
        query,
        key,
        starts,
        max_chunks=max_chunks,
        budget=budget,
        segment_ids=segment_ids,
    )
    return dot_product_attention(
        query,
        key,
        value,
        mask=mask,
        scale=scale,
        implementation=implementation,
        return_residual=return_residual,
    )


def dhsa_mask(
    query: jax.Array,
    key: jax.Array,
    starts: jax.Array,
    *,
    max_chunks: int,
    budget: int,
    segment_ids: jax.Array | None = None,
) -> Mask:
    """Says which keys each query of `dhsa_attention` attends.

    Combine it to attend more than the budget: `| Causal() & (Window(127, 0) |
    Prefix(128))` adds the newest and the first tokens, as the authors do.

    Args:
      query: `[B, T, N, H]`.
      key: `[B, T, K, H]`; K divides N.
      starts: as in `dhsa_attention`.
      max_chunks: as in `dhsa_attention`.
      budget: as in `dhsa_attention`.
      segment_ids: as in `dhsa_attention`.

    Returns:
      The mask over T queries and T keys.

    Raises:
      ValueError: shapes or options that do not fit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from attnx.select import dhsa_mask
      >>> q, k = jax.random.normal(jax.random.key(0), (2, 1, 6, 1, 16))
      >>> starts = jnp.array([[True, False, True, False, False, True]])
      >>> mask = dhsa_mask(q, k, starts, max_chunks=3, budget=2)
      >>> mask.to_dense(6, 6)[0, 0].sum(-1).tolist()
      [1, 2, 2, 2, 2, 2]
    """
    query, key, _, batched = check_arrays(query, key, key)
    expect(batched, "query", "[B, T, N, H]", query.shape[1:])
    expect(key.shape[1] == query.shape[1], "key", "query's length", key.shape)
    batch, length = key.shape[:2]
    starts = jnp.asarray(starts)
    expect_shape("starts", starts, (batch, length), (1, length))
    expect(isinstance(budget, int) and budget >= 1, "budget", "at least 1", budget)
    if segment_ids is not None:
        segment_ids = jnp.asarray(segment_ids)
        expect_shape("segment_ids", segment_ids, (batch, length))
        starts |= segment_ids != jnp.roll(segment_ids, 1, 1)

    chunks = Blocks.from_starts(starts, max_chunks)
    first = chunks.starts()
    index = jnp.arange(max_chunks)
    valid = index <= index[:, None]
    if segment_ids is not None:
        document = jnp.take_along_axis(segment_ids, first, 1, mode="clip")
        valid &= document[:, None, :, None] == document[:, None, None, :]
    scores = block_scores(pool_sqrt(query, chunks), pool_sqrt(key, chunks))
    scores = jax.lax.stop_gradient(jnp.where(valid, scores, -jnp.inf))

    order = jnp.argsort(scores, descending=True, stable=True)
    rank = jnp.argsort(order)
    own = index == index[:, None]
    # Tokens of better chunks. Of the own chunk those up to the query: counted later.
    sizes = jnp.where(valid & ~own, chunks.sizes()[:, None, None], 0)
    sizes = jnp.broadcast_to(sizes, scores.shape)
    ranked = jnp.take_along_axis(sizes, order, -1)
    better = jnp.take_along_axis(jnp.cumsum(ranked, -1) - ranked, rank, -1)
    own_rank = jnp.diagonal(rank, axis1=-2, axis2=-1)[..., None]
    ids, first = jnp.asarray(chunks.ids), jnp.asarray(first)
    left = jnp.where(valid, budget - better, 0)
    mask = ChunkBudget(ids, first, left, rank > own_rank)
    return mask if segment_ids is None else mask & Segments(segment_ids)


@tree_class()
class ChunkBudget(Mask):
    """A query sees the first tokens of each chunk, as many as are left of its budget.

    Causal. Query i of chunk c sees those of chunk j that `left[c, j]` lets it, less the
    tokens of its own chunk up to itself where these come first.

    Attributes:
      ids: int32 `[B or 1, T]`, the chunk of each token.
      first: int32 `[B or 1, n]`, the first token of each chunk.
      left: int32 `[B, N, n, n]`.
      own_first: bool `[B, N, n, n]`.
    """

    ids: jax.Array
    first: jax.Array
    left: jax.Array
    own_first: jax.Array

    def __call__(self, batch, head, query, key):
        row, first_of_row = self._chunk(batch, query)
        column, first_of_column = self._chunk(batch, key)
        pair = (batch, head, row, column)
        so_far = jnp.where(self.own_first[pair], query - first_of_row + 1, 0)
        return (key <= query) & (key - first_of_column < self.left[pair] - so_far)

    def bounds(self, tiles):
        batch, head = tiles.batch[:, :, 0], tiles.head[:, :, 0]
        keys = tiles.key_indices()[:, :, 0]
        shape = (-1, *keys.shape[1:])
        key_high = tiles.key_high[:, :, 0]
        column, first_of_column = self._chunk(tiles.batch, keys)
        column = column.reshape(len(column), 1, -1)
        offset = (keys - first_of_column).reshape(shape)

        def row(query):
            chunk, first_of_chunk = self._chunk(batch, query)
            so_far = (query - first_of_chunk + 1)[..., None]
            pair = (batch, head, chunk)
            limit = self.left[pair] - jnp.where(self.own_first[pair], so_far, 0)

            def by_key(limit):  # [B, N, n] to [B, N, nk, keys]
                limit = jnp.take_along_axis(limit, column, -1)
                return limit.reshape(*limit.shape[:2], *keys.shape[2:])

            low, high = query.min(-1)[..., None], query.max(-1)[..., None]
            some = (offset < by_key(limit.max(2))) & (keys <= high[..., None])
            every = offset < by_key(limit.min(2))
            return some.any(-1), every.all(-1) & (key_high <= low)

        queries = tiles.query_indices()[:, :, :, 0]
        some, every = jax.lax.map(row, jnp.moveaxis(queries, 2, 0))
        return jnp.moveaxis(some, 0, 2), jnp.moveaxis(every, 0, 2)

    def _chunk(self, batch, index):
        """The chunk of a token, and where it starts."""
        batch = 0 if len(self.ids) == 1 else batch
        chunk = jnp.asarray(self.ids)[batch, index]
        return chunk, jnp.asarray(self.first)[batch, chunk]
