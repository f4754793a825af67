"""Rows of the query that attend apart, and the kernels that sum up their parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from pallas_kernels.batching import mappable
from pallas_kernels.merge_rows import PartsOfRows, merge_rows, sum_rows

# Those of `PartsOfRows`.
_Parts = tuple[jax.Array, jax.Array, jax.Array]
_Rest = tuple[jax.Array, jax.Array] | None


class RowKernels(NamedTuple):
    """What sums up any number of parts a row: see `merge` and `sum_up`."""

    merge: Callable
    sum_up: Callable


class Rows(Protocol):
    """Rows of the query, as a pytree."""

    @property
    def index(self) -> jax.Array:
        """`[B or 1, N, M]`: which row is in each place, past the end for none."""
        ...

    @property
    def known(self) -> tuple[jax.Array, jax.Array] | None:
        """What all parts of rows come to, if only a gradient is wanted."""
        ...

    @property
    def head(self) -> jax.Array | None:
        """The first of these heads among those of the query, if it has others."""
        ...

    def heads_of(self, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        """These heads of query, key and value."""
        ...

    def known_parts(self) -> tuple[jax.Array, jax.Array] | None:
        """That of the row in each place, `[B, M, N, V]` and `[B, M, N]`."""
        ...

    def take(self, query: jax.Array) -> jax.Array:
        """`[B, T, N, H]` to `[B, M, N, H]`, with a gradient."""
        ...

    def merge(
        self, out: jax.Array, lse: jax.Array, rest: _Rest
    ) -> tuple[jax.Array, jax.Array]:
        """`[B, M, N, V]`, `[B, M, N]` to `[B, T, N, V]`, `[B, T, N]`: of all parts."""
        ...

    def by(self, kernels: RowKernels) -> Rows:
        """The same, summed up by kernels where they serve."""
        ...


def merge(
    out: jax.Array, lse: jax.Array, parts: _Parts, rest: _Rest
) -> tuple[jax.Array, jax.Array]:
    """`merge_rows` of log-sum-exps in attnx's order, `[B, M, N]` and `[B, T, N]`."""
    lse = jnp.swapaxes(lse, 1, 2)
    if rest is not None:
        rest = rest[0], jnp.swapaxes(rest[1], 1, 2)
    out, lse = mappable(merge_rows)((out, lse, PartsOfRows(*parts), rest), ())
    return out, jnp.swapaxes(lse, 1, 2)


def sum_up(x: jax.Array, parts: _Parts) -> jax.Array:
    """`[B, M, N, H]` to `[B, T, N, H]`."""
    return mappable(sum_rows)((x, PartsOfRows(*parts)), ())


ROW_KERNELS = RowKernels(merge, sum_up)
