"""Marks in rows, packed into words, and how many there are."""

from __future__ import annotations

import jax
import jax.numpy as jnp

_BITS = 32


def pack(marked: jax.Array) -> jax.Array:
    """Bool `[..., n]` as words uint32 `[..., W]`, as few and as short as they may be.

    Bit j of word w is mark number `w * bits + j`, for words of `bits` bits.
    """
    count = marked.shape[-1]
    bits = _bits(count)
    pad = [(0, 0)] * (marked.ndim - 1) + [(0, -count % bits)]
    cells = jnp.pad(marked, pad).reshape(*marked.shape[:-1], -1, bits)
    return _words(cells, -1)


def unpack(words: jax.Array, count: int) -> jax.Array:
    """Undoes `pack`."""
    bits = _bits(count)
    marked = (words[..., None] >> jnp.arange(bits, dtype=jnp.uint32)) & 1
    return _marks(marked > 0, count)


def ranks(words: jax.Array, count: int) -> jax.Array:
    """How many marks of its row come before each place of `[..., n]`, int32."""
    bits = _bits(count)
    each = _ones(words)
    before = jnp.cumsum(each, -1) - each
    inside = _ones(words[..., None] & _below(bits))
    return _marks(before[..., None] + inside, count)


def counts(words: jax.Array) -> jax.Array:
    """The marks of each row, int32 `[...]`."""
    return _ones(words).sum(-1)


def first_marks(words: jax.Array, limit: jax.Array, count: int) -> jax.Array:
    """The first `limit` marks of each row, packed."""
    kept = unpack(words, count) & (ranks(words, count) < limit[..., None])
    return pack(kept)


def ranks_in_columns(marked: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How many marks of its column are above each place of `[..., T, n]`, int32.

    And how many there are in each column, `[..., n]`.
    """
    rows, count = marked.shape[-2:]
    pad = [(0, 0)] * (marked.ndim - 2) + [(0, -rows % _BITS), (0, 0)]
    cells = jnp.pad(marked, pad).reshape(*marked.shape[:-2], -1, _BITS, count)
    words = _words(cells, -2)
    each = _ones(words)
    stops = jnp.cumsum(each, -2)
    inside = _ones(words[..., None, :] & _below(_BITS)[:, None])
    found = (stops - each)[..., None, :] + inside
    return found.reshape(*marked.shape[:-2], -1, count)[..., :rows, :], stops[
        ..., -1, :
    ]


def running_sum(x: jax.Array) -> jax.Array:
    """The inclusive sums of `[..., size]`, int32, in two levels."""
    size = x.shape[-1]
    width = 1 << (max(size - 1, 1).bit_length() // 2)
    pad = [(0, 0)] * (x.ndim - 1) + [(0, -size % width)]
    x = jnp.pad(x, pad).reshape(*x.shape[:-1], -1, width).astype(jnp.int32)
    inner = jnp.cumsum(x, -1)
    outer = jnp.cumsum(inner[..., -1], -1)
    sums = inner + (outer - inner[..., -1])[..., None]
    return sums.reshape(*x.shape[:-2], -1)[..., :size]


def _bits(count):
    return max(1, -(-count // -(-count // _BITS)))


def _words(cells, axis):
    bit = jnp.arange(cells.shape[axis], dtype=jnp.uint32)
    bit = bit.reshape(-1, *[1] * (-1 - axis))
    return (cells.astype(jnp.uint32) << bit).sum(axis, dtype=jnp.uint32)


def _ones(words):
    return jax.lax.population_count(words).astype(jnp.int32)


def _below(bits):
    return (jnp.uint32(1) << jnp.arange(bits, dtype=jnp.uint32)) - 1


def _marks(cells, count):
    return cells.reshape(*cells.shape[:-2], -1)[..., :count]
