"""Decoders of every token mixer: steps, sampling, and what each layer should be."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from helpers import shaken

from attnx.nn import SRMSNorm
from models.layers import GatedConvolution
from models.lm import LM, LMConfig
from models.token_mixers import TOKEN_MIXERS

TINY = LMConfig(
    num_layers=2,
    d_model=32,
    num_heads=4,
    mlp_dim=32,
    vocab_size=61,
    window=5,
    feature_dim=4,
    block_size=4,
    top_k=2,
    shared_heads=2,
)


# The clusters of `routing` look ahead: tests/test_trends.py has it.
STEPPING = [name for name in TOKEN_MIXERS if name != "routing"]


@pytest.fixture(scope="module", params=STEPPING)
def model(request):
    config = dataclasses.replace(TINY, pattern=(request.param,))
    return shaken(LM(config, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(2), (2, 21), 0, 61)


def test_steps_equal_the_parallel_forward(model, tokens):
    """A prompt of any length, then token by token: the logits of the whole."""
    wanted = jax.jit(model)(tokens)
    logits, cache = jax.jit(model.step)(tokens[:, :13], model.init_cache(2, 21))
    got = [logits]
    step = jax.jit(model.step)
    for i in range(13, 21):
        logits, cache = step(tokens[:, i : i + 1], cache)
        got.append(logits)
    chex.assert_trees_all_close(jnp.concatenate(got, 1), wanted, atol=2e-5)
    # What follows changes nothing: the layer is causal.
    changed = jax.jit(model)(tokens.at[:, 15:].set(0))
    chex.assert_trees_all_close(changed[:, :15], wanted[:, :15], atol=1e-6)
    assert abs(changed[:, 15:] - wanted[:, 15:]).max() > 1e-3


def test_short_convolution_is_that_of_flax():
    """Causal and by channel, between the projections of Based's token mixer."""
    layer = shaken(GatedConvolution(8, rngs=nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(3), (2, 9, 8))
    convolution = nnx.Conv(
        16, 16, 3, padding="CAUSAL", feature_group_count=16, rngs=nnx.Rngs(0)
    )
    convolution.kernel[...] = layer.taps[:, None]
    convolution.bias[...] = layer.bias[...]
    mixed = nnx.silu(convolution(layer.input(x))) * layer.gate(x)
    chex.assert_trees_all_close(layer(x), layer.out(mixed), atol=1e-5)
    assert abs(layer(x)).max() > 1e-2


def test_tied_embedding_makes_the_logits(tokens):
    """New layers add nothing to the embedding, which then is what the logits see."""
    config = dataclasses.replace(TINY, pattern=("linear",), tie_embeddings=True)
    model = LM(config, rngs=nnx.Rngs(0))
    table = model.embed.embedding[...]
    wanted = SRMSNorm()(table[tokens]) @ table.T
    chex.assert_trees_all_close(jax.jit(model)(tokens), wanted, atol=1e-5)
    assert not any("head" in path for path, _ in nnx.to_flat_state(nnx.state(model)))
