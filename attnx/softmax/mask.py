"""What a mask is: a predicate on (query, key) that also knows the tiles it touches.

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
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from attnx._tree import tree_class


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
    arrays that broadcast together, and returns whether the query sees the key. It
    should do its per-query and per-key arithmetic before combining the two, so that the
    cost for each pair is a comparison. Overriding `bounds` with a closed form saves the
    evaluation of every pair when block lists are built.
    """

    def __call__(
        self, batch: ArrayLike, head: ArrayLike, query: jax.Array, key: jax.Array
    ) -> jax.Array:
        raise NotImplementedError(f"{type(self).__name__} defines no predicate")

    def at(
        self,
        batch: ArrayLike,
        head: ArrayLike,
        query_start: jax.Array,
        row: jax.Array,
        key_start: jax.Array,
        column: jax.Array,
        /,
    ) -> jax.Array:
        """The predicate on query `query_start + row` and key `key_start + column`.

        What kernels ask about the pairs of a block. A mask overrides it where knowing
        where the block starts makes each pair cheaper.
        """
        return self(batch, head, query_start + row, key_start + column)

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


@tree_class()
class And(Mask):
    left: Mask
    right: Mask

    def __call__(self, batch, head, query, key):
        return self.left(batch, head, query, key) & self.right(batch, head, query, key)

    def at(self, *where):
        return self.left.at(*where) & self.right.at(*where)

    def bounds(self, tiles):
        (some, every), (some_too, every_too) = _both(self, tiles)
        return some & some_too, every & every_too


@tree_class()
class Or(Mask):
    left: Mask
    right: Mask

    def __call__(self, batch, head, query, key):
        return self.left(batch, head, query, key) | self.right(batch, head, query, key)

    def at(self, *where):
        return self.left.at(*where) | self.right.at(*where)

    def bounds(self, tiles):
        (some, every), (some_too, every_too) = _both(self, tiles)
        return some | some_too, every | every_too


@tree_class()
class Not(Mask):
    mask: Mask

    def __call__(self, batch, head, query, key):
        return ~self.mask(batch, head, query, key)

    def at(self, *where):
        return ~self.mask.at(*where)

    def bounds(self, tiles):
        some, every = self.mask.bounds(tiles)
        return ~every, ~some


@tree_class(meta=("fn",))
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


def _indices(low, high, size):
    return jnp.minimum(low[..., None] + jnp.arange(size), high[..., None])


def _both(pair, tiles):
    return pair.left.bounds(tiles), pair.right.bounds(tiles)
