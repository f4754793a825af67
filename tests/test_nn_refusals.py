"""What layers refuse, and what they say when they do."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnx.nn import Attention, Hedgehog, NeighborhoodMixer, Rotary, SoftmaxMixer

D, N, H, T = 32, 4, 8, 10

# No number of theirs matters, and zeros need not be compiled.
make = functools.partial(Attention, kernel_init=nnx.initializers.zeros)


def test_bad_sizes_are_refused():
    new = functools.partial(make, rngs=nnx.Rngs(0))
    with pytest.raises(
        ValueError, match="in_features: expected a multiple of 5, got 32"
    ):
        new(D, 5, SoftmaxMixer())
    with pytest.raises(ValueError, match="num_kv_heads: expected a divisor of 4 heads"):
        new(D, N, SoftmaxMixer(), num_kv_heads=3)
    with pytest.raises(ValueError, match="num_kv_heads"):
        new(D, N, SoftmaxMixer(), num_kv_heads=0)
    layer = new(D, N, SoftmaxMixer())
    for shape in ((T, D), (2, T, D + 1)):
        with pytest.raises(ValueError, match=r"x: expected shape \[B, \*space, 32\]"):
            layer(jnp.ones(shape))
    with pytest.raises(ValueError, match="segment_ids: expected shape"):
        layer(jnp.ones((2, T, D)), segment_ids=jnp.zeros((2, T + 1), int))
    with pytest.raises(ValueError, match=r"x: expected a head size .* multiple of 4"):
        Rotary()(jnp.ones((1, 3, 3, 1, 6)), *np.ogrid[:3, :3])
    with pytest.raises(ValueError, match=r"x: expected last axes \(4, 8\)"):
        Hedgehog(N, H)(jnp.ones((1, T, 2, H)))


def test_bad_steps_are_refused():
    layer = make(D, N, SoftmaxMixer(), rngs=nnx.Rngs(0))
    for length in (None, 0, -3):
        with pytest.raises(ValueError, match=r"max_length: expected .* got"):
            layer.init_cache(2, length)
    cache = layer.init_cache(2, 4)
    with pytest.raises(ValueError, match="cache: expected room for 5 tokens"):
        layer.step(jnp.ones((2, 5, D)), cache)
    with pytest.raises(ValueError, match="x: expected shape"):
        layer.step(jnp.ones((3, 1, D)), cache)
    with pytest.raises(ValueError, match=r"x: expected shape \[B, T_new, D\]"):
        layer.step(jnp.ones((2, 1, 1, D)), cache)


def test_what_a_mixer_cannot_do_it_says():
    new = functools.partial(make, D, N, rngs=nnx.Rngs(0))
    for mixer in (
        NeighborhoodMixer(3),
        NeighborhoodMixer(3, 2, is_causal=True),
        NeighborhoodMixer((3, 3), is_causal=(True, True)),
        NeighborhoodMixer(3, is_causal=(False,)),
    ):
        with pytest.raises(NotImplementedError, match="cannot generate by steps"):
            new(mixer).init_cache(2, T)
    with pytest.raises(NotImplementedError, match="takes no segment_ids"):
        new(NeighborhoodMixer(3))(
            jnp.ones((1, T, D)), segment_ids=jnp.zeros((1, T), int)
        )
