"""Layers that choose by content what to attend to."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import normal

import attnx
from attnx import masks
from attnx.nn import (
    Attention,
    BoundaryPredictor,
    DHSAMixer,
    MoBAMixer,
    Rotary,
    SoftmaxMixer,
    VMoBAMixer,
)
from attnx.select import chunk_starts

B, T, D, N, K, H = 2, 20, 32, 4, 2, 8
SPACE = (4, 5)
(X,) = normal(0, (B, T, D))


def layer_of(mixer):
    kwargs = {"num_kv_heads": K, "position": Rotary(), "rngs": nnx.Rngs(0)}
    return Attention(D, N, mixer, **kwargs)


def predictor():
    return BoundaryPredictor(K, H, window=2, hidden_features=8, rngs=nnx.Rngs(1))


@jax.jit
def forward(layer, x, **kwargs):
    return layer(x, **kwargs)


def by_hand(layer, x, attend):
    positions = np.ogrid[tuple(slice(n) for n in x.shape[1:-1])]
    positions = positions if isinstance(positions, tuple) else [positions]
    query, key = (Rotary()(p(x), *positions) for p in (layer.query, layer.key))
    return layer.out(attend(query, key, layer.value(x)))


def test_moba_layer_is_its_function():
    layer = layer_of(MoBAMixer(4, 2))
    attend = functools.partial(
        attnx.moba_attention, block_size=4, top_k=2, implementation="reference"
    )
    want = jax.jit(lambda x: by_hand(layer, x, attend))(X)
    chex.assert_trees_all_close(forward(layer, X), want, atol=1e-5)


@pytest.mark.parametrize(
    "mixer",
    [MoBAMixer(4, 2), SoftmaxMixer(masks.Power(2, window=2))],
    ids=["moba", "power"],
)
def test_steps_equal_the_whole(mixer):
    layer = layer_of(mixer)
    step = jax.jit(lambda x, cache: layer.step(x, cache))
    cache, outputs, start = layer.init_cache(B, 32), [], 0
    for size in (9, 1, 1, 9):
        y, cache = step(X[:, start : start + size], cache)
        outputs.append(y)
        start += size
    chex.assert_trees_all_close(
        jnp.concatenate(outputs, 1), forward(layer, X), atol=1e-5
    )


def test_packed_documents_are_the_documents():
    layer = layer_of(MoBAMixer(4, 2))
    ids = jnp.broadcast_to(jnp.array([3] * 10 + [1] * 10), (B, T))
    packed = forward(layer, X, segment_ids=ids)
    for part in (slice(0, 10), slice(10, T)):
        alone = forward(layer, X[:, part])
        chex.assert_trees_all_close(packed[:, part], alone, atol=1e-5)
    for mixer in (VMoBAMixer((4,), top_k=2), DHSAMixer(predictor(), 5, 6)):
        with pytest.raises(NotImplementedError, match="takes no segment_ids"):
            layer_of(mixer)(X, segment_ids=ids)


def test_vmoba_layer_is_its_function_over_space():
    options = {"top_k": 2, "scope": "layer"}
    layer = layer_of(VMoBAMixer((1, 5), **options))
    x = X.reshape(B, *SPACE, D)
    attend = functools.partial(
        attnx.vmoba_attention,
        block_size=(1, 5),
        implementation="reference",
        **options,
    )
    want = jax.jit(lambda x: by_hand(layer, x, attend))(x)
    chex.assert_trees_all_close(forward(layer, x), want, atol=1e-5)
    with pytest.raises(NotImplementedError, match="cannot generate by steps"):
        layer.init_cache(B, 32)


def test_dhsa_layer_cuts_where_its_predictor_says():
    boundaries = predictor()
    layer = layer_of(DHSAMixer(boundaries, 5, 6, distance=1, threshold=-9.0))

    def attend(query, key, value):
        starts = chunk_starts(boundaries(key), 5, distance=1, threshold=-9.0)
        return attnx.dhsa_attention(
            *(query, key, value, starts),
            max_chunks=5,
            budget=6,
            implementation="reference",
        )

    want = jax.jit(lambda x: by_hand(layer, x, attend))(X)
    chex.assert_trees_all_close(forward(layer, X), want, atol=1e-5)
    with pytest.raises(NotImplementedError, match="cannot generate by steps"):
        layer.init_cache(B, 32)


def test_predictor_looks_at_its_window_and_learns():
    boundaries, (key,) = predictor(), normal(0, (1, T, K, H))
    logits = jax.jit(boundaries)(key)
    np.testing.assert_array_equal(
        np.isfinite(logits[0]), (np.arange(T) >= 2) & (np.arange(T) <= T - 2)
    )
    moved = jax.jit(boundaries)(key.at[:, 10].multiply(-3.0))
    changed = np.flatnonzero((moved != logits)[0])
    np.testing.assert_array_equal(changed, [9, 10, 11, 12])

    @jax.jit
    @jax.grad
    def gradients(boundaries):
        return jnp.sin(boundaries(key)[:, 2:-1]).sum()

    flat = nnx.to_flat_state(nnx.state(gradients(boundaries), nnx.Param))
    for path, grad in flat:
        if path[:2] != ("attention", "key") or path[-1] != "bias":
            assert jnp.abs(grad[...]).max() > 1e-7, path


def test_a_layer_learns_through_its_choice():
    @jax.jit
    @jax.grad
    def gradients(layer):
        return jnp.sin(layer(X)).sum()

    grads = gradients(layer_of(MoBAMixer(4, 2)))
    for part in (grads.query, grads.key, grads.value, grads.out):
        assert jnp.isfinite(part.kernel[...]).all()
        assert jnp.abs(part.kernel[...]).max() > 1e-6
