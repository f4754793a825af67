"""Mixture of Block Attention for video: boxes of tokens, chosen over whole heads."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

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
from attnx.select.routed import attend_tiles, routed_attention, tile_of
from attnx.select.tiles import plan_tiles
from attnx.select.turns import Turn, by_heads
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

    flat = (x.reshape(len(x), -1, *x.shape[-2:]) for x in (query, key, value))
    batch, length, heads, _ = check_arrays(*flat)[0].shape
    most = _most(top_k, threshold, max_blocks)
    boxes = _Boxes(space, block_size, normalize, scope, most)
    options: dict[str, Any] = {"scale": scale, "implementation": implementation}
    # A mask over all pairs; a scale with a gradient, which the query's gives.
    at_once = implementation == "reference" or not isinstance(scale, int | float | None)
    if at_once or scope == "layer":
        arrays = [boxes.gather(x) for x in (query, key, value)]
        choice = boxes.choose(*arrays[:2], threshold)
        out, lse = routed_attention(
            *arrays,
            choice,
            boxes.blocks,
            block_size=boxes.size,
            return_residual=True,
            **options,
        )
        out, lse = boxes.scatter(out), boxes.scatter(lse)
    else:
        if threshold is not None:  # For each of the heads, which take turns.
            shape = (batch, heads) if scope == "head" else (batch, heads, length)
            threshold = jnp.broadcast_to(threshold, shape)
        out, lse = by_heads(
            functools.partial(_attend, boxes, options),
            (query, key, value),
            threshold,
            (),
            pairs=batch * length * min(most, boxes.blocks.count),
        )
    return (out, lse) if return_residual else out


def _attend(boxes, options, *arrays, lists, shared, shares, known, rest, turn):
    """For `by_heads`: what one head needs is made in its turn."""
    arrays = [boxes.gather(turn.of(x)) for x in arrays]
    if known is not None:
        known = tuple(boxes.gather(x) for x in known)
    choice = boxes.choose(*arrays[:2], lists)
    tiles = plan_tiles(
        choice.rows,
        choice.blocks,
        count=boxes.blocks.count,
        tile=tile_of(boxes.size),
    )
    out, lse = attend_tiles(
        *arrays,
        lists=tiles,
        shared=(boxes.blocks, None),
        shares=shares,
        known=known,
        rest=rest,
        turn=Turn(),
        block_size=boxes.size,
        per_row=choice.per_row,
        **options,
    )
    return boxes.scatter(out), boxes.scatter(lse)


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


def _most(top_k, threshold, max_blocks) -> int:
    given = (top_k is not None, threshold is not None, max_blocks is not None)
    expect(
        given in ((True, False, False), (False, True, True)),
        "top_k",
        "top_k alone or threshold with max_blocks",
        f"top_k={top_k}, threshold={threshold}, max_blocks={max_blocks}",
    )
    return max_blocks if top_k is None else top_k


def _check_divides(space, block_size):
    divides = len(block_size) == len(space) and all(
        isinstance(size, int) and size >= 1 and n % size == 0
        for n, size in zip(space, block_size, strict=True)
    )
    expect(divides, "block_size", f"divisors of {space}", block_size)


@dataclasses.dataclass(frozen=True)
class _Boxes:
    """Boxes of space, and how they are chosen: so many a query, or at most as many."""

    space: tuple[int, ...]
    block_size: tuple[int, ...]
    normalize: str
    scope: str
    most: int

    @property
    def size(self):
        return math.prod(self.block_size)

    @property
    def blocks(self):
        return Blocks.regular(math.prod(self.space), self.size)

    def choose(self, query, key, threshold) -> Choice:
        """The choice of `[B, T, N, H]`, box after box. No gradient."""
        query, key = jax.lax.stop_gradient((query, key))
        blocks = self.blocks
        scores = block_scores(query, pool_mean(key, blocks))
        if self.normalize == "softmax":
            scores = row_softmax(scores)
        else:
            scores = min_max(scores, scope=self.scope)
        own = blocks.ids[0][:, None] == jnp.arange(blocks.count)
        options: dict[str, Any] = {"scope": self.scope, "forced": own}
        if threshold is None:
            return top_k_blocks(scores, self.most, **options)
        return threshold_blocks(scores, threshold, max_blocks=self.most, **options)

    def gather(self, x):
        """`[B, *space, ...]` to `[B, T, ...]`, box after box."""
        rank = len(self.space)
        rest = x.shape[1 + rank :]
        sizes = zip(self.space, self.block_size, strict=True)
        cut = [(n // size, size) for n, size in sizes]
        x = x.reshape(len(x), *itertools.chain(*cut), *rest)
        x = x.transpose(_order(rank, x.ndim))
        return x.reshape(len(x), -1, *rest)

    def scatter(self, x):
        """Undoes `gather`."""
        rank, rest = len(self.space), x.shape[2:]
        sizes = zip(self.space, self.block_size, strict=True)
        grid = [n // size for n, size in sizes]
        x = x.reshape(len(x), *grid, *self.block_size, *rest)
        order = _order(rank, x.ndim)
        x = x.transpose([order.index(axis) for axis in range(x.ndim)])
        return x.reshape(len(x), *self.space, *rest)


def _order(rank, ndim):
    """Axes (batch, (box, inside) of each axis, rest) with all boxes first."""
    inner = range(1 + 2 * rank)
    return [0, *inner[1::2], *inner[2::2], *range(1 + 2 * rank, ndim)]
