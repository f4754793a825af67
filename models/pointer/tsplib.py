"""Distances as TSPLIB rounds them, so that its tours have their published lengths.

The formulas are those of Reinelt, TSPLIB 95, section 2. Under them the optimal tours
of pcb442 (`euc_2d`) and gr666 (`geo`) are 50778 and 294358 long, by
`tsp.tour_length`.
"""

from __future__ import annotations

import numpy as np


def euc_2d(points: np.ndarray) -> np.ndarray:
    """Rounds euclidean distances to the nearest integer.

    Args:
      points: `[n, 2]`.

    Returns:
      int64 `[n, n]`.

    Example:
      >>> euc_2d(np.array([[0, 0], [3, 4], [1, 2]])).tolist()
      [[0, 5, 2], [5, 0, 3], [2, 3, 0]]
    """
    away = np.linalg.norm(points[:, None] - points, axis=-1)
    return np.floor(away + 0.5).astype(np.int64)


def geo(points: np.ndarray) -> np.ndarray:
    """Measures great circles on TSPLIB's Earth, in km, each rounded up from below.

    Args:
      points: `[n, 2]`, latitude and longitude as `degrees.minutes`: 1.30 is 1 degree 30
        minutes.

    Returns:
      int64 `[n, n]`, 0 from a place to itself.

    Example:
      >>> geo(np.array([[0.0, 0.0], [0.0, 90.0], [-90.0, 0.0]]))[0].tolist()
      [0, 10020, 10020]
    """
    degrees = np.trunc(points)
    # The constants are TSPLIB's, as coarse as they are.
    radians = 3.141592 * (degrees + 5 * (points - degrees) / 3) / 180
    latitude, longitude = radians.T
    q1 = np.cos(longitude[:, None] - longitude)
    q2 = np.cos(latitude[:, None] - latitude)
    q3 = np.cos(latitude[:, None] + latitude)
    cosine = 0.5 * ((1 + q1) * q2 - (1 - q1) * q3)
    away = (6378.388 * np.arccos(np.clip(cosine, -1, 1)) + 1).astype(np.int64)
    np.fill_diagonal(away, 0)
    return away
