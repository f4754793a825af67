"""Neighborhood attention over space cut in pieces: their edges are exchanged."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from attnx._checks import expect
from attnx.parallel.axes import AxisName, axis_size, from_neighbour
from attnx.softmax import KernelConfig, dot_product_attention, merge_attention
from attnx.softmax.masks import Offset, Prefix
from attnx.softmax.neighborhood import Neighborhood, Window1D, windows


def neighborhood_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    axis_name: AxisName,
    *,
    kernel_size: int | tuple[int, ...],
    stride: int | tuple[int, ...] = 1,
    dilation: int | tuple[int, ...] = 1,
    is_causal: bool | tuple[bool, ...] = False,
    scale: float | jax.Array | None = None,
    extra_key: jax.Array | None = None,
    extra_value: jax.Array | None = None,
    implementation: str | KernelConfig | None = None,
    return_residual: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Computes `attnx.neighborhood_attention` of space cut along its first axis.

    Each device gets the keys and values that its windows reach beyond its piece, and
    nothing else is sent.

    For the inside of `jax.shard_map`; `sharded(parallel.neighborhood_attention)` takes
    whole arrays. Tokens stay in row-major order, so with 2 or 3 axes more tiles are
    visited than on one device.

    Args:
      query: `[B, X / P, *space, N, H]`, this device's.
      key: `[B, X / P, *space, K, H]`; K divides N.
      value: `[B, X / P, *space, K, V]`.
      axis_name: the mesh axis that the first axis of space is cut over.
      kernel_size: as in `attnx.neighborhood_attention`, like all that follow.
      stride: see there.
      dilation: see there.
      is_causal: see there.
      scale: factor on the scores, by default `H ** -0.5`.
      extra_key: `[B, E, K, H]`, the same on all devices.
      extra_value: `[B, E, K, V]`.
      implementation: as in `dot_product_attention`.
      return_residual: also return the log-sum-exp.

    Returns:
      As `attnx.neighborhood_attention`, for this device's queries.

    Raises:
      ValueError: arrays or options that do not fit, or an axis that there is not.
      NotImplementedError: an `implementation` that does not serve the call.

    Example:
      >>> import jax
      >>> from attnx import parallel
      >>> mesh = jax.make_mesh((1,), ("context",))
      >>> rows = jax.NamedSharding(mesh, jax.P(None, "context"))
      >>> attend = parallel.sharded(parallel.neighborhood_attention, sharding=rows)
      >>> x = jax.random.normal(jax.random.key(0), (1, 8, 12, 2, 16))
      >>> attend(x, x, x, kernel_size=3).shape
      (1, 8, 12, 2, 16)
    """
    pieces, here = axis_size(axis_name), jax.lax.axis_index(axis_name)
    expect(query.ndim in (4, 5, 6), "query", "[B, *space, N, H]", query.shape)
    for name, x in (("key", key), ("value", value)):
        fits = x.ndim == query.ndim and x.shape[1:-2] == query.shape[1:-2]
        expect(fits, name, f"query's space {query.shape[1:-2]}", x.shape)
    length, *rest = query.shape[1:-2]
    space = (length * pieces, *rest)
    axes = windows(space, kernel_size, stride, dilation, is_causal)
    left, right = reach(axes[0], pieces)
    key, value = (_extend(x, left, right, axis_name) for x in (key, value))

    def flat(x):
        return x.reshape(x.shape[0], -1, *x.shape[-2:])

    row = math.prod(rest)
    first_key = here * length - left
    # Beyond the ends of space are zeros that nobody sees.
    inside = Prefix((space[0] - first_key) * row)
    inside &= ~Prefix(jnp.maximum(-first_key, 0) * row)
    neighborhood = Neighborhood(space, kernel_size, stride, dilation, is_causal)
    neighborhood = Offset(neighborhood, here * length * row, first_key * row)
    attend = functools.partial(
        dot_product_attention,
        scale=scale,
        implementation=implementation,
        return_residual=True,
    )
    out, lse = attend(flat(query), flat(key), flat(value), mask=inside & neighborhood)
    extra = {"extra_key": extra_key, "extra_value": extra_value}
    both = "extra_key and extra_value, or neither"
    given = [name for name, x in extra.items() if x is not None]
    expect(len(given) != 1, "extra_key", both, given)
    if extra_key is not None and extra_value is not None:
        more = attend(flat(query), extra_key, extra_value)
        out, lse = merge_attention(*zip((out, lse), more, strict=True))
    out, lse = (x.reshape(*query.shape[:-1], *x.shape[3:]) for x in (out, lse))
    return (out, lse) if return_residual else out


def reach(axis: Window1D, pieces: int) -> tuple[int, int]:
    """How far before and behind a piece of an axis its windows reach, at most."""
    index = np.arange(axis.length)
    group, position = axis.split(index)
    start, end = axis.range(group, position, np)
    first, last = (x * axis.dilation + group for x in (start, end - 1))
    length = axis.length // pieces
    begin = np.arange(pieces) * length
    first, last = (x.reshape(pieces, length) for x in (first, last))
    left = (begin - first.min(1)).max()
    right = (last.max(1) - begin - length + 1).max()
    return max(0, int(left)), max(0, int(right))


def _extend(x, left, right, axis_name):
    """A piece with `left` tokens of those before it and `right` of those behind."""
    length = x.shape[1]

    def taken(count):
        """Tokens to take from each neighbour, the nearest first."""
        return [min(length, count - done) for done in range(0, count, length)]

    before = [
        from_neighbour(axis_name, x[:, length - count :], steps)
        for steps, count in enumerate(taken(left), start=1)
    ]
    behind = [
        from_neighbour(axis_name, x[:, :count], -steps)
        for steps, count in enumerate(taken(right), start=1)
    ]
    return jnp.concatenate([*reversed(before), x, *behind], 1)
