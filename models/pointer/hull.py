"""Convex hulls: the vertices counter-clockwise, from the one of the lowest index.

An output is a sequence of symbols: 0 ends it and symbol i + 1 is point i.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from scipy.spatial import ConvexHull


def max_symbols(num_points: int) -> int:
    """The longest label with its end: among 500 uniform points 21 vertices are rare."""
    return min(num_points, 24) + 1


def label(points: jax.Array, valid: jax.Array) -> jax.Array:
    """Finds the hull on the device.

    A pair of points is an edge if no other point is to the right of it. That takes
    n^3 tests, which one kernel does at once, where a walk around the hull would wait
    for each of its steps. In float32 a few hulls in 100,000 have three points too close
    to a line to tell; `solve` is for measuring.

    Args:
      points: `[n, 2]`.
      valid: bool `[n]`; the other points are padding.

    Returns:
      int32 `[max_symbols(n)]`, 0 after the last vertex.
    """
    n = len(points)
    start, end, other = points[:, None, None], points[None, :, None], points
    right = _cross(end - start, other - start) < 0
    same = jnp.eye(n, dtype=bool)
    asked = valid & ~same[:, None] & ~same[None]
    edge = ~jnp.any(right & asked, -1) & valid[:, None] & valid & ~same
    vertex = edge.any(1)

    count = vertex.sum()
    centre = jnp.where(vertex[:, None], points, 0).sum(0) / count
    angle = jnp.arctan2(*(points - centre).T[::-1])
    turn = jnp.mod(angle - angle[jnp.argmax(vertex)], 2 * jnp.pi)
    order = jnp.argsort(jnp.where(vertex, turn, jnp.inf))[: max_symbols(n) - 1]
    symbols = jnp.where(jnp.arange(len(order)) < count, order + 1, 0)
    return jnp.pad(symbols, (0, 1)).astype(jnp.int32)


def solve(points: np.ndarray) -> np.ndarray:
    """Finds the hull by Qhull: indices of points `[n, 2]`, in canonical order.

    Example:
      >>> solve(np.array([[0.5, 0.4], [1, 0], [0, 0], [0.5, 1]])).tolist()
      [1, 3, 2]
    """
    return canonical(ConvexHull(points.astype(np.float64)).vertices)


def canonical(polygon: np.ndarray) -> np.ndarray:
    """Turns a cycle of indices until it begins with the lowest."""
    return np.roll(polygon, -np.argmin(polygon)) if len(polygon) else polygon


def measure(
    points: np.ndarray, outputs: list[np.ndarray], truth: np.ndarray
) -> dict[str, float]:
    """Measures the first of the outputs as Vinyals et al. (2015) do (table 1).

    Args:
      points: `[n, 2]`.
      outputs: index sequences, best first.
      truth: from `solve`.

    Returns:
      Whether it is the true polygon, wherever it begins; the share of the hull that it
      covers, NaN where it is no simple polygon; and whether it is none.
    """
    polygon = np.asarray(outputs[0])
    simple = is_simple(points[polygon]) and len(set(polygon.tolist())) == len(polygon)
    # A simple polygon of points lies in their hull, so that areas compare.
    covered = abs(area(points[polygon])) / abs(area(points[truth]))
    return {
        "sequence accuracy": float(np.array_equal(canonical(polygon), truth)),
        "area coverage": float(covered) if simple else np.nan,
        "invalid outputs": float(not simple),
    }


def polygons(output: np.ndarray) -> list[np.ndarray]:
    """What to draw of an output: one polygon."""
    return [np.asarray(output)]


def area(corners: np.ndarray) -> float:
    """The area of a polygon `[m, 2]`, positive counter-clockwise (shoelace formula)."""
    corners = corners.astype(np.float64)
    return float(_cross(corners, np.roll(corners, -1, 0)).sum() / 2)


def is_simple(corners: np.ndarray) -> bool:
    """Whether a polygon `[m, 2]` has at least 3 corners and no two sides that cross.

    Example:
      >>> square = np.array([[0, 0], [1, 0], [1, 1], [0, 1]])
      >>> is_simple(square), is_simple(square[[0, 2, 1, 3]])
      (True, False)
    """
    if len(corners) < 3:
        return False
    a = corners.astype(np.float64)
    b = np.roll(a, -1, 0)
    # Whether the ends of side j lie on different sides of side i.
    side = lambda end: _cross((b - a)[:, None], end[None] - a[:, None])
    parted = side(a) * side(b) < 0
    return not (parted & parted.T).any()


def _cross(a, b):
    """The z of the cross product: positive if b is to the left of a."""
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]
