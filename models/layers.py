"""What a decoder has beside attention: channel mixers and convolutions."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike


class GLU(nnx.Module):
    """The channel mixer `((x V) * f(x U)) O`.

    With the identity for f it is TransNormerLLM's SGLU, with `jax.nn.silu` SwiGLU.

    Args:
      d_model: D.
      mlp_dim: the size inside.
      activation: f.
      dtype: of the computation.
      rngs: keys for the parameters.
    """

    def __init__(
        self,
        d_model: int,
        mlp_dim: int,
        activation: Callable[[jax.Array], jax.Array],
        *,
        dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        linear = lambda i, o, init: nnx.Linear(
            i, o, use_bias=False, kernel_init=init, dtype=dtype, rngs=rngs
        )
        lecun = nnx.initializers.lecun_normal()
        self.value = linear(d_model, mlp_dim, lecun)
        self.gate = linear(d_model, mlp_dim, lecun)
        self.out = linear(mlp_dim, d_model, nnx.initializers.zeros_init())
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(self.value(x) * self.activation(self.gate(x)))


class ConvolutionCache(NamedTuple):
    """The last tokens that a convolution saw, the newest last; zeros before the first.

    Attributes:
      inputs: `[B, width - 1, channels]`.
      lengths: int `[B]`, tokens seen.
    """

    inputs: jax.Array
    lengths: jax.Array


class GatedConvolution(nnx.Module):
    """Based's token mixer `(silu(conv(x U)) * (x V)) O`: short, causal, by channel.

    The BaseConv of arXiv:2402.18668, twice as wide inside as outside. It finds what
    stands next to a token, so that attention need not.

    Args:
      d_model: D.
      width: tokens that the convolution sees, the own one included.
      dtype: of the computation.
      rngs: keys for the parameters.
    """

    def __init__(
        self,
        d_model: int,
        width: int = 3,
        *,
        dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        size = 2 * d_model
        self.input = nnx.Linear(d_model, size, use_bias=False, dtype=dtype, rngs=rngs)
        self.gate = nnx.Linear(d_model, size, use_bias=False, dtype=dtype, rngs=rngs)
        noise = nnx.initializers.lecun_normal()(rngs.params(), (width, size))
        self.taps = nnx.Param(noise)
        self.bias = nnx.Param(jnp.zeros(size))
        self.out = nnx.Linear(
            size,
            d_model,
            use_bias=False,
            kernel_init=nnx.initializers.zeros_init(),
            dtype=dtype,
            rngs=rngs,
        )
        self.width = width

    def __call__(self, x: jax.Array) -> jax.Array:
        """Mixes whole sequences `[B, T, D]`."""
        return self.step(x, self.init_cache(x.shape[0]))[0]

    def init_cache(
        self, batch_size: int, max_length: int | None = None
    ) -> ConvolutionCache:
        """Makes an empty cache. It does not grow, so `max_length` is not needed."""
        shape = (batch_size, self.width - 1, self.input.out_features)
        dtype = self.input.dtype or self.input.param_dtype
        return ConvolutionCache(
            jnp.zeros(shape, dtype), jnp.zeros(batch_size, jnp.int32)
        )

    def step(
        self, x: jax.Array, cache: ConvolutionCache
    ) -> tuple[jax.Array, ConvolutionCache]:
        """Continues the sequences in the cache by tokens `[B, T_new, D]`."""
        inputs = jnp.concatenate([cache.inputs, self.input(x)], 1)
        # By hand: compilers are slow at a convolution with as many groups as channels,
        # above all at its gradient.
        taps, length = self.taps.astype(inputs.dtype), x.shape[1]
        near = [taps[i] * inputs[:, i : i + length] for i in range(self.width)]
        mixed = sum(near, start=self.bias.astype(inputs.dtype))
        out = self.out(nnx.silu(mixed) * self.gate(x))
        kept = inputs[:, inputs.shape[1] - self.width + 1 :]
        return out, ConvolutionCache(kept, cache.lengths + x.shape[1])
