"""The token mixers that a decoder's layers can have, by name."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnx import decay, feature_maps, masks
from attnx.nn import (
    LRPE,
    Attention,
    HeadRouter,
    LinearMixer,
    LogDecay,
    Mixer,
    MoBAMixer,
    MoHMixer,
    QueryRouter,
    Rotary,
    RoutingMixer,
    SoftmaxMixer,
    SplitMixer,
    SRMSNorm,
    SuperlinearMixer,
    TaylorMixer,
    WindowMixer,
)
from models.layers import GatedConvolution

if TYPE_CHECKING:
    from models.lm import LMConfig

# `(config, layer, rngs)` to a layer that is called, makes a cache and takes steps as
# `attnx.nn.Attention` does. `layer` counts from 0.
TokenMixer = Callable[["LMConfig", int, nnx.Rngs], Any]


def softmax(config: LMConfig, layer: int, rngs: nnx.Rngs) -> Attention:
    """Causal softmax attention with rotary positions."""
    return _rotary(config, SoftmaxMixer(), rngs)


def window(config: LMConfig, layer: int, rngs: nnx.Rngs) -> Attention:
    """The same to the last `config.window` tokens."""
    return _rotary(config, WindowMixer(config.window - 1), rngs)


def power(config: LMConfig, layer: int, rngs: nnx.Rngs) -> Attention:
    """The same to blocks at distances 0 and powers of two, and the first: a sink."""
    size = config.block_size
    mask = masks.Power(size, window=2) | masks.Causal() & masks.Prefix(size)
    return _rotary(config, SoftmaxMixer(mask), rngs)


def moba(config: LMConfig, layer: int, rngs: nnx.Rngs) -> Attention:
    """The same to the `config.top_k` blocks that suit a query best, its own included.

    The two other methods of `attnx.select` that choose by content are no decoders:
    VMoBA is not causal, and DHSA's choice looks ahead.
    """
    return _rotary(config, MoBAMixer(config.block_size, config.top_k), rngs)


def moh(config: LMConfig, layer: int, rngs: nnx.Rngs) -> Attention:
    """The same, of which each token activates `config.active_heads` heads."""
    router = HeadRouter(
        config.d_model,
        config.num_heads,
        num_shared=config.shared_heads,
        top_k=config.active_heads - config.shared_heads,
        rngs=rngs,
    )
    return _rotary(config, MoHMixer(SoftmaxMixer(), router), rngs)


def moh_query(config: LMConfig, layer: int, rngs: nnx.Rngs) -> Attention:
    """The same with the parameters of `softmax`, to go on training them."""
    router = QueryRouter(
        config.num_heads,
        num_shared=config.shared_heads,
        top_k=config.active_heads - config.shared_heads,
    )
    return _rotary(config, MoHMixer(SoftmaxMixer(), router), rngs)


def superlinear(config: LMConfig, layer: int, rngs: nnx.Rngs) -> Attention:
    """Softmax attention to 15 tokens and to the spans that a router finds.

    Without positions: a key is looked for by what the layers below put there.
    """
    router = nnx.LinearGeneral(
        config.d_model,
        (config.num_heads, config.d_model // config.num_heads),
        use_bias=False,
        dtype=jnp.dtype(config.dtype),
        rngs=rngs,
    )
    return _attention(config, SuperlinearMixer(router), rngs)


def routing(config: LMConfig, layer: int, rngs: nnx.Rngs) -> Attention:
    """Half of the heads as `window`; the others inside `config.num_clusters` clusters.

    No value comes from the future, but which tokens share a cluster depends on all of
    them, so that it does not generate by steps.
    """
    local = config.num_heads // 2
    clusters = RoutingMixer(
        config.num_heads - local,
        config.d_model // config.num_heads,
        config.num_clusters,
        decay=0.99,  # The paper's 0.999 is for a hundred times the steps.
        rngs=rngs,
    )
    mixer = SplitMixer(
        (local, WindowMixer(config.window - 1)), (config.num_heads - local, clusters)
    )
    return _attention(config, mixer, rngs, position=_RotaryHeads(local))


def linear(config: LMConfig, layer: int, rngs: nnx.Rngs) -> Attention:
    """Kernel attention with elu + 1, divided by the sum of its weights."""
    mixer = LinearMixer(
        feature_map=feature_maps.elu_plus_one, scale=1.0, normalize=True
    )
    return _attention(config, mixer, rngs)


def taylor(config: LMConfig, layer: int, rngs: nnx.Rngs) -> Attention:
    """Based's: the second order of exp, over `config.feature_dim` channels a head."""
    return _attention(
        config,
        TaylorMixer(),
        rngs,
        head_dim=config.feature_dim,
        value_dim=config.d_model // config.num_heads,
    )


def lightning(
    config: LMConfig,
    layer: int,
    rngs: nnx.Rngs,
    position: Callable[..., jax.Array] | None = None,
) -> Attention:
    """TransNormerLLM's: gated, normalized, with a decay for each head and layer."""
    log_decay = decay.transnormer_released(config.num_heads, layer, config.num_layers)
    return _attention(
        config,
        LinearMixer(log_decay, scale=1.0),
        rngs,
        activation=jax.nn.silu,
        position=position,
        norm=SRMSNorm(),
        gate=feature_maps.identity,
    )


def lightning_lrpe(config: LMConfig, layer: int, rngs: nnx.Rngs) -> Attention:
    """The same with learned positions, as in TransNormerLLM's first layer."""
    lrpe = LRPE(config.num_heads, config.d_model // config.num_heads)
    return lightning(config, layer, rngs, position=lrpe)


def retention(config: LMConfig, layer: int, rngs: nnx.Rngs) -> Attention:
    """Gated linear attention with RetNet's decays: head h has 2 ** (5 + h) tokens."""
    mixer = LinearMixer(decay.retnet(config.num_heads))
    return _attention(config, mixer, rngs, norm=SRMSNorm(), gate=jax.nn.silu)


def gated_linear(config: LMConfig, layer: int, rngs: nnx.Rngs) -> Attention:
    """Linear attention with a decay that each token sets, one a head."""
    log_decay = LogDecay(
        config.d_model, config.num_heads, dtype=jnp.dtype(config.dtype), rngs=rngs
    )
    return _attention(
        config,
        LinearMixer(log_decay),
        rngs,
        norm=SRMSNorm(),
        gate=jax.nn.silu,
    )


def convolution(config: LMConfig, layer: int, rngs: nnx.Rngs) -> GatedConvolution:
    """Based's short convolution."""
    return GatedConvolution(config.d_model, dtype=jnp.dtype(config.dtype), rngs=rngs)


TOKEN_MIXERS: dict[str, TokenMixer] = {
    "softmax": softmax,
    "window": window,
    "power": power,
    "moba": moba,
    "moh": moh,
    "moh_query": moh_query,
    "superlinear": superlinear,
    "routing": routing,
    "linear": linear,
    "taylor": taylor,
    "lightning": lightning,
    "lightning_lrpe": lightning_lrpe,
    "retention": retention,
    "gated_linear": gated_linear,
    "convolution": convolution,
}


@dataclasses.dataclass(frozen=True)
class _RotaryHeads:
    """Rotary positions of the first heads; the others go by content alone."""

    num_heads: int

    def __call__(self, x: jax.Array, *positions: jax.Array) -> jax.Array:
        turned, rest = jnp.split(x, [self.num_heads], axis=-2)
        return jnp.concatenate([Rotary()(turned, *positions), rest], -2)


def _attention(config: LMConfig, mixer: Mixer, rngs: nnx.Rngs, **options) -> Attention:
    return Attention(
        config.d_model,
        config.num_heads,
        mixer,
        use_bias=False,
        dtype=jnp.dtype(config.dtype),
        out_kernel_init=nnx.initializers.zeros_init(),
        rngs=rngs,
        **options,
    )


_rotary = functools.partial(_attention, position=Rotary())
