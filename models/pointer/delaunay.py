"""Delaunay triangulations: the triangles by where their incenters are.

Each triangle is its three indices, ascending; the triangles follow each other by the
first coordinate of the incenter (then the second, but two never have the same first).
An output is a sequence of symbols: 0 ends it and symbol i + 1 is point i.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from scipy.spatial import Delaunay


def max_symbols(num_points: int) -> int:
    """The longest label with its end: n points have at most 2 n - 5 triangles."""
    return 3 * (2 * num_points - 5) + 1


def label(points: jax.Array, valid: jax.Array) -> jax.Array:
    """Triangulates on the device: every three points with no other in their circle.

    In float32 a few triangulations in 100,000 have four points too close to a circle to
    tell; `solve` is for measuring.

    Args:
      points: `[n, 2]`.
      valid: bool `[n]`; the other points are padding.

    Returns:
      int32 `[max_symbols(n)]`, 0 after the last triangle.
    """
    n = len(points)
    triples = jnp.array(list(itertools.combinations(range(n), 3)))
    corners = points[triples]
    inside = _in_circle(corners[:, None], points) & valid
    kept = valid[triples].all(1) & ~inside.any(1)
    centre = jnp.where(kept, incenter(corners)[:, 0], jnp.inf)
    order = jnp.argsort(centre)[: 2 * n - 5]
    symbols = jnp.where(jnp.isfinite(centre)[order][:, None], triples[order] + 1, 0)
    return jnp.pad(symbols.ravel(), (0, 1)).astype(jnp.int32)


def solve(points: np.ndarray) -> np.ndarray:
    """Triangulates by Qhull: indices `[3 * triangles]` of points `[n, 2]`.

    Example:
      >>> solve(np.array([[0, 0.1], [0, 1], [1, 0], [0.9, 1.2]])).tolist()
      [0, 1, 2, 1, 2, 3]
    """
    points = points.astype(np.float64)
    triangles = np.sort(Delaunay(points).simplices, axis=1)
    centres = np.asarray(incenter(points[triangles]))
    return triangles[np.lexsort(centres.T[::-1])].ravel()


def measure(
    points: np.ndarray, outputs: list[np.ndarray], truth: np.ndarray
) -> dict[str, float]:
    """Measures the first of the outputs as Vinyals et al. (2015, section 4.3) do.

    Args:
      points: `[n, 2]`.
      outputs: index sequences, best first.
      truth: from `solve`.

    Returns:
      Whether it has the true triangles and no other, in any order; the share of the
      true triangles that it has; and whether it is no sequence of triangles.
    """
    found, wanted = _triangles(outputs[0]), _triangles(truth)
    broken = len(outputs[0]) % 3 > 0 or any(len(triangle) < 3 for triangle in found)
    return {
        "sequence accuracy": float(
            not broken and sorted(found) == sorted(wanted) and len(found) > 0
        ),
        "triangle coverage": len(set(found) & set(wanted)) / len(wanted),
        "invalid outputs": float(broken),
    }


def polygons(output: np.ndarray) -> list[np.ndarray]:
    """What to draw of an output: its triangles; a rest of one or two is left out."""
    return list(np.asarray(output)[: len(output) // 3 * 3].reshape(-1, 3))


def incenter(corners):
    """The centres `[..., 2]` of the circles inscribed in triangles `[..., 3, 2]`.

    The corners weighted by the sides opposite to them. Of NumPy's arrays or JAX's.
    """
    a, b, c = corners[..., 0, :], corners[..., 1, :], corners[..., 2, :]
    side = lambda d: (d**2).sum(-1)[..., None] ** 0.5
    sides = side(b - c), side(c - a), side(a - b)
    weighted = sides[0] * a + sides[1] * b + sides[2] * c
    return weighted / (sides[0] + sides[1] + sides[2])


def _triangles(output: np.ndarray) -> list[tuple[int, ...]]:
    """Each triangle as its different indices, ascending."""
    return [tuple(sorted({*triangle.tolist()})) for triangle in polygons(output)]


def _in_circle(corners: jax.Array, point: jax.Array) -> jax.Array:
    """Whether a point is inside the circle through three, whichever way they turn.

    The determinant is 0 without rounding where the point is one of the three: then
    each of its terms has the factor 0.
    """
    a, b, c = (corners[..., i, :] - point for i in range(3))
    cross = lambda p, q: p[..., 0] * q[..., 1] - p[..., 1] * q[..., 0]
    square = lambda p: (p**2).sum(-1)
    determinant = (
        square(a) * cross(b, c) + square(b) * cross(c, a) + square(c) * cross(a, b)
    )
    return determinant * cross(b - a, c - a) > 0
