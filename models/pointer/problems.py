"""The problems that pointer networks solve here, by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import ModuleType

import jax
import numpy as np

from models.pointer import delaunay, hull, tsp
from models.pointer.search import Constraint, anything, tours


@dataclasses.dataclass(frozen=True)
class Problem:
    """A map from points to a sequence of their indices.

    Attributes:
      max_symbols: `n -> M`, symbols of the longest label of n points, the end included.
      label: `(points [n, 2], valid [n]) -> symbols int32 [M]`, on the device: what to
        learn.
      solve: `points [n, 2] -> indices`: the exact answer, on the host.
      measure: `(points, outputs, truth) -> measures`, outputs best first.
      polygons: what to draw of an output: indices of corners.
      allowed: the constraint on sequences.
      any_length: whether points may be padding.
    """

    max_symbols: Callable[[int], int]
    label: Callable[[jax.Array, jax.Array], jax.Array]
    solve: Callable[[np.ndarray], np.ndarray]
    measure: Callable[[np.ndarray, list[np.ndarray], np.ndarray], dict[str, float]]
    polygons: Callable[[np.ndarray], list[np.ndarray]]
    allowed: Constraint = anything
    any_length: bool = True


def _problem(module: ModuleType, **options) -> Problem:
    return Problem(
        module.max_symbols,
        module.label,
        module.solve,
        module.measure,
        module.polygons,
        **options,
    )


PROBLEMS = {
    "hull": _problem(hull),
    "delaunay": _problem(delaunay),
    "tsp": _problem(tsp, allowed=tours, any_length=False),
}
