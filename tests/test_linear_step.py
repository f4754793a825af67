"""Generation by steps, feature maps, and decays."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import normal

import attnx
from attnx import decay, feature_maps

B, T, N, K, H, V = 2, 20, 4, 2, 8, 12


@pytest.mark.parametrize("shape", [None, (N,), (B, T, N), (B, T, N, H)], ids=str)
@pytest.mark.parametrize("normalize", [False, True])
def test_steps_after_a_prompt_equal_the_whole(shape, normalize):
    query, key, value = normal(0, (B, T, N, H), (B, T, K, H), (B, T, K, V))
    query, key = jnp.abs(query), jnp.abs(key)
    log_decay = None if shape is None else -jnp.abs(normal(1, shape)[0])
    options = {"normalize": normalize}
    want, last = attnx.linear_attention(
        query, key, value, log_decay=log_decay, return_state=True, **options
    )

    def of(tokens):
        per_token = log_decay is not None and log_decay.ndim > 1
        return log_decay[:, tokens] if per_token else log_decay

    prompt = slice(0, 13)
    out, state = attnx.linear_attention(
        *(x[:, prompt] for x in (query, key, value)),
        log_decay=of(prompt),
        return_state=True,
        **options,
    )
    step = jax.jit(lambda *a, **k: attnx.linear_attention_step(*a, **k, **options))
    for t in range(13, T):
        tokens = (x[:, t] for x in (query, key, value))
        out, state = step(state, *tokens, log_decay=of(t))
        chex.assert_trees_all_close(out, want[:, t], atol=1e-5)
    chex.assert_trees_all_close(state, last, atol=1e-5)


def test_the_state_stays_float32():
    state = jnp.zeros((B, N, H, V))
    tokens = normal(2, (B, N, H), (B, K, H), (B, K, V), dtype=jnp.bfloat16)
    out, state = attnx.linear_attention_step(state, *tokens)
    assert (out.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)


def test_bad_steps_are_named():
    state = jnp.zeros((B, N, H, V))
    query, key, value = normal(3, (B, N, H), (B, K, H), (B, K, V))
    step = attnx.linear_attention_step
    with pytest.raises(ValueError, match="state: expected shape"):
        step(state, query, key, value, normalize=True)
    with pytest.raises(ValueError, match="query: expected"):
        step(state, query[:, None], key, value)
    with pytest.raises(ValueError, match="log_decay: expected shape"):
        step(state, query, key, value, log_decay=jnp.zeros(3))
    with pytest.raises(ValueError, match="divides query's 4, got 3"):
        step(state, query, jnp.zeros((B, 3, H)), jnp.zeros((B, 3, V)))


@pytest.mark.parametrize("name", ["elu_plus_one", "relu", "exp", "hedgehog"])
def test_maps_for_a_denominator_are_not_negative(name):
    (x,) = normal(4, (50, H))
    features = getattr(feature_maps, name)(x)
    assert (features >= 0).all()
    assert (features.sum(-1) > 0).all()


def test_identity_and_exp():
    (x,) = normal(5, (5, H))
    chex.assert_trees_all_equal(feature_maps.identity(x), x)
    chex.assert_trees_all_close(feature_maps.exp(x), np.exp(x), rtol=1e-6)


def test_hedgehog_is_two_softmaxes():
    (x,) = normal(6, (5, H))
    halves = np.split(np.asarray(feature_maps.hedgehog(x)), 2, -1)
    for sign, half in zip((1, -1), halves, strict=True):
        weights = np.exp(sign * np.asarray(x))
        want = weights / weights.sum(-1, keepdims=True)
        np.testing.assert_allclose(half, want, rtol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 16])
def test_taylor_is_the_second_order_of_exp(size):
    query, key = normal(7, (6, size), (6, size))
    features = feature_maps.taylor(query), feature_maps.taylor(key)
    assert features[0].shape[-1] == 1 + size + size * (size + 1) // 2
    a = query @ key.T / math.sqrt(size)
    chex.assert_trees_all_close(
        features[0] @ features[1].T, 1 + a + a * a / 2, atol=1e-5
    )


def test_transnormer_slopes():
    # Head h of N in layer l of L, by hand.
    paper = decay.transnormer_paper(4, layer=1, num_layers=4)
    np.testing.assert_allclose(paper, [0, -1.5, -3, -4.5])
    released = decay.transnormer_released(8, layer=0, num_layers=24)
    want = [-(2.0 ** -(h + 1)) * (1 + 1e-5) for h in range(8)]
    np.testing.assert_allclose(released, want, rtol=1e-6)
    last = decay.transnormer_released(8, layer=23, num_layers=24)
    np.testing.assert_allclose(
        last, [-(2.0 ** -(h + 1)) * 1e-5 for h in range(8)], 1e-3
    )
    # Six heads: four slopes of four, then the first and third of eight.
    six = decay.transnormer_released(6, layer=0, num_layers=1) / -(1 + 1e-5)
    np.testing.assert_allclose(
        six, [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3], rtol=1e-6
    )


def test_retnet_decay():
    want = [math.log(1 - 1 / 32), math.log(1 - 1 / 64), math.log(1 - 1 / 128)]
    np.testing.assert_allclose(decay.retnet(3), want, rtol=1e-6)


def test_bad_decays_are_named():
    with pytest.raises(ValueError, match="layer: expected 0 to 3, got 4"):
        decay.transnormer_released(8, layer=4, num_layers=4)
    with pytest.raises(ValueError, match="num_heads: expected at least 1"):
        decay.retnet(0)
