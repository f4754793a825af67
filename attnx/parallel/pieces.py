"""Masks over the pieces of a sequence, and of a batch, that a device holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from attnx._checks import expect
from attnx._tree import tree_class
from attnx.softmax.block_mask import BlockMask
from attnx.softmax.mask import And, FromFn, Mask, Not, Or
from attnx.softmax.masks import (
    Causal,
    Dense,
    Full,
    Lengths,
    Offset,
    Power,
    Prefix,
    Segments,
    Strided,
    Window,
)
from attnx.softmax.neighborhood import Neighborhood

# Masks that are the same for all rows of a batch and all heads.
_SAME_FOR_ALL = (Full, Causal, Strided, Power, Neighborhood)
# Those whose arrays have an axis for these at most, and none for tokens.
_OF_INDICES = (*_SAME_FOR_ALL, Window, Prefix, Lengths, FromFn)
# Those whose arrays `sharded` cuts as it does the batch and the heads.
_CUT = (Window, Prefix, Lengths, Segments, Dense)


def to_zigzag(x: jax.Array, devices: int, *, axis: int = 1) -> jax.Array:
    """Orders tokens so that each of P devices gets pieces i and 2P - 1 - i of 2P.

    Under a causal mask an early piece attends to little and a late one to much: so
    paired, all devices have the same to do. Reorder token ids and positions once, not
    the activations of each layer.

    Args:
      x: an array with T tokens along `axis`.
      devices: P; 2 P divides T.
      axis: of the tokens.

    Raises:
      ValueError: 2 P does not divide T.

    Example:
      >>> import jax.numpy as jnp
      >>> from attnx.parallel import from_zigzag, to_zigzag
      >>> to_zigzag(jnp.arange(8), 2, axis=0).tolist()
      [0, 1, 6, 7, 2, 3, 4, 5]
      >>> from_zigzag(to_zigzag(jnp.arange(8), 2, axis=0), 2, axis=0).tolist()
      [0, 1, 2, 3, 4, 5, 6, 7]
    """
    return _reorder(x, axis, _zigzag(x, devices, axis))


def from_zigzag(x: jax.Array, devices: int, *, axis: int = 1) -> jax.Array:
    """The inverse of `to_zigzag`."""
    order = _zigzag(x, devices, axis)
    return _reorder(x, axis, [order.index(i) for i in range(len(order))])


@tree_class(meta=("query_size", "key_size"))
class Pieces(Mask):
    """`mask` over tokens that are pieces of longer sequences.

    Attributes:
      mask: over positions in the whole sequence.
      query_starts: the position of the first query of each piece.
      key_starts: of the first key of each.
      query_size: queries of a piece.
      key_size: keys of a piece.
    """

    mask: Mask
    query_starts: tuple[ArrayLike, ...]
    key_starts: tuple[ArrayLike, ...]
    query_size: int
    key_size: int

    def __call__(self, batch, head, query, key):
        query = _position(query, self.query_starts, self.query_size)
        key = _position(key, self.key_starts, self.key_size)
        return self.mask(batch, head, query, key)

    def bounds(self, tiles):
        # A tile may span pieces: it is what its parts are.
        some, every = jnp.zeros((1, 1, 1, 1), bool), jnp.ones((1, 1, 1, 1), bool)
        queries = _parts(
            tiles.query_low, tiles.query_high, self.query_starts, self.query_size
        )
        for query_low, query_high, has_queries in queries:
            keys = _parts(tiles.key_low, tiles.key_high, self.key_starts, self.key_size)
            for key_low, key_high, has_keys in keys:
                part = dataclasses.replace(
                    tiles,
                    query_low=query_low,
                    query_high=query_high,
                    key_low=key_low,
                    key_high=key_high,
                )
                part_some, part_every = self.mask.bounds(part)
                exists = has_queries & has_keys
                some |= part_some & exists
                every &= part_every | ~exists
        return some, every


@tree_class()
class Rows(Mask):
    """`mask` for a part of its batch and heads, which start at `batch` and `head`."""

    mask: Mask
    batch: ArrayLike = 0
    head: ArrayLike = 0

    def __call__(self, batch, head, query, key):
        return self.mask(batch + self.batch, head + self.head, query, key)

    def bounds(self, tiles):
        batch, head = tiles.batch + self.batch, tiles.head + self.head
        return self.mask.bounds(dataclasses.replace(tiles, batch=batch, head=head))


def of_rows(mask: Mask | BlockMask, batch: ArrayLike, head: ArrayLike):
    """The mask of the rows and heads from these on; `sharded` has cut its arrays."""
    if isinstance(batch, int) and isinstance(head, int) and batch == head == 0:
        return mask

    def leaf(mask):
        if isinstance(mask, Offset | BlockMask):
            return dataclasses.replace(mask, mask=of_rows(mask.mask, batch, head))
        alike = isinstance(mask, _SAME_FOR_ALL + _CUT)
        return mask if alike else Rows(mask, batch, head)

    return _map(leaf, mask)


def of_heads(mask: Mask, head: ArrayLike, gather: Callable) -> Mask:
    """The mask of all tokens for the heads from `head` on; ids are gathered."""

    def leaf(mask):
        if isinstance(mask, Segments):
            return jax.tree.map(gather, mask)
        check_splits(mask)
        alike = isinstance(mask, _SAME_FOR_ALL)
        return mask if alike else Rows(mask, 0, head)

    return _map(leaf, mask)


def key_ids(mask: Mask) -> list[jax.Array]:
    """The ids of keys in a mask of one device's tokens, which go where the keys go.

    Raises:
      ValueError: the mask cannot be cut along the tokens.
    """
    ids = []

    def leaf(mask):
        if isinstance(mask, Segments):
            given = mask.key_value_ids
            ids.append(mask.query_ids if given is None else given)
        else:
            check_splits(mask)
        return mask

    _map(leaf, mask)
    return ids


def of_pieces(mask: Mask, ids: list[jax.Array], *where) -> Mask:
    """The mask of the tokens that are `where`, a `Pieces`, with the keys' ids `ids`."""
    remaining = iter(ids)

    def leaf(mask):
        if isinstance(mask, Segments):
            return Segments(mask.query_ids, next(remaining))
        return mask if isinstance(mask, Full) else Pieces(mask, *where)

    return _map(leaf, mask)


def check_splits(mask: object) -> None:
    """Refuses masks that are not functions of the tokens' indices alone."""
    inner = mask
    while isinstance(inner, Offset | Rows | Pieces):
        inner = inner.mask
    parts = [inner.left, inner.right] if isinstance(inner, And | Or) else []
    parts += [inner.mask] if isinstance(inner, Not) else []
    for part in parts:
        check_splits(part)
    plain = isinstance(inner, Mask) and not any(map(jnp.ndim, jax.tree.leaves(inner)))
    expect(
        bool(parts) or plain or isinstance(inner, _OF_INDICES),
        "mask",
        "a mask that can be cut along the tokens: a function of indices, such as "
        "masks.from_fn makes, or Segments, combined by & | ~",
        type(inner).__name__,
    )


def _map(fn, mask):
    """The mask with each that it is a combination of replaced."""
    if isinstance(mask, And | Or):
        return type(mask)(_map(fn, mask.left), _map(fn, mask.right))
    if isinstance(mask, Not):
        return Not(_map(fn, mask.mask))
    return fn(mask)


def _position(index, starts, size):
    position = index + starts[0]
    for i, start in enumerate(starts[1:], start=1):
        position = jnp.where(index < i * size, position, index - i * size + start)
    return position


def _parts(low, high, starts, size):
    """For each piece, what of a range lies in it, by position, and if any does."""
    for i, start in enumerate(starts):
        first, last = i * size, (i + 1) * size - 1
        shift = start - first
        part = jnp.clip(low, first, last) + shift, jnp.clip(high, first, last) + shift
        yield *part, (low <= last) & (first <= high)


def _zigzag(x, devices, axis):
    count, length = 2 * devices, x.shape[axis]
    expect(devices >= 1, "devices", "at least 1", devices)
    expect(length % count == 0, "x", f"a multiple of {count} tokens", length)
    return [piece for i in range(devices) for piece in (i, count - 1 - i)]


def _reorder(x, axis, order):
    parts = jnp.split(x, len(order), axis)
    return jnp.concatenate([parts[i] for i in order], axis)
