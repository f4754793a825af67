"""Mixture of Block Attention for video: boxes of tokens, chosen over whole heads."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from attnx._checks import expect
from attnx.select.blocks import Blocks, block_scores, pool_mean
from attnx.select.choice import (
    Choice,
    min_max,
    row_softmax,
    threshold_blocks,
    top_k_blocks,
)
from attnx.select.routed import routed_attention
from attnx.softmax import KernelConfig
from attnx.softmax.engine import check_arrays


def vmoba_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    block_size: Sequence[int],
    top_k: int | None = None,
    threshold: float | jax.Array | None = None,
    max_blocks: int | None = None,
    scope: str = "head",
    normalize: str = "min_max",
    scale: float | jax.Array | None = None,
    implementation: str | KernelConfig | None = None,
    return_residual: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attends to a query's own box of tokens and to the boxes that score best.

    VMoBA (arXiv 2506.23858), not causal. Space is cut into boxes; each is scored by the
    product of query and mean key; pairs of queries and boxes compete over a whole head
    or layer, so that queries with more to find get more. The choice has no gradient.

    Args:
      query: `[B, *space, N, H]`.
      key: `[B, *space, K, H]`; K divides N.
      value: `[B, *space, K, V]`.
      block_size: tokens of a box along each axis of space, which it divides; see
        `vmoba_block_sizes` for the paper's layers.
      top_k: boxes a query, on average over the scope, its own included.
      threshold: instead of `top_k`: the share of all normalized scores to attend, as in
        `threshold_blocks`; the paper takes 0.25.
      max_blocks: with `threshold`, the most boxes a query, on average over the scope.
        Time and memory follow it; what the threshold asks beyond is left out.
      scope: "row", "head" or "layer": what competes.
      normalize: "min_max", over the scope, as in the paper; or "softmax", of each query
        over the boxes, which keeps more of the attention where scores spread unevenly.
      scale: factor on the scores of attention, by default `H ** -0.5`.
      implementation: as in `routed_attention`.
      return_residual: also return the log-sum-exp.

    Returns:
      The output `[B, *space, N, V]`; with `return_residual` also the natural
      log-sum-exp, float32 `[B, *space, N]`.

    Raises:
      ValueError: shapes or options that do not fit.
      NotImplementedError: an `implementation` that does not serve the call.

    Example:
      >>> import jax, attnx
      >>> video = jax.random.normal(jax.random.key(0), (1, 4, 4, 6, 2, 16))
      >>> attnx.vmoba_attention(
      ...     video, video, video, block_size=(2, 2, 3), threshold=0.25, max_blocks=4
      ... ).shape
      (1, 4, 4, 6, 2, 16)
    """
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    expect(query.ndim >= 4, "query", "[B, *space, N, H]", query.shape)
    space, block_size = query.shape[1:-2], tuple(block_size)
    for name, x in (("key", key), ("value", value)):
        fits = x.ndim == query.ndim and x.shape[1:-2] == space
        expect(fits, name, f"query's space {space}", x.shape)
    _check_divides(space, block_size)
    options = ("min_max", "softmax")
    expect(normalize in options, "normalize", f"one of {options}", repr(normalize))

    arrays = (_to_blocks(x, block_size) for x in (query, key, value))
    query, key, value, _ = check_arrays(*arrays)
    size = math.prod(block_size)
    blocks = Blocks.regular(query.shape[1], size)
    scores = block_scores(query, pool_mean(key, blocks))
    if normalize == "softmax":
        scores = row_softmax(scores)
    else:
        scores = min_max(scores, scope=scope)
    own = blocks.ids[0][:, None] == jnp.arange(blocks.count)
    choice = _choose(scores, own, top_k, threshold, max_blocks, scope)
    out, lse = routed_attention(
        query,
        key,
        value,
        choice,
        blocks,
        block_size=size,
        scale=scale,
        implementation=implementation,
        return_residual=True,
    )
    out, lse = (_from_blocks(x, space, block_size) for x in (out, lse))
    return (out, lse) if return_residual else out


def vmoba_block_sizes(
    space: tuple[int, int, int],
    *,
    temporal: int,
    spatial: tuple[int, int],
    spatiotemporal: tuple[int, int, int],
) -> tuple[tuple[int, int, int], ...]:
    """The boxes through which VMoBA's layers cycle: in time, in space, in both.

    Args:
      space: frames, height and width, in tokens.
      temporal: frames of a box as high and wide as the video.
      spatial: height and width of a box as long as the video.
      spatiotemporal: a box smaller along every axis.

    Returns:
      Three of `block_size`; layer l takes number `l % 3`.

    Raises:
      ValueError: boxes that do not divide the space.

    Example:
      >>> from attnx.select import vmoba_block_sizes
      >>> vmoba_block_sizes(
      ...     (8, 12, 20), temporal=2, spatial=(4, 5), spatiotemporal=(4, 6, 5)
      ... )
      ((2, 12, 20), (8, 4, 5), (4, 6, 5))
    """
    frames, height, width = space
    sizes = ((temporal, height, width), (frames, *spatial), tuple(spatiotemporal))
    for size in sizes:
        _check_divides(space, size)
    return sizes


def _choose(scores, own, top_k, threshold, max_blocks, scope) -> Choice:
    given = (top_k is not None, threshold is not None, max_blocks is not None)
    if given == (True, False, False):
        return top_k_blocks(scores, top_k, scope=scope, forced=own)
    if given == (False, True, True):
        return threshold_blocks(
            scores, threshold, scope=scope, max_blocks=max_blocks, forced=own
        )
    raise ValueError(
        "top_k: expected top_k alone or threshold with max_blocks, got "
        f"top_k={top_k}, threshold={threshold}, max_blocks={max_blocks}"
    )


def _check_divides(space, block_size):
    divides = len(block_size) == len(space) and all(
        isinstance(size, int) and size >= 1 and n % size == 0
        for n, size in zip(space, block_size, strict=True)
    )
    expect(divides, "block_size", f"divisors of {space}", block_size)


def _to_blocks(x, block_size):
    """`[B, *space, ...]` to `[B, T, ...]`, box after box."""
    rank = len(block_size)
    space, rest = x.shape[1 : 1 + rank], x.shape[1 + rank :]
    cut = [(n // size, size) for n, size in zip(space, block_size, strict=True)]
    x = x.reshape(len(x), *itertools.chain(*cut), *rest)
    x = x.transpose(_order(rank, x.ndim))
    return x.reshape(len(x), -1, *rest)


def _from_blocks(x, space, block_size):
    """Undoes `_to_blocks`."""
    rank, rest = len(block_size), x.shape[2:]
    grid = [n // size for n, size in zip(space, block_size, strict=True)]
    x = x.reshape(len(x), *grid, *block_size, *rest)
    order = _order(rank, x.ndim)
    x = x.transpose([order.index(axis) for axis in range(x.ndim)])
    return x.reshape(len(x), *space, *rest)


def _order(rank, ndim):
    """Axes (batch, (box, inside) of each axis, rest) with all boxes first."""
    inner = range(1 + 2 * rank)
    return [0, *inner[1::2], *inner[2::2], *range(1 + 2 * rank, ndim)]
