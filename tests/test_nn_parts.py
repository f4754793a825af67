"""What layers are made of: positions, norms, decays and feature maps."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import normal

from attnx.linear import feature_maps
from attnx.nn import Hedgehog, LogDecay, Rotary, SRMSNorm

D, N, H, T = 32, 4, 8, 10


def test_rotary_rotates_by_the_position():
    (x,) = normal(0, (2, T, 1, H))
    positions = jnp.array([3, 100])[:, None] + jnp.arange(T)
    a, b = np.split(np.asarray(x, np.float64), 2, axis=-1)
    angle = np.asarray(positions)[..., None, None] * 100.0 ** (-np.arange(0, 1, 2 / H))
    turned = (a + 1j * b) * np.exp(1j * angle)
    expected = np.concatenate([turned.real, turned.imag], -1)
    chex.assert_trees_all_close(
        Rotary(base=100.0)(x, positions), expected.astype(np.float32), atol=2e-5
    )


def test_rotated_products_depend_on_distances_alone():
    ((x, y),) = normal(0, (2, 5, 6, 3, H))
    rows, columns = np.ogrid[:5, :6]

    def scores(shift):
        moved = rows + shift, columns + 2 * shift
        return jnp.einsum("abnh,cdnh->nabcd", Rotary()(x, *moved), Rotary()(y, *moved))

    chex.assert_trees_all_close(scores(0), scores(7), atol=1e-4)
    assert jnp.abs(scores(0) - jnp.einsum("abnh,cdnh->nabcd", x, y)).max() > 0.1


def test_srms_norm():
    x = 100 * normal(0, (3, 7))[0]
    y = np.asarray(x, np.float64)
    expected = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6)
    chex.assert_trees_all_close(SRMSNorm()(x), expected.astype(np.float32), rtol=1e-6)
    half = SRMSNorm()(x.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    chex.assert_trees_all_close(half.astype(jnp.float32), SRMSNorm()(x), rtol=2e-2)


@pytest.mark.parametrize("features", [N, (N, H)])
def test_log_decays_are_negative_and_float32(features):
    decay = LogDecay(D, features, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    (x,) = normal(0, (2, T, D), dtype="bfloat16")
    y = jax.jit(decay)(x)
    chex.assert_shape(y, (2, T, *np.atleast_1d(features)))
    chex.assert_type(y, jnp.float32)
    assert (y < 0).all()
    assert (y > -1).all()


def test_hedgehog_starts_as_its_function():
    (x,) = normal(0, (2, T, N, H))
    y = Hedgehog(N, H)(x)
    chex.assert_trees_all_close(y, feature_maps.hedgehog(x), atol=1e-6)
