"""Mixture of Block Attention for video: boxes of tokens, chosen over whole heads."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from attnx._checks import expect
from attnx.select.boxes import Boxes
from attnx.select.choice import listed
from attnx.select.routed import attend_tiles, routed_attention
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

    arrays = [x.reshape(len(x), -1, *x.shape[-2:]) for x in (query, key, value)]
    *arrays, _ = check_arrays(*arrays)
    most = _most(top_k, threshold, max_blocks)
    boxes = Boxes(space, block_size, normalize, scope, most)
    # A mask over all pairs; a scale with a gradient, which the query's gives.
    at_once = implementation == "reference" or not isinstance(scale, int | float | None)
    # Scores have no reference of their own, and kernels only for what these serve.
    by = "xla" if implementation in ("reference", "xla") else None
    marks = boxes.choose(*arrays[:2], threshold, implementation=by)
    options: dict[str, Any] = {
        "block_size": boxes.size,
        "scale": scale,
        "implementation": implementation,
    }
    if at_once or scope == "layer":
        key, value = map(boxes.gather, arrays[1:])
        out, lse = routed_attention(
            arrays[0],
            key,
            value,
            listed(marks.words, marks.count, most, scope),
            boxes.blocks,
            return_residual=True,
            **options,
        )
    else:
        out, lse = by_heads(
            functools.partial(_attend, boxes, options),
            tuple(arrays),
            marks,
            (),
            pairs=len(query) * marks.slots,
        )
    out, lse = (x.reshape(query.shape[:-1] + x.shape[3:]) for x in (out, lse))
    return (out, lse) if return_residual else out


def _attend(boxes, options, *arrays, shared, turn, **rest):
    """For `by_heads`: the keys of one head are put in order in its turn."""
    query, key, value = arrays[0], *map(turn.of, arrays[1:])
    batch, length, heads, size = query.shape
    among = None
    if 1 < turn.steps == heads:  # A head's queries are taken from where they lie.
        among = turn.number, heads
        query = query.reshape(batch, length * heads, 1, size)
    else:
        query = turn.of(query)
    return attend_tiles(
        query,
        boxes.gather(key),
        boxes.gather(value),
        shared=(boxes.blocks, None),
        turn=Turn(),
        per_row=None,
        among=among,
        **rest,
        **options,
    )


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
