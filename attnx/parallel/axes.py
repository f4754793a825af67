"""The mesh axis that a sequence is cut over, as seen from inside `jax.shard_map`."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

# A mesh axis, or several that count as one.
AxisName = str | tuple[str, ...]


def axis_size(axis_name: AxisName) -> int:
    """Devices along a mesh axis of the `jax.shard_map` around the call.

    Raises:
      ValueError: there is no such axis.
    """
    try:
        return jax.lax.axis_size(axis_name)
    except NameError:
        names = jax.sharding.get_abstract_mesh().manual_axes
        raise ValueError(
            f"axis_name: expected one of the axes {names} of a jax.shard_map around "
            f"the call, got {axis_name!r}"
        ) from None


def side_by_side(axis_name: AxisName) -> int:
    """Pieces that one device has at once: all those of an axis of `jax.vmap`."""
    names = (axis_name,) if isinstance(axis_name, str) else axis_name
    of_mesh = jax.sharding.get_abstract_mesh().manual_axes
    return math.prod(axis_size(name) for name in names if name not in of_mesh)


def from_next(axis_name: AxisName, tree, steps: int = 1):
    """Each device's arrays, sent `steps` backward around the ring."""
    size = axis_size(axis_name)
    order = [(i, (i - steps) % size) for i in range(size)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axis_name, order), tree)


def from_neighbour(axis_name: AxisName, x: jax.Array, steps: int) -> jax.Array:
    """What the device `steps` before this one has (after it, if negative), or zeros."""
    size = axis_size(axis_name)
    order = [(i, i + steps) for i in range(size) if 0 <= i + steps < size]
    if not order:
        return jnp.zeros_like(x)
    return jax.lax.ppermute(x, axis_name, order)
