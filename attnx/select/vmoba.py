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
import numpy as np

from attnx._checks import expect
from attnx.select.blocks import Blocks
from attnx.select.choice import (
    listed,
    mark_by_threshold,
    mark_top_k,
    min_max,
    row_softmax,
)
from attnx.select.marks import Marks
from attnx.select.routed import attend_tiles, routed_attention, tile_of
from attnx.select.scores import scores_in_turn
from attnx.select.turns import Turn, by_heads
from attnx.softmax import KernelConfig
from attnx.softmax.engine import check_arrays

# Scores of one step of the choice, if one head has no more: in fewer steps there are
# fewer small kernels. Memory holds scores that are scaled or summed several times.
_SCORES, _SCALED = 1 << 26, 1 << 24


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
    boxes = _Boxes(space, block_size, normalize, scope, most)
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

    def choose(self, query, key, threshold, *, implementation) -> Marks:
        """The choice of `[B, T, N, H]`, a few heads at a time. No gradient."""
        query, key = jax.lax.stop_gradient((query, key))
        batch, length, heads, _ = query.shape
        key_heads, count = key.shape[2], self.blocks.count
        means = self._means(key)
        if threshold is not None and self.scope != "layer":
            shape = (batch, heads) if self.scope == "head" else (batch, heads, length)
            threshold = jnp.broadcast_to(threshold, shape)

        def some(number):
            turn = Turn(number, steps)
            share = None if threshold is None else turn.of(threshold, 1)
            return self._mark(query, means, turn, share, implementation)

        steps = 1
        if self.scope != "layer":
            scores = batch * heads // key_heads * length * count
            most = _SCORES if self._is_plain(threshold) else _SCALED
            steps = min(
                n
                for n in range(1, key_heads + 1)
                if key_heads % n == 0
                and (n == key_heads or key_heads // n * scores <= most)
            )
        if steps == 1:
            words = some(0)
        else:
            step = lambda i, _: (i + 1, some(i))
            _, words = jax.lax.scan(step, jnp.int32(0), length=steps)
            words = jnp.moveaxis(words, 0, 1)
        words = words.reshape(batch, heads, length, -1)
        return Marks(words, count, length * min(self.most, count), tile_of(self.size))

    def _mark(self, query, means, turn, threshold, implementation):
        own, count = jnp.asarray(self._ids(), jnp.int32), self.blocks.count
        scored = functools.partial(
            scores_in_turn, query, means, turn, implementation=implementation
        )
        if self._is_plain(threshold):
            return mark_top_k(scored(own=own), self.most, scope=self.scope)
        if self.normalize == "softmax":
            scores = row_softmax(scored())
        else:
            scores = min_max(scored(), scope=self.scope)
        forced = own[:, None] == jnp.arange(count)
        options: dict[str, Any] = {"scope": self.scope, "forced": forced}
        if threshold is None:
            return mark_top_k(scores, self.most, **options)
        return mark_by_threshold(scores, threshold, max_blocks=self.most, **options)

    def _is_plain(self, threshold):
        """Whether scores are ranked as they are: the best few are so at any scale."""
        return threshold is None and self.normalize == "min_max"

    def _ids(self):
        """The box of each token."""
        where = np.indices(self.space).reshape(len(self.space), -1)
        box = where // np.reshape(self.block_size, (-1, 1))
        return np.ravel_multi_index(tuple(box), tuple(n for n, _ in self._cut()))

    def _means(self, x):
        """The mean of each box of `[B, T, K, H]`, float32 or better `[B, n, K, H]`."""
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        shape = [len(x), *self.space, *x.shape[2:]]
        # One axis after the other, the last first: each pass is over what is left. In
        # one, threads would be few and each would add up a whole box.
        for axis in range(len(self.space), 0, -1):
            shape[axis : axis + 1] = self._cut()[axis - 1]
            x = jax.lax.optimization_barrier(x.reshape(shape).sum(axis + 1))
            del shape[axis + 1]
        return x.reshape(shape[0], -1, *shape[-2:]) / self.size

    def _cut(self):
        """How many boxes there are along each axis, and how long they are."""
        sizes = zip(self.space, self.block_size, strict=True)
        return [(n // size, size) for n, size in sizes]

    def gather(self, x):
        """`[B, T, ...]`, token after token, with those of a box next to each other."""
        shape = x.shape
        x = x.reshape(shape[0], *itertools.chain(*self._cut()), *shape[2:])
        return x.transpose(_order(len(self.space), x.ndim)).reshape(shape)


def _order(rank, ndim):
    """Axes (batch, (box, inside) of each axis, rest) with all boxes first."""
    inner = range(1 + 2 * rank)
    return [0, *inner[1::2], *inner[2::2], *range(1 + 2 * rank, ndim)]
