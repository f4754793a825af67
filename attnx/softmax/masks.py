"""Masks: predicates on (query, key) that also know which tiles they touch.

A mask answers two questions. Called with indices it says whether a query sees a key;
`bounds` says, for whole tiles of the score matrix, whether any pair in a tile may be
visible and whether all surely are. The first is evaluated only in partially visible
tiles; the second decides which tiles are visited at all. So a new mask is one small
class, or one call of `from_fn`, and never a new kernel.

Masks are frozen pytrees. A number inside a mask may be a Python int, known when the
program is traced, or an array, known when it runs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from attnx._checks import expect


def mask_class(*, meta: tuple[str, ...] = ()) -> Callable[[type], type]:
    """Makes a class a frozen dataclass and a pytree, `meta` fields being static."""

    def decorate(cls: type) -> type:
        cls = dataclasses.dataclass(frozen=True, eq=False)(cls)
        names = [field.name for field in dataclasses.fields(cls)]
        data = [name for name in names if name not in meta]
        return jax.tree_util.register_dataclass(cls, data, list(meta))

    return decorate


@dataclasses.dataclass(frozen=True)
class Tiles:
    """A grid of score tiles: inclusive index ranges, broadcastable to [B, N, nq, nk].

    `query_low`, `query_high` are `[1 or B, 1, nq, 1]`; `key_low`, `key_high` are
    `[1 or B, 1, 1, nk]`; `batch` is `[B, 1, 1, 1]` and `head` is `[1, N, 1, 1]`.
    """

    batch: jax.Array
    head: jax.Array
    query_low: jax.Array
    query_high: jax.Array
    key_low: jax.Array
    key_high: jax.Array
    block_size: tuple[int, int]

    @classmethod
    def grid(
        cls,
        query_len: int,
        key_len: int,
        block_size: tuple[int, int],
        batch: int = 1,
        heads: int = 1,
    ) -> Tiles:
        query = jnp.arange(0, query_len, block_size[0])[None, None, :, None]
        key = jnp.arange(0, key_len, block_size[1])[None, None, None, :]
        return cls(
            batch=jnp.arange(batch)[:, None, None, None],
            head=jnp.arange(heads)[None, :, None, None],
            query_low=query,
            query_high=jnp.minimum(query + block_size[0], query_len) - 1,
            key_low=key,
            key_high=jnp.minimum(key + block_size[1], key_len) - 1,
            block_size=block_size,
        )

    def query_indices(self) -> jax.Array:
        """Every query of every tile, `[1 or B, 1, nq, 1, block]`; tails repeat."""
        return _indices(self.query_low, self.query_high, self.block_size[0])

    def key_indices(self) -> jax.Array:
        """Every key of every tile, `[1 or B, 1, 1, nk, block]`; tails repeat."""
        return _indices(self.key_low, self.key_high, self.block_size[1])


class Mask:
    """What a query may see. Combine with `&`, `|` and `~`.

    A subclass defines `__call__(batch, head, query, key)`, the arguments being integer
    arrays that broadcast together, and returns whether the query sees the key. It should
    do its per-query and per-key arithmetic before combining the two, so that the cost
    for each pair is a comparison. Overriding `bounds` with a closed form saves the
    evaluation of every pair when block lists are built.
    """

    def __call__(
        self, batch: ArrayLike, head: ArrayLike, query: jax.Array, key: jax.Array
    ) -> jax.Array:
        raise NotImplementedError(f"{type(self).__name__} defines no predicate")

    def bounds(self, tiles: Tiles) -> tuple[jax.Array, jax.Array]:
        """For each tile: may any pair be visible, are all pairs visible.

        Both broadcast to `[B, N, nq, nk]`. The first may err to True and the second to
        False, never the other way. This default evaluates every pair.
        """
        query = tiles.query_indices()
        key = tiles.key_indices()[..., None, :]
        batch, head = tiles.batch[..., None, None], tiles.head[..., None, None]

        def row(query):
            seen = self(batch, head, query[:, :, None, None, :, None], key)
            seen = jnp.asarray(seen)
            shape = jnp.broadcast_shapes(seen.shape, (1, 1, 1, *key.shape[3:]))
            seen = jnp.broadcast_to(seen, shape)
            return seen.any((-2, -1))[:, :, 0], seen.all((-2, -1))[:, :, 0]

        some, every = jax.lax.map(row, jnp.moveaxis(query[:, :, :, 0], 2, 0))
        return jnp.moveaxis(some, 0, 2), jnp.moveaxis(every, 0, 2)

    def to_dense(
        self, query_len: int, key_len: int, *, batch: int = 1, heads: int = 1
    ) -> jax.Array:
        """Evaluates every pair: bool, broadcastable to `[batch, heads, query, key]`."""
        seen = self(
            jnp.arange(batch)[:, None, None, None],
            jnp.arange(heads)[None, :, None, None],
            jnp.arange(query_len)[None, None, :, None],
            jnp.arange(key_len)[None, None, None, :],
        )
        shape = jnp.broadcast_shapes(jnp.shape(seen), (1, 1, query_len, key_len))
        return jnp.broadcast_to(seen, shape)

    def __and__(self, other: Mask) -> Mask:
        return And(self, other) if isinstance(other, Mask) else NotImplemented

    def __or__(self, other: Mask) -> Mask:
        return Or(self, other) if isinstance(other, Mask) else NotImplemented

    def __invert__(self) -> Mask:
        return Not(self)

    def __bool__(self) -> bool:
        raise TypeError("a mask has no truth value: combine masks with & | ~")


@mask_class()
class Full(Mask):
    """Every query sees every key."""

    def __call__(self, batch, head, query, key):
        return jnp.ones((1, 1, 1, 1), bool)

    def bounds(self, tiles):
        return jnp.ones((1, 1, 1, 1), bool), jnp.ones((1, 1, 1, 1), bool)


@mask_class()
class Causal(Mask):
    """A query sees the keys up to its own index."""

    def __call__(self, batch, head, query, key):
        return key <= query

    def bounds(self, tiles):
        some = tiles.key_low <= tiles.query_high
        return some, tiles.key_high <= tiles.query_low


@mask_class()
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
        return self._between(head, query - key, query - key)

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


@mask_class()
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


@mask_class()
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


@mask_class()
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


@mask_class()
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


@mask_class()
class Dense(Mask):
    """The boolean array that `jax.nn` takes: broadcastable to `[B, N, T, S]`."""

    array: jax.Array

    def __call__(self, batch, head, query, key):
        index = (batch, head, query, key)
        sizes = self.array.shape
        return self.array[
            tuple(0 if n == 1 else i for i, n in zip(index, sizes, strict=True))
        ]


@mask_class()
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


@mask_class()
class And(Mask):
    left: Mask
    right: Mask

    def __call__(self, batch, head, query, key):
        return self.left(batch, head, query, key) & self.right(batch, head, query, key)

    def bounds(self, tiles):
        (some, every), (some_too, every_too) = _both(self, tiles)
        return some & some_too, every & every_too


@mask_class()
class Or(Mask):
    left: Mask
    right: Mask

    def __call__(self, batch, head, query, key):
        return self.left(batch, head, query, key) | self.right(batch, head, query, key)

    def bounds(self, tiles):
        (some, every), (some_too, every_too) = _both(self, tiles)
        return some | some_too, every | every_too


@mask_class()
class Not(Mask):
    mask: Mask

    def __call__(self, batch, head, query, key):
        return ~self.mask(batch, head, query, key)

    def bounds(self, tiles):
        some, every = self.mask.bounds(tiles)
        return ~every, ~some


@mask_class(meta=("fn",))
class FromFn(Mask):
    operands: tuple[jax.Array, ...]
    fn: Callable[..., jax.Array]

    def __call__(self, batch, head, query, key):
        return self.fn(batch, head, query, key, *self.operands)


def from_fn(fn: Callable[..., jax.Array], *operands: jax.Array) -> Mask:
    """Makes a mask of `fn(batch, head, query, key, *operands) -> bool`.

    The signature is FlexAttention's `mask_mod`; `fn` gets integer arrays that broadcast
    together. Arrays it needs go in `operands`, so that the mask stays a pytree. Finding
    the visited tiles evaluates `fn` on every pair, once a trace.

    Example:
      >>> from attnx import masks
      >>> sink = masks.from_fn(lambda batch, head, query, key: key < 4)
      >>> streaming = masks.Causal() & (masks.Window(256, 0) | sink)
    """
    return FromFn(operands, fn)


def plot(
    mask: Mask,
    query_len: int,
    key_len: int,
    *,
    block_size: tuple[int, int] | None = None,
    ax=None,
):
    """Draws a mask: visible pairs dark, and with `block_size` the tiles it visits.

    Args:
      mask: the mask; the first sequence and head are drawn.
      query_len: rows.
      key_len: columns.
      block_size: `(queries, keys)` of a tile. Partial tiles are tinted, full ones more.
      ax: matplotlib axes; by default new ones.

    Returns:
      The axes.
    """
    import matplotlib.pyplot as plt
    import numpy as np

    ax = plt.subplots(figsize=(3, 3), layout="constrained")[1] if ax is None else ax
    shade = np.zeros((query_len, key_len))
    if block_size is not None:
        some, every = mask.bounds(Tiles.grid(query_len, key_len, block_size))
        grid = (-(-query_len // block_size[0]), -(-key_len // block_size[1]))
        tint = np.broadcast_to(0.15 * some + 0.15 * every, (1, 1, *grid))[0, 0]
        shade += np.kron(tint, np.ones(block_size))[:query_len, :key_len]
    seen = np.asarray(mask.to_dense(query_len, key_len)[0, 0])
    image = np.where(seen, 0.85, shade)
    ax.imshow(image, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    ax.set(xlabel="key", ylabel="query", xticks=[], yticks=[])
    return ax


@functools.partial(jax.jit, static_argnums=2)
def _indices(low, high, size):
    return jnp.minimum(low[..., None] + jnp.arange(size), high[..., None])


def _at(values, index):
    """A number for all, or one for each batch row or head."""
    return values if jnp.ndim(values) == 0 else jnp.asarray(values)[index]


def _look_up(ids, batch, index):
    return ids[index] if ids.ndim == 1 else ids[batch, index]


def _both(pair, tiles):
    return pair.left.bounds(tiles), pair.right.bounds(tiles)
