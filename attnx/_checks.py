"""One way to refuse a bad argument: name it, say what was expected and what came."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.core import Tracer


def expect(condition: bool, argument: str, expected: object, got: object) -> None:
    """Raises `ValueError("argument: expected ..., got ...")` unless `condition`."""
    if not condition:
        raise ValueError(f"{argument}: expected {expected}, got {got}")


def expect_float(argument: str, array: jax.Array) -> None:
    expect(
        jnp.issubdtype(array.dtype, jnp.floating),
        argument,
        "a floating-point dtype",
        array.dtype,
    )


def expect_shape(argument: str, array: jax.Array, *shapes: tuple[int, ...]) -> None:
    """The array has one of `shapes`."""
    wanted = " or ".join(str(shape) for shape in shapes)
    expect(array.shape in shapes, argument, f"shape {wanted}", array.shape)


def is_traced(tree: object) -> bool:
    """Whether any leaf is known only when the program runs."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))
