"""A small language model: TransNormerLLM (arXiv:2307.14995) over bytes."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnx import decay, feature_maps
from attnx.nn import Attention, LinearMixer, SRMSNorm


@dataclasses.dataclass(frozen=True)
class LMConfig:
    """The sizes of a decoder.

    Attributes:
      vocab_size: tokens; a byte is a token.
      num_layers: blocks of a token mixer and a channel mixer.
      d_model: D, the size of the residual stream.
      num_heads: N, which divides D.
      mlp_dim: the hidden size of the channel mixer.
    """

    vocab_size: int = 256
    num_layers: int = 3
    d_model: int = 128
    num_heads: int = 4
    mlp_dim: int = 256


class LM(nnx.Module):
    """A decoder whose token mixer is linear attention with one decay per head.

    Args:
      config: sizes.
      rngs: keys for the parameters.
    """

    def __init__(self, config: LMConfig, *, rngs: nnx.Rngs):
        self.embed = nnx.Embed(config.vocab_size, config.d_model, rngs=rngs)
        self.blocks = nnx.List(
            [Block(config, layer, rngs=rngs) for layer in range(config.num_layers)]
        )
        self.norm = SRMSNorm()
        self.head = nnx.Linear(
            config.d_model,
            config.vocab_size,
            use_bias=False,
            kernel_init=nnx.initializers.zeros_init(),
            rngs=rngs,
        )

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Predicts each next token: `[B, T]` to logits `[B, T, vocab_size]`."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def init_cache(self, batch_size: int) -> tuple[Any, ...]:
        """Makes the empty recurrent state of every layer."""
        return tuple(block.init_cache(batch_size) for block in self.blocks)

    def step(self, tokens: jax.Array, cache) -> tuple[jax.Array, tuple[Any, ...]]:
        """Continues by tokens `[B, T_new]`: their logits, and the state to go on with.

        Takes time and memory that do not depend on the tokens already seen.
        """
        x = self.embed(tokens)
        new = []
        for block, state in zip(self.blocks, cache, strict=True):
            x, state = block.step(x, state)
            new.append(state)
        return self.head(self.norm(x)), tuple(new)


@functools.partial(jax.jit, static_argnames="num_tokens")
def generate(
    model: LM,
    prompt: jax.Array,
    num_tokens: int,
    *,
    key: jax.Array,
    temperature: float | jax.Array = 1.0,
) -> jax.Array:
    """Samples a continuation from the recurrent state, one step a token.

    Args:
      model: the decoder.
      prompt: int `[B, T]`, T at least 1.
      num_tokens: how many to sample.
      key: of the random numbers.
      temperature: divides the logits; 0 takes the likeliest token.

    Returns:
      int32 `[B, num_tokens]`.
    """
    logits, cache = model.step(prompt, model.init_cache(prompt.shape[0]))

    def next_token(carry, key):
        logits, cache = carry
        # The maximum of logits with Gumbel noise is a sample of their softmax.
        noise = jax.random.gumbel(key, logits.shape, logits.dtype)
        token = jnp.argmax(logits + temperature * noise, axis=-1).astype(jnp.int32)
        logits, cache = model.step(token[:, None], cache)
        return (logits[:, -1], cache), token

    keys = jax.random.split(key, num_tokens)
    _, tokens = jax.lax.scan(next_token, (logits[:, -1], cache), keys)
    return tokens.T


class Block(nnx.Module):
    """Token mixer, then channel mixer, each on a normalized residual stream."""

    def __init__(self, config: LMConfig, layer: int, *, rngs: nnx.Rngs):
        log_decay = decay.transnormer_released(
            config.num_heads, layer, config.num_layers
        )
        self.norm = SRMSNorm()
        self.attention = Attention(
            config.d_model,
            config.num_heads,
            LinearMixer(log_decay, scale=1.0),
            activation=jax.nn.silu,
            norm=SRMSNorm(),
            gate=feature_maps.identity,
            use_bias=False,
            out_kernel_init=nnx.initializers.zeros_init(),
            rngs=rngs,
        )
        self.mlp = SGLU(config.d_model, config.mlp_dim, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm(x))
        return x + self.mlp(self.norm(x))

    def init_cache(self, batch_size: int) -> Any:
        return self.attention.init_cache(batch_size)

    def step(self, x: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        y, cache = self.attention.step(self.norm(x), cache)
        x = x + y
        return x + self.mlp(self.norm(x)), cache


class SGLU(nnx.Module):
    """The channel mixer `((x V) * (x U)) O`: gated, without an activation."""

    def __init__(self, d_model: int, mlp_dim: int, *, rngs: nnx.Rngs):
        linear = lambda i, o, init: nnx.Linear(
            i, o, use_bias=False, kernel_init=init, rngs=rngs
        )
        lecun = nnx.initializers.lecun_normal()
        self.value = linear(d_model, mlp_dim, lecun)
        self.gate = linear(d_model, mlp_dim, lecun)
        self.out = linear(mlp_dim, d_model, nnx.initializers.zeros_init())

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(self.value(x) * self.gate(x))
