"""The masks of the field, one small class each."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from attnx._checks import expect
from attnx._tree import tree_class
from attnx.softmax.mask import Mask


@tree_class()
class Full(Mask):
    """Every query sees every key."""

    def __call__(self, batch, head, query, key):
        return jnp.ones((1, 1, 1, 1), bool)

    def bounds(self, tiles):
        return jnp.ones((1, 1, 1, 1), bool), jnp.ones((1, 1, 1, 1), bool)


@tree_class()
class Causal(Mask):
    """A query sees the keys up to its own index."""

    def __call__(self, batch, head, query, key):
        return key <= query

    def bounds(self, tiles):
        some = tiles.key_low <= tiles.query_high
        return some, tiles.key_high <= tiles.query_low


@tree_class()
class Window(Mask):
    """A query sees `left` keys before its index, its own, and `right` keys after.

    Truncated at the edges, as `local_window_size` in `jax.nn`; the window that shifts
    inward instead is `Neighborhood`. None means no limit on that side. An array `[N]`
    gives each head its own.
    """

    left: ArrayLike | None
    right: ArrayLike | None

    def __post_init__(self):
        for side in ("left", "right"):
            size = getattr(self, side)
            if isinstance(size, int):
                expect(size >= 0, f"Window {side}", "at least 0", size)

    def __call__(self, batch, head, query, key):
        # Each side alone before they meet: a comparison for each pair.
        seen = jnp.ones((1, 1, 1, 1), bool)
        if self.left is not None:
            seen &= query - _at(self.left, head) <= key
        if self.right is not None:
            seen &= key - _at(self.right, head) <= query
        return seen

    def bounds(self, tiles):
        low = tiles.query_low - tiles.key_high
        high = tiles.query_high - tiles.key_low
        return self._between(tiles.head, low, high), self._between(
            tiles.head, high, low
        )

    def _between(self, head, low, high):
        seen = jnp.ones((1, 1, 1, 1), bool)
        if self.left is not None:
            seen &= low <= _at(self.left, head)
        if self.right is not None:
            seen &= -_at(self.right, head) <= high
        return seen


@tree_class()
class Prefix(Mask):
    """Every query sees the first `length` keys; an array `[B]` gives one a sequence.

    `Causal() | Prefix(n)` is the prefix language model.
    """

    length: ArrayLike

    def __call__(self, batch, head, query, key):
        return key < _at(self.length, batch)

    def bounds(self, tiles):
        length = _at(self.length, tiles.batch)
        return tiles.key_low < length, tiles.key_high < length


@tree_class()
class Lengths(Mask):
    """Only the first `query` queries and `key` keys of each sequence count: int [B]."""

    query: ArrayLike | None
    key: ArrayLike | None

    def __call__(self, batch, head, query, key):
        return self._inside(batch, query, key)

    def bounds(self, tiles):
        return (
            self._inside(tiles.batch, tiles.query_low, tiles.key_low),
            self._inside(tiles.batch, tiles.query_high, tiles.key_high),
        )

    def _inside(self, batch, query, key):
        seen = jnp.ones((1, 1, 1, 1), bool)
        if self.query is not None:
            seen &= query < _at(self.query, batch)
        if self.key is not None:
            seen &= key < _at(self.key, batch)
        return seen


@tree_class()
class Segments(Mask):
    """A query sees the keys with its own segment id: documents packed in a sequence.

    `query_ids` is int `[B, T]` or `[T]`, `key_value_ids` is `[B, S]` or `[S]` and
    defaults to `query_ids`. Tiles are skipped by the range of ids they hold, so ids
    that grow along the sequence skip best; any ids are right.
    """

    query_ids: jax.Array
    key_value_ids: jax.Array | None = None

    def __call__(self, batch, head, query, key):
        query_ids, key_ids = self._ids()
        return _look_up(query_ids, batch, query) == _look_up(key_ids, batch, key)

    def bounds(self, tiles):
        query_ids, key_ids = self._ids()
        batch = tiles.batch[..., None]
        query = _look_up(query_ids, batch, tiles.query_indices())
        key = _look_up(key_ids, batch, tiles.key_indices())
        query_low, query_high = query.min(-1), query.max(-1)
        key_low, key_high = key.min(-1), key.max(-1)
        some = (query_low <= key_high) & (key_low <= query_high)
        every = (query_low == key_high) & (key_low == query_high)
        return some, every & (query_low == query_high)

    def _ids(self):
        key_ids = self.query_ids if self.key_value_ids is None else self.key_value_ids
        return self.query_ids, key_ids


@tree_class()
class Strided(Mask):
    """A query sees the keys at distances divisible by `stride` (Sparse Transformer)."""

    stride: ArrayLike

    def __post_init__(self):
        if isinstance(self.stride, int):
            expect(self.stride >= 1, "Strided stride", "at least 1", self.stride)

    def __call__(self, batch, head, query, key):
        # Both remainders are taken before they meet: a comparison for each pair.
        return query % self.stride == key % self.stride

    def bounds(self, tiles):
        low = tiles.query_low - tiles.key_high
        high = tiles.query_high - tiles.key_low
        some = high // self.stride * self.stride >= low
        one = (low == high) | (jnp.asarray(self.stride) == 1)
        return some, some & one


@tree_class()
class Power(Mask):
    """A query sees the blocks before it at distances 0 and powers of two.

    PowerAttention (arXiv 2503.03588): with blocks of one token, a stack of n layers
    carries a token to all distances with at most n binary ones, so to every distance up
    to 2 ** (n + 1) - 2, at log2(T) keys a query. Causal. Blocks are counted from the
    first token; all of the last `window` of them are seen, the own one included.

    The paper's practical setting, with the first block for a sink, is
    `Power(256, window=5) | Causal() & Prefix(256)`.
    """

    block_size: ArrayLike = 1
    window: ArrayLike = 1

    def __post_init__(self):
        for name in ("block_size", "window"):
            size = getattr(self, name)
            if isinstance(size, int):
                expect(size >= 1, f"Power {name}", "at least 1", size)

    def __call__(self, batch, head, query, key):
        distance = query // self.block_size - key // self.block_size
        return (key <= query) & self._holds(distance)

    def bounds(self, tiles):
        query_low, query_high, key_low, key_high = (
            x // self.block_size
            for x in (tiles.query_low, tiles.query_high, tiles.key_low, tiles.key_high)
        )
        low = jnp.maximum(query_low - key_high, 0)
        high = query_high - key_low
        # The largest power of two up to `high` is the first to look at.
        power = jnp.left_shift(1, 31 - jax.lax.clz(jnp.maximum(high, 1)))
        some = self._holds(low) | (low <= power) & (power <= high)
        every = (high < self.window) | (low == high) & self._holds(low)
        return (
            (tiles.key_low <= tiles.query_high) & some,
            (tiles.key_high <= tiles.query_low) & every,
        )

    def _holds(self, distance):
        return (distance < self.window) | (distance & (distance - 1) == 0)


@tree_class()
class Dense(Mask):
    """The boolean array that `jax.nn` takes: broadcastable to `[B, N, T, S]`."""

    array: jax.Array

    def __call__(self, batch, head, query, key):
        index = (batch, head, query, key)
        sizes = self.array.shape
        return jnp.asarray(self.array)[
            tuple(0 if n == 1 else i for i, n in zip(index, sizes, strict=True))
        ]


@tree_class()
class Offset(Mask):
    """`mask` seen from elsewhere: index i stands for the mask's index i + offset.

    With `query=lengths - T` the last T tokens of a sequence are queries against a
    cache. Offsets are ints or `[B]`.
    """

    mask: Mask
    query: ArrayLike = 0
    key: ArrayLike = 0

    def __call__(self, batch, head, query, key):
        return self.mask(
            batch, head, query + _at(self.query, batch), key + _at(self.key, batch)
        )

    def bounds(self, tiles):
        query, key = _at(self.query, tiles.batch), _at(self.key, tiles.batch)
        moved = dataclasses.replace(
            tiles,
            query_low=tiles.query_low + query,
            query_high=tiles.query_high + query,
            key_low=tiles.key_low + key,
            key_high=tiles.key_high + key,
        )
        return self.mask.bounds(moved)


def _at(values, index):
    """A number for all, or one for each batch row or head."""
    return values if jnp.ndim(values) == 0 else jnp.asarray(values)[index]


def _look_up(ids, batch, index):
    ids = jnp.asarray(ids)
    return ids[index] if ids.ndim == 1 else ids[batch, index]
