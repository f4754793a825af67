"""Queries taken to the tiles of the blocks they chose, and their parts merged again."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from attnx._tree import tree_class
from attnx.softmax.pallas_rows import RowKernels

# Parts of a row that are read in one pass over all rows.
_AT_ONCE = 16


@tree_class(meta=("length", "per_row", "kernels"))
class Rows:
    """The rows in the places of a `Run` of tiles, for the engine.

    Attributes:
      index: int32 `[B, N, M]`, the row in each place.
      place: int32 `[B, N, P]`, the place of each pair.
      first: int32 `[B, N, T]`, the first pair of each row, or None.
      stop: int32 `[B, N, T]`, where its pairs end, or None.
      known: what all runs come to, `[B, T, N, V]` and `[B, T, N]`, or None. With it
        nothing is attended or merged again: it is there for the gradient.
      length: T.
      per_row: pairs of each row, one after the other, or None where that varies.
      kernels: what sums up the parts of rows where their number varies, if not XLA.
      head: int32, the first of the N heads among those of the query, or None if it has
        no others. Then there is no gradient.
    """

    index: jax.Array
    place: jax.Array
    first: jax.Array | None
    stop: jax.Array | None
    known: tuple[jax.Array, jax.Array] | None
    length: int
    per_row: int | None
    kernels: RowKernels | None = None
    head: jax.Array | None = None

    def heads_of(self, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        """The heads that are meant, of query, key and value."""
        if self.head is None:
            return arrays
        share = arrays[0].shape[2] // self.index.shape[1]

        def part(x):
            size = x.shape[2] // share
            start = self.head * x.shape[2] // arrays[0].shape[2]
            return jax.lax.dynamic_slice_in_dim(x, start, size, 2)

        return tuple(map(part, arrays))

    def take(self, query: jax.Array) -> jax.Array:
        """The rows `[B, M, N, H]` of `[B, T, N, H]`."""
        return _taken(self, query)

    def merge(
        self,
        out: jax.Array,
        lse: jax.Array,
        rest: tuple[jax.Array, jax.Array] | None,
    ) -> tuple[jax.Array, jax.Array]:
        """Merges the parts `[B, M, N, V]`, `[B, M, N]` of each row by log-sum-exp.

        `rest` is one more part of every row, `[B, T, N, V]` and `[B, T, N]`, or None.
        """
        if self.known is not None:
            return _known(self, out, lse, rest)
        if self._kernels is not None:
            return self._kernels.merge(out, lse, self._pairs, rest)
        return _merged(self, out, lse, rest)

    def known_parts(self) -> tuple[jax.Array, jax.Array] | None:
        """What is known, of the row in each place; 0 and -inf where there is none."""
        if self.known is None:
            return None
        out, lse = self.known
        return _of_places(self.index, out), _of_places(self.index, lse, -jnp.inf)

    def by(self, kernels: RowKernels) -> Rows:
        """The same, where parts of a varying number are summed up by kernels."""
        return dataclasses.replace(self, kernels=kernels)

    @property
    def _kernels(self):
        return self.kernels if self.per_row is None else None

    @property
    def _pairs(self) -> tuple[Any, Any, Any]:
        return self.place, self.first, self.stop

    def over(self, body, state, pairs):
        """`body(state, places)` until it had the places of all parts of each row.

        `places` are some of each row's, `[T, n]`: past the end where it has fewer.
        """
        place, first, stop = pairs
        if self.per_row is not None:
            return body(state, place.reshape(self.length, self.per_row))
        none = self.index.shape[2]

        def step(i, state):
            number = first[:, None] + i * _AT_ONCE + jnp.arange(_AT_ONCE)
            places = jnp.take(place, number, mode="clip")
            return body(state, jnp.where(number < stop[:, None], places, none))

        most = (stop - first).max()
        return jax.lax.fori_loop(0, -(-most // _AT_ONCE), step, state)


@jax.custom_vjp
def _taken(rows, x):
    take = functools.partial(jnp.take, axis=0, mode="clip")
    return jax.vmap(jax.vmap(take, (1, 0), 1))(x, rows.index)


def _taken_forward(rows, x):
    return _taken(rows, x), rows


def _taken_backward(rows, grads):
    if rows._kernels is not None:
        return None, rows._kernels.sum_up(grads, rows._pairs)

    def total(grads, pairs):
        add = lambda total, places: total + sum(_parts(grads, places))
        zero = jnp.zeros_like(grads[:1], jnp.promote_types(grads.dtype, jnp.float32))
        zero = jnp.broadcast_to(zero, (rows.length, grads.shape[1]))
        return rows.over(add, zero, pairs).astype(grads.dtype)

    return None, jax.vmap(jax.vmap(total, (1, 0), 1))(grads, rows._pairs)


_taken.defvjp(_taken_forward, _taken_backward)


@jax.jit
def _merged(rows, out, lse, rest):
    merge = functools.partial(_merged_of_head, rows)
    return jax.vmap(jax.vmap(merge, (1, 1, 0, 1), 1))(out, lse, rows._pairs, rest)


def _merged_of_head(rows, out, lse, pairs, rest):
    def merge(state, places):
        peak, total, merged = state
        each = jnp.take(lse, places, mode="fill", fill_value=-jnp.inf)
        new_peak = jnp.maximum(peak, each.max(1))
        base = jnp.where(jnp.isfinite(new_peak), new_peak, 0)
        before, weights = jnp.exp(peak - base), jnp.exp(each - base[:, None])
        merged = before[:, None] * merged
        for j, part in enumerate(_parts(out, places)):
            merged += weights[:, j, None] * part
        return new_peak, before * total + weights.sum(1), merged

    if rest is None:
        rest = jnp.zeros_like(out[:1]), jnp.full_like(lse[:1], -jnp.inf)
    peak = jnp.broadcast_to(rest[1], rows.length)
    merged = jnp.broadcast_to(rest[0].astype(lse.dtype), (rows.length, out.shape[1]))
    state = peak, jnp.exp(jnp.where(peak > -jnp.inf, 0, peak)), merged
    peak, total, merged = rows.over(merge, state, pairs)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    merged = (merged / total[:, None]).astype(out.dtype)
    return merged, jnp.where(empty, -jnp.inf, peak + jnp.log(total))


@jax.custom_vjp
def _known(rows, out, lse, rest):
    return rows.known


def _known_forward(rows, out, lse, rest):
    return rows.known, (rows.index, rest is not None)


def _known_backward(residuals, grads):
    # Weights of pairs are those of the whole, and so are the gradients of its parts.
    index, has_rest = residuals
    of_parts = [_of_places(index, x) for x in grads]
    return None, *of_parts, grads if has_rest else None


_known.defvjp(_known_forward, _known_backward)


def _of_places(index, x, fill=0):
    """`[B, T, N, ...]` of the rows in `[B, N, M]` places, `[B, M, N, ...]`."""
    take = functools.partial(jnp.take, axis=0, mode="fill", fill_value=fill)
    return jax.vmap(jax.vmap(take, (1, 0), 1))(x, index)


def _parts(x, places):
    """What `[M, V]` has in each column of `[T, n]` places, in float32; else 0."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    for place in places.T:
        part = jnp.take(x, place, 0, mode="fill", fill_value=0)
        yield part.astype(dtype)
