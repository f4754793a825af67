"""Boxes of tokens in space: their order, and the choice among them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnx.select.blocks import Blocks
from attnx.select.choice import mark_by_threshold, mark_top_k, min_max, row_softmax
from attnx.select.marks import Marks
from attnx.select.routed import tile_of
from attnx.select.scores import scores_in_turn
from attnx.select.turns import Turn

# Scores of one step of the choice, if one head has no more: in fewer steps there are
# fewer small kernels. Memory holds scores that are scaled or summed several times.
_SCORES, _SCALED = 1 << 26, 1 << 25


@dataclasses.dataclass(frozen=True)
class Boxes:
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

    @functools.partial(jax.jit, static_argnums=0)
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
