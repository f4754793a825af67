"""Decoders: layers of any token mixers, in any pattern, each before a channel mixer."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from attnx import feature_maps
from attnx._checks import expect
from attnx.nn import HeadRouter, MoHMixer, SRMSNorm
from models.layers import GLU
from models.token_mixers import TOKEN_MIXERS

ACTIVATIONS = {"identity": feature_maps.identity, "silu": jax.nn.silu}


@dataclasses.dataclass(frozen=True)
class LMConfig:
    """The layers of a decoder and their sizes. The default is a small TransNormerLLM.

    Attributes:
      pattern: token mixers by their names in `TOKEN_MIXERS`, repeated over the depth.
      vocab_size: tokens; a byte is a token.
      num_layers: blocks of a token mixer and a channel mixer.
      d_model: D, the size of the residual stream.
      num_heads: N, which divides D.
      mlp_dim: the size inside the channel mixer; 0 for none.
      activation: of the gate of the channel mixer.
      tie_embeddings: whether the embedding also makes the logits.
      dropout: of what each mixer adds, and of the embedding, while training.
      dtype: of the activations. Parameters, the residual stream and logits are float32.
        GPU kernels want bfloat16.
      window: tokens that `window` and the local heads of `routing` see.
      feature_dim: channels of a query or key of `taylor`.
      block_size: tokens in a block of `moba` and `power`.
      top_k: blocks that a query of `moba` attends, its own included.
      num_clusters: of a routing head of `routing`.
      shared_heads: heads of `moh` that every token activates.
      active_heads: heads of `moh` that each token activates, the shared ones included.

    Raises:
      ValueError: a name that is not registered.
    """

    pattern: tuple[str, ...] = ("lightning",)
    vocab_size: int = 256
    num_layers: int = 3
    d_model: int = 128
    num_heads: int = 4
    mlp_dim: int = 256
    activation: Literal["identity", "silu"] = "identity"
    tie_embeddings: bool = False
    dropout: float = 0.0
    dtype: str = "float32"
    window: int = 64
    feature_dim: int = 16
    block_size: int = 64
    top_k: int = 4
    num_clusters: int = 16
    shared_heads: int = 1
    active_heads: int = 3

    def __post_init__(self):
        expect(len(self.pattern) > 0, "pattern", "at least one token mixer", "none")
        for name in self.pattern:
            names = ", ".join(TOKEN_MIXERS)
            expect(name in TOKEN_MIXERS, "pattern", f"names among {names}", name)


class LM(nnx.Module):
    """A decoder over tokens.

    Args:
      config: layers and sizes.
      rngs: keys for the parameters.

    Example:
      >>> config = LMConfig(("lightning", "window"), num_layers=4, d_model=32)
      >>> model = LM(config, rngs=nnx.Rngs(0))
      >>> logits, cache = model.step(jnp.ones((1, 7), int), model.init_cache(1))
      >>> logits.shape
      (1, 7, 256)
    """

    def __init__(self, config: LMConfig, *, rngs: nnx.Rngs):
        self.embed = nnx.Embed(config.vocab_size, config.d_model, rngs=rngs)
        self.dropout = nnx.Dropout(config.dropout)
        self.blocks = nnx.List(
            [Block(config, layer, rngs=rngs) for layer in range(config.num_layers)]
        )
        self.norm = SRMSNorm()
        head = functools.partial(
            nnx.Linear,
            config.d_model,
            config.vocab_size,
            use_bias=False,
            kernel_init=nnx.initializers.zeros_init(),
        )
        self.head = None if config.tie_embeddings else head(rngs=rngs)

    def __call__(
        self, tokens: jax.Array, *, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """Predicts each next token.

        Args:
          tokens: int `[B, T]`.
          dropout_key: of the random numbers of dropout; None for no dropout.

        Returns:
          Logits, float32 `[B, T, vocab_size]`.
        """
        return self.with_load_balance(tokens, dropout_key=dropout_key)[0]

    def with_load_balance(
        self, tokens: jax.Array, *, dropout_key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """The same, and the mean of `HeadRouter.load_balance_loss`; 0 without any."""
        keys = [None] * (len(self.blocks) + 1)
        if dropout_key is not None:
            keys = jax.random.split(dropout_key, len(keys))
        x = _drop(self.dropout, self.embed(tokens), keys[0])
        losses = []
        for block, key in zip(self.blocks, keys[1:], strict=True):
            x, loss = block(x, key)
            losses += [] if loss is None else [loss]
        loss = jnp.stack(losses).mean() if losses else jnp.zeros(())
        return self._logits(x), loss

    def init_cache(
        self, batch_size: int, max_length: int | None = None
    ) -> tuple[Any, ...]:
        """Makes the empty cache of every layer.

        Args:
          batch_size: B.
          max_length: tokens that it must hold, prompt included; layers of constant
            memory do not need it.
        """
        return tuple(block.init_cache(batch_size, max_length) for block in self.blocks)

    def step(self, tokens: jax.Array, cache: tuple[Any, ...]):
        """Continues the sequences in the cache.

        Args:
          tokens: int `[B, T_new]`; a whole prompt, or the token last generated.
          cache: from `init_cache` or the last step.

        Returns:
          Logits `[B, T_new, vocab_size]`, and the cache to go on with.
        """
        x = self.embed(tokens)
        new = []
        for block, state in zip(self.blocks, cache, strict=True):
            x, state = block.step(x, state)
            new.append(state)
        return self._logits(x), tuple(new)

    def _logits(self, x: jax.Array) -> jax.Array:
        head = self.embed.attend if self.head is None else self.head
        return head(self.norm(x))


class Block(nnx.Module):
    """Token mixer, then channel mixer, each on a normalized residual stream."""

    def __init__(self, config: LMConfig, layer: int, *, rngs: nnx.Rngs):
        name = config.pattern[layer % len(config.pattern)]
        self.norm = SRMSNorm()
        self.attention = TOKEN_MIXERS[name](config, layer, rngs)
        self.dropout = nnx.Dropout(config.dropout)
        mlp = functools.partial(
            GLU,
            config.d_model,
            config.mlp_dim,
            ACTIVATIONS[config.activation],
            dtype=jnp.dtype(config.dtype),
            rngs=rngs,
        )
        self.mlp = mlp() if config.mlp_dim > 0 else None

    def __call__(self, x: jax.Array, dropout_key: jax.Array | None = None):
        """Maps `[B, T, D]`; also gives the load-balance loss where there is one."""
        keys = (None,) * 2 if dropout_key is None else jax.random.split(dropout_key)
        normed = self.norm(x)
        x = x + _drop(self.dropout, self.attention(normed), keys[0])
        return self._mix_channels(x, keys[1]), self._load_balance(normed)

    def init_cache(self, batch_size: int, max_length: int | None = None) -> Any:
        return self.attention.init_cache(batch_size, max_length)

    def step(self, x: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        y, cache = self.attention.step(self.norm(x), cache)
        return self._mix_channels(x + y), cache

    def _mix_channels(self, x, dropout_key=None):
        if self.mlp is None:
            return x
        return x + _drop(self.dropout, self.mlp(self.norm(x)), dropout_key)

    def _load_balance(self, normed):
        mixer = getattr(self.attention, "mixer", None)
        if isinstance(mixer, MoHMixer) and isinstance(mixer.router, HeadRouter):
            return mixer.router.load_balance_loss(normed)
        return None


def _drop(dropout: nnx.Dropout, x: jax.Array, key: jax.Array | None) -> jax.Array:
    return dropout(x, deterministic=key is None, rngs=key)
