"""Networks that answer with their inputs: pointers over what an encoder has read.

The sequence has symbols 0 to n: 0 is the end, symbol i + 1 is point i. An encoder reads
the end first, so that it has a state to point to as every point has.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from attnx import masks
from attnx._checks import expect, expect_shape
from attnx.nn import Attention, Rotary, SoftmaxMixer, SRMSNorm
from models.layers import GLU

FEATURES = 3  # of a symbol: the two coordinates, and whether it is the end
# Symbols that an LSTM reads in a turn of its loop: on a GPU a turn costs about as much
# as a symbol's products do.
_UNROLL = 5


@dataclasses.dataclass(frozen=True)
class PointerConfig:
    """The parts of a pointer network and their sizes.

    Attributes:
      encoder: `lstm` as in Vinyals et al. (2015), or `attention`.
      d_model: D, the size of every state.
      num_layers: of the attention encoder.
      num_heads: of its layers.
      mlp_dim: the size inside its channel mixers.
    """

    encoder: Literal["lstm", "attention"] = "lstm"
    d_model: int = 256
    num_layers: int = 3
    num_heads: int = 8
    mlp_dim: int = 512

    def __post_init__(self):
        expect(self.encoder in ENCODERS, "encoder", " or ".join(ENCODERS), self.encoder)


class Memory(NamedTuple):
    """What a decoder looks up.

    Attributes:
      keys: `[B, n + 1, D]`, projected states of the encoder.
      inputs: `[B, n + 1, F]`, what the decoder reads of the symbol last pointed to.
      valid: bool `[B, n + 1]`, False for padding.
    """

    keys: jax.Array
    inputs: jax.Array
    valid: jax.Array


class PointerNetwork(nnx.Module):
    """Points at one input after another (Vinyals, Fortunato, Jaitly 2015).

    An LSTM decoder goes on from the encoder's last state. Its first input is the end
    symbol, then each symbol pointed to; its state is the query of the pointer.

    Args:
      config: parts and sizes.
      rngs: keys for the parameters.

    Example:
      >>> model = PointerNetwork(PointerConfig(d_model=8), rngs=nnx.Rngs(0))
      >>> points, lengths = jnp.ones((2, 5, 2)), jnp.array([5, 3])
      >>> symbols = jnp.array([[2, 1, 5, 0], [3, 1, 0, 0]])
      >>> jax.eval_shape(model, points, lengths, symbols).shape
      (2, 4, 6)
    """

    def __init__(self, config: PointerConfig, *, rngs: nnx.Rngs):
        size = config.d_model
        self.encoder = ENCODERS[config.encoder](config, rngs=rngs)
        self.cell = nnx.OptimizedLSTMCell(self.encoder.input_size, size, rngs=rngs)
        self.key = nnx.Linear(size, size, use_bias=False, rngs=rngs)
        self.query = nnx.Linear(size, size, use_bias=False, rngs=rngs)
        self.vector = nnx.Param(jax.random.normal(rngs.params(), (size,)) * size**-0.5)

    def __call__(
        self, points: jax.Array, lengths: jax.Array, symbols: jax.Array
    ) -> jax.Array:
        """Scores every next symbol of given sequences.

        Args:
          points: `[B, n, 2]`.
          lengths: int `[B]`; points from there on are padding.
          symbols: int `[B, M]`.

        Returns:
          float32 `[B, M, n + 1]`; at position t the scores of symbol t after those
          before it, -inf for padding.
        """
        memory, carry = self.encode(points, lengths)
        before = jnp.pad(symbols[:, :-1], ((0, 0), (1, 0)))
        inputs = _take(memory.inputs, before)
        _, states = jax.lax.scan(
            self.cell, carry, inputs.swapaxes(0, 1), unroll=_UNROLL
        )
        return self._scores(memory, states.swapaxes(0, 1))

    def encode(self, points: jax.Array, lengths: jax.Array) -> tuple[Memory, Any]:
        """Reads points `[B, n, 2]`; the rest `[B]` of them on is padding.

        Returns:
          The memory, and the decoder's first carry, arrays `[B, D]`.
        """
        batch, n, _ = points.shape
        expect_shape("lengths", lengths, (batch,))
        end = jnp.zeros((batch, 1, FEATURES)).at[..., -1].set(1)
        features = jnp.pad(points, ((0, 0), (0, 0), (0, 1)))
        features = jnp.concatenate([end, features], 1)
        valid = jnp.arange(n + 1) <= lengths[:, None]
        states, inputs, carry = self.encoder(features, valid)
        return Memory(self.key(states), inputs, valid), carry

    def step(
        self, memory: Memory, carry: Any, symbols: jax.Array
    ) -> tuple[jax.Array, Any]:
        """Goes on by one symbol, with any number of sequences over each memory.

        Args:
          memory: from `encode`.
          carry: arrays `[B, W, D]`.
          symbols: int `[B, W]`, those last pointed to; at first 0.

        Returns:
          Scores of the next symbol `[B, W, n + 1]`, and the carry to go on with.
        """
        carry, states = self.cell(carry, _take(memory.inputs, symbols))
        return self._scores(memory, states), carry

    def _scores(self, memory: Memory, states: jax.Array) -> jax.Array:
        scores = additive_scores(self.query(states), memory.keys, self.vector[...])
        return jnp.where(memory.valid[:, None], scores, -jnp.inf)


@jax.checkpoint
def additive_scores(query: jax.Array, key: jax.Array, vector: jax.Array) -> jax.Array:
    """Scores keys by `v . tanh(W1 e_j + W2 d_i)`, given the two projections.

    Equation 3 of Vinyals et al. (2015). The sums `[B, M, S, D]` inside are made again
    for the gradient and not kept.

    Args:
      query: `[B, M, D]`, W2 d.
      key: `[B, S, D]`, W1 e.
      vector: `[D]`, v.

    Returns:
      `[B, M, S]`.
    """
    return (jnp.tanh(query[:, :, None] + key[:, None]) * vector).sum(-1)


class LSTMEncoder(nnx.Module):
    """Reads symbols one after another; what it is given is what the decoder reads."""

    input_size = FEATURES

    def __init__(self, config: PointerConfig, *, rngs: nnx.Rngs):
        self.cell = nnx.OptimizedLSTMCell(FEATURES, config.d_model, rngs=rngs)

    def __call__(self, features: jax.Array, valid: jax.Array):
        """Encodes features `[B, S, 3]` of which some are `valid`, bool `[B, S]`.

        Returns:
          States `[B, S, D]`, what the decoder reads of each symbol, and its carry.
        """

        def step(carry, inputs):
            x, real = inputs
            new, state = self.cell(carry, x)
            # Padding leaves the carry as it was.
            keep = lambda new, old: jnp.where(real[:, None], new, old)
            return jax.tree.map(keep, new, carry), state

        zeros = jnp.zeros((len(features), self.cell.hidden_features), features.dtype)
        carry, states = jax.lax.scan(
            step,
            (zeros, zeros),
            (features.swapaxes(0, 1), valid.T),
            unroll=_UNROLL,
        )
        return states.swapaxes(0, 1), features, carry


class AttentionEncoder(nnx.Module):
    """Layers of attention from every symbol to every other, the order by rotation.

    The decoder reads the states of the symbols, and begins from their mean.
    """

    def __init__(self, config: PointerConfig, *, rngs: nnx.Rngs):
        size = self.input_size = config.d_model
        self.embed = nnx.Linear(FEATURES, size, rngs=rngs)
        self.blocks = nnx.List(
            [_Block(config, rngs=rngs) for _ in range(config.num_layers)]
        )
        self.norm = SRMSNorm()
        self.carry = nnx.Linear(size, 2 * size, rngs=rngs)

    def __call__(self, features: jax.Array, valid: jax.Array):
        """Encodes as `LSTMEncoder` does."""
        x = self.embed(features)
        for block in self.blocks:
            x = block(x, valid)
        states = self.norm(x)
        mean = states.mean(1, where=valid[..., None])
        cell, hidden = jnp.split(self.carry(mean), 2, -1)
        return states, states, (cell, jnp.tanh(hidden))


class _Block(nnx.Module):
    """Attention, then a channel mixer, each on a normalized residual stream."""

    def __init__(self, config: PointerConfig, *, rngs: nnx.Rngs):
        self.norm = SRMSNorm()
        self.attention = Attention(
            config.d_model,
            config.num_heads,
            SoftmaxMixer(masks.Full()),
            position=Rotary(),
            use_bias=False,
            out_kernel_init=nnx.initializers.zeros_init(),
            rngs=rngs,
        )
        self.mlp = GLU(config.d_model, config.mlp_dim, jax.nn.silu, rngs=rngs)

    def __call__(self, x: jax.Array, valid: jax.Array) -> jax.Array:
        # Padding is a document of its own.
        x = x + self.attention(self.norm(x), segment_ids=valid.astype(jnp.int32))
        return x + self.mlp(self.norm(x))


def _take(inputs: jax.Array, symbols: jax.Array) -> jax.Array:
    """What is read of symbols `[B, M]`: rows of `[B, S, F]`."""
    return jnp.take_along_axis(inputs, symbols[..., None], 1)


ENCODERS: dict[str, Any] = {"lstm": LSTMEncoder, "attention": AttentionEncoder}
