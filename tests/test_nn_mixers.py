"""Mixers with more than attention: a router, centroids, a cache that forgets."""

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
from attnx.cache import snapkv_scores, streaming_scores
from attnx.nn import (
    Attention,
    EvictionMixer,
    Rotary,
    RoutingMixer,
    SoftmaxMixer,
    SplitMixer,
    SuperlinearMixer,
)
from attnx.nn.routing import CentroidStat, CommitmentLoss
from attnx.select import Centroids, unit_variance

B, T, D, N, K, H = 2, 20, 32, 4, 2, 8
(X,) = normal(0, (B, T, D))


def layer_of(mixer):
    kwargs = {"num_kv_heads": K, "position": Rotary(), "rngs": nnx.Rngs(0)}
    return Attention(D, N, mixer, **kwargs)


def superlinear():
    router = nnx.LinearGeneral(D, (N, H), rngs=nnx.Rngs(1))
    return SuperlinearMixer(router, position=Rotary(), num_spans=2, window_index=1)


def routing(**options):
    return RoutingMixer(N, H, 5, rngs=nnx.Rngs(2), **options)


@jax.jit
def forward(layer, x, **kwargs):
    return layer(x, **kwargs)


@jax.jit
def step(layer, x, cache):
    return layer.step(x, cache)


def by_hand(layer, x, attend):
    positions = jnp.arange(x.shape[1])
    query, key = (Rotary()(p(x), positions) for p in (layer.query, layer.key))
    return layer.out(attend(query, key, layer.value(x)))


def generate(layer, sizes, max_length):
    cache, outputs, start = layer.init_cache(B, max_length), [], 0
    for size in sizes:
        y, cache = step(layer, X[:, start : start + size], cache)
        outputs.append(y)
        start += size
    return jnp.concatenate(outputs, 1), cache


def test_superlinear_layer_is_its_function():
    layer = layer_of(superlinear())

    def attend(*arrays):
        router = Rotary()(layer.mixer.router(X), jnp.arange(T))
        return attnx.superlinear_attention(router, *arrays, num_spans=2, window_index=1)

    want = jax.jit(lambda: by_hand(layer, X, attend))()
    chex.assert_trees_all_close(forward(layer, X), want, atol=1e-5)


def test_superlinear_steps_equal_the_whole():
    layer = layer_of(superlinear())
    got, cache = generate(layer, (17, 1, 1, 1), 32)
    chex.assert_trees_all_close(got, forward(layer, X), atol=1e-5)
    assert cache.lengths.tolist() == [T] * B


def test_superlinear_packed_documents_are_the_documents():
    layer = layer_of(superlinear())
    ids = jnp.broadcast_to(jnp.array([3] * 10 + [1] * 10), (B, T))
    packed = forward(layer, X, segment_ids=ids)
    for part in (slice(0, 10), slice(10, T)):
        chex.assert_trees_all_close(
            packed[:, part], forward(layer, X[:, part]), atol=1e-5
        )


def test_superlinear_router_learns():
    @jax.jit
    @jax.grad
    def gradients(layer):
        return jnp.sin(layer(X)).sum()

    grads = gradients(layer_of(superlinear()))
    for part in (grads.query, grads.key, grads.value, grads.out, grads.mixer.router):
        assert jnp.isfinite(part.kernel[...]).all()
        assert jnp.abs(part.kernel[...]).max() > 1e-6


def test_routing_layer_is_its_function_and_follows_its_tokens():
    layer = layer_of(routing(decay=0.5))
    before = Centroids(layer.mixer.sums[...], layer.mixer.counts[...])
    arrays = []

    def attend(query, key, value):
        arrays.extend((query, key))
        return attnx.routing_attention(
            query, key, value, before.means(), cluster_size=4, is_causal=True
        )

    want = by_hand(layer, X, attend)
    train = nnx.jit(lambda layer, x: layer(x))
    chex.assert_trees_all_close(train(layer, X), want, atol=1e-5)
    query, key = (unit_variance(x) for x in arrays)
    after = before.update(query, key, decay=0.5)
    chex.assert_trees_all_close(layer.mixer.sums[...], after.sums, atol=1e-4)
    chex.assert_trees_all_close(layer.mixer.counts[...], after.counts, atol=1e-4)
    loss = (before.distance(query) + before.distance(key)) / 2
    chex.assert_trees_all_close(layer.mixer.commitment[...], loss, atol=1e-5)
    # In evaluation nothing moves.
    held = layer.mixer.sums[...]
    layer.eval()
    train(layer, X)
    chex.assert_trees_all_equal(layer.mixer.sums[...], held)


def test_centroids_are_state_and_not_parameters():
    layer = layer_of(routing())
    assert len(jax.tree.leaves(nnx.state(layer, CentroidStat))) == 2
    assert len(jax.tree.leaves(nnx.state(layer, CommitmentLoss))) == 1
    params = nnx.to_flat_state(nnx.state(layer, nnx.Param))
    assert not any("mixer" in path for path, _ in params)

    @nnx.jit
    @nnx.grad
    def gradients(layer):
        layer(X)
        return layer.mixer.commitment[...]

    grads = gradients(layer)
    for part in (grads.query, grads.key):
        assert jnp.abs(part.kernel[...]).max() > 1e-6
    assert (grads["value"].kernel[...] == 0).all()


def test_routing_does_not_pack_or_step():
    layer = layer_of(routing())
    with pytest.raises(NotImplementedError, match="takes no segment_ids"):
        layer(X, segment_ids=jnp.zeros((B, T), int))
    with pytest.raises(NotImplementedError, match="cannot generate by steps"):
        layer.init_cache(B, 32)


def test_heads_are_shared_out():
    local = masks.Causal() & masks.Window(3, 0)
    layer = layer_of(SplitMixer((2, SoftmaxMixer(local)), (2, SoftmaxMixer())))

    def attend(query, key, value):
        parts = [
            attnx.dot_product_attention(
                query[:, :, heads], key[:, :, [i]], value[:, :, [i]], mask=mask
            )
            for i, (heads, mask) in enumerate(
                ((slice(0, 2), local), (slice(2, 4), masks.Causal()))
            )
        ]
        return jnp.concatenate(parts, 2)

    want = jax.jit(lambda: by_hand(layer, X, attend))()
    chex.assert_trees_all_close(forward(layer, X), want, atol=1e-5)
    with pytest.raises(ValueError, match="parts: expected multiples of 2 that add"):
        layer_of(SplitMixer((3, SoftmaxMixer()), (1, SoftmaxMixer())))(X)


def test_nothing_is_evicted_within_the_budget():
    layer = layer_of(EvictionMixer(snapkv_scores, T, observed=4))
    got, cache = generate(layer, (17, 1, 1, 1), T)
    chex.assert_trees_all_close(got, forward(layer, X), atol=1e-5)
    assert cache.positions[0, 0].tolist() == list(range(T))


def test_streaming_is_sinks_and_a_window():
    policy = functools.partial(streaming_scores, sinks=2)
    layer = layer_of(EvictionMixer(policy, 8, observed=1))
    got, cache = generate(layer, (1,) * T, 8)
    # A step attends before it evicts: the window is one token longer.
    mask = masks.Causal() & (masks.Window(6, 0) | masks.Prefix(2))
    want = forward(layer_of(SoftmaxMixer(mask)), X)
    chex.assert_trees_all_close(got, want, atol=1e-5)
    assert cache.positions[0, 0].tolist() == [0, 1, *range(14, 20)]


def test_a_prompt_is_compressed_and_the_rest_is_kept():
    layer = layer_of(EvictionMixer(snapkv_scores, 6, observed=4))
    got, cache = generate(layer, (17, 1, 1, 1), 9)
    whole = forward(layer, X)
    chex.assert_trees_all_close(got[:, :17], whole[:, :17], atol=1e-5)
    assert np.abs(got[:, 17:] - whole[:, 17:]).max() > 1e-3
    assert cache.positions[..., -7:].tolist() == [[[*range(13, 20)]] * K] * B
    assert cache.lengths.tolist() == [T] * B
    with pytest.raises(ValueError, match="max_length: expected at least 6, got 4"):
        layer.init_cache(B, 4)
