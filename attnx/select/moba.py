"""Mixture of Block Attention: each query attends to its own block and a few others."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnx._checks import expect, expect_shape
from attnx.select.blocks import (
    Blocks,
    check_block_size,
    document_starts,
    pool_mean,
)
from attnx.select.choice import Choice
from attnx.select.chosen import Chosen
from attnx.select.routed import routed_attention
from attnx.select.top_k import top_k_pooled_blocks
from attnx.softmax import KernelConfig, dot_product_attention
from attnx.softmax.engine import check_arrays
from attnx.softmax.mask import Mask
from attnx.softmax.masks import Causal, Offset, Segments


def moba_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    block_size: int,
    top_k: int,
    segment_ids: jax.Array | None = None,
    scale: float | jax.Array | None = None,
    implementation: str | KernelConfig | None = None,
    return_residual: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attends causally to a query's own block and to the best blocks before it.

    Mixture of Block Attention (arXiv 2502.13189, eq. 2 to 6). A block before the
    query's own is scored by the query's product with the mean of its keys; the own
    block is always attended, up to the query itself. Exact, and strictly causal: what
    a token chooses and what it sees depends on no later token. The choice has no
    gradient.

    Args:
      query: `[B, T, N, H]`, with positions applied.
      key: `[B, T, K, H]`; K divides N. Each query head chooses for itself.
      value: `[B, T, K, V]`.
      block_size: tokens of a block.
      top_k: blocks that a query attends, its own included: 1 is block-diagonal. Fewer
        where there are fewer before it; of equal scores the earlier block.
      segment_ids: integers `[B, T]` that tell packed documents apart: each run of equal
        ids is a document, cut into blocks from its own start, and comes out as it would
        alone. Padding is a document like any other.
      scale: factor on the scores of attention, by default `H ** -0.5`.
      implementation: as in `dot_product_attention`. "reference" masks the whole score
        matrix; the others gather the queries of each block, with time and memory in
        proportion to what may be chosen.
      return_residual: also return the log-sum-exp.

    Returns:
      The output `[B, T, N, V]` in query's dtype; with `return_residual` also the
      natural log-sum-exp, float32 `[B, T, N]`.

    Raises:
      ValueError: shapes or options that do not fit.
      NotImplementedError: an `implementation` that does not serve the call.

    Example:
      >>> import jax, attnx
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 64, 2, 16))
      >>> attnx.moba_attention(q, k, v, block_size=8, top_k=3).shape
      (1, 64, 2, 16)
      >>> every = attnx.moba_attention(q, k, v, block_size=8, top_k=8)
      >>> dense = attnx.dot_product_attention(q, k, v, is_causal=True)
      >>> bool(abs(every - dense).max() < 1e-5)
      True
    """
    query, key, value, batched = check_arrays(query, key, value)
    expect(batched, "query", "[B, T, N, H]", query.shape[1:])
    expect(key.shape[1] == query.shape[1], "key", "query's length", key.shape)
    cut = _Cut.of(key, block_size, segment_ids)
    # Whoever asks for no kernel gets none for the choice either.
    plain = implementation if implementation in ("reference", "xla") else None
    choice = _choose(query, key, cut, top_k, implementation=plain)
    options: dict[str, Any] = {
        "scale": scale,
        "implementation": implementation,
        "return_residual": True,
    }
    if choice is None or implementation == "reference":
        mask = _mask(choice, cut)
        out, lse = dot_product_attention(query, key, value, mask=mask, **options)
    else:
        out, lse = routed_attention(
            query,
            key,
            value,
            choice,
            cut.blocks,
            block_size=block_size,
            beside=_mask(None, cut),
            **options,
        )
    return (out, lse) if return_residual else out


def moba_mask(
    query: jax.Array,
    key: jax.Array,
    *,
    block_size: int,
    top_k: int,
    segment_ids: jax.Array | None = None,
    query_start: jax.Array | None = None,
) -> Mask:
    """Says which keys each query of `moba_attention` sees.

    For looking at a choice, and for the newest queries of a sequence whose keys are in
    a cache: `decode_attention` takes the mask.

    Args:
      query: `[B, T, N, H]`.
      key: `[B, S, K, H]`; K divides N.
      block_size: as in `moba_attention`.
      top_k: as in `moba_attention`.
      segment_ids: integers `[B, S]`, as in `moba_attention`.
      query_start: int `[B]`, the position of the first query among the keys; by default
        0.

    Returns:
      The mask over positions in the sequence.

    Raises:
      ValueError: shapes or options that do not fit.

    Example:
      >>> import jax
      >>> from attnx.select import moba_mask
      >>> q, k = jax.random.normal(jax.random.key(0), (2, 1, 6, 1, 16))
      >>> moba_mask(q, k, block_size=2, top_k=1).to_dense(6, 6)[0, 0].sum(-1).tolist()
      [1, 2, 1, 2, 1, 2]
      >>> moba_mask(q, k, block_size=2, top_k=2).to_dense(6, 6)[0, 0].sum(-1).tolist()
      [1, 2, 3, 4, 3, 4]
    """
    query, key, _, batched = check_arrays(query, key, key)
    expect(batched, "query", "[B, T, N, H]", query.shape[1:])
    if query_start is not None:
        query_start = jnp.asarray(query_start)
        expect_shape("query_start", query_start, query.shape[:1])
    cut = _Cut.of(key, block_size, segment_ids)
    return _mask(
        _choose(query, key, cut, top_k, query_start=query_start), cut, query_start
    )


class _Cut(NamedTuple):
    """The sequence cut into documents, and these into blocks, int32 `[B or 1, S]`.

    Attributes:
      document: where the document of each token starts.
      own: where the block of each token starts.
      block_size: tokens of a block.
      blocks: those of full size, numbered by the S // block_size cells of the sequence
        in which they start: no two start in one. The last block of a document may be
        shorter, but it is before no query.
    """

    document: jax.Array | np.ndarray
    own: jax.Array | np.ndarray
    block_size: int
    blocks: Blocks

    @classmethod
    def of(cls, key, block_size, segment_ids):
        check_block_size(block_size)
        batch, length = key.shape[:2]
        # NumPy: without documents the block lists are known when the call is traced.
        index = np.arange(length, dtype=np.int32)[None]
        if segment_ids is None:
            document = np.zeros_like(index)
        else:
            segment_ids = jnp.asarray(segment_ids)
            expect_shape("segment_ids", segment_ids, (batch, length))
            document = document_starts(segment_ids)
        own = index - (index - document) % block_size
        last = own + block_size - 1
        count = length // block_size
        is_full = last < length
        if segment_ids is not None:
            ends = jnp.take_along_axis(document, jnp.minimum(last, length - 1), 1)
            is_full &= ends == document
        ids = count + (own // block_size - count) * is_full
        return cls(document, own, block_size, Blocks(ids, count))


def _choose(
    query, key, cut, top_k, *, query_start=None, implementation=None
) -> Choice | None:
    """The blocks before its own that each query attends, unless there can be none."""
    expect(isinstance(top_k, int) and top_k >= 1, "top_k", "at least 1", top_k)
    if top_k == 1 or cut.blocks.count == 0:
        return None
    document, own = cut.document, cut.own
    if query_start is not None:
        position = query_start[:, None] + np.arange(query.shape[1])
        document, own = (
            jnp.take_along_axis(jnp.asarray(x), position, 1, mode="clip")
            for x in (document, own)
        )
    # In a document full blocks start in neighbouring cells.
    first = document // cut.block_size
    stop = first + (own - document) // cut.block_size
    return top_k_pooled_blocks(
        query,
        pool_mean(key, cut.blocks),
        top_k - 1,
        first=first,
        stop=stop,
        implementation=implementation,
    )


def _mask(choice, cut, query_start=None):
    own = Segments(cut.own[0] if len(cut.own) == 1 else cut.own)
    if choice is None:
        return Causal() & own
    chosen = Chosen(choice.to_tiles(), cut.blocks.ids)
    if query_start is not None:
        chosen = Offset(chosen, query=-query_start)
    return Causal() & own | chosen
