"""Fixed decays, one a head: the `log_decay` `[N]` of `linear_attention`.

Named for what they match: TransNormerLLM's paper and its released weights disagree.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from attnx._checks import expect


def transnormer_paper(num_heads: int, layer: int, num_layers: int) -> jax.Array:
    """-(8 h / N) (1 - layer / num_layers) for head h (arXiv:2401.04658 eq. 2).

    Linear in the head; head 0 does not decay. For the released weights see
    `transnormer_released`.

    Args:
      num_heads: N.
      layer: from 0.
      num_layers: layers of the model.
    """
    _check(num_heads, layer, num_layers)
    factor = 1 - layer / num_layers
    return jnp.array([-8 * h / num_heads * factor for h in range(num_heads)])


def transnormer_released(num_heads: int, layer: int, num_layers: int) -> jax.Array:
    """The decay of the released TransNormerLLM and MiniMax-01 weights.

    ALiBi's slopes, 2^(-8 (h + 1) / N) where N is a power of two, times
    1 - layer / (num_layers - 1) + 1e-5: the last layer hardly decays.

    Args:
      num_heads: N.
      layer: from 0.
      num_layers: layers of the model.

    Example:
      >>> from attnx import decay
      >>> [round(float(x), 4) for x in decay.transnormer_released(4, 0, 2)]
      [-0.25, -0.0625, -0.0156, -0.0039]
    """
    _check(num_heads, layer, num_layers)
    factor = 1 - layer / max(1, num_layers - 1) + 1e-5
    return jnp.array([-slope * factor for slope in _alibi_slopes(num_heads)])


def retnet(num_heads: int) -> jax.Array:
    """log(1 - 2^(-5 - h)) for head h (arXiv:2307.08621).

    Args:
      num_heads: N.
    """
    expect(num_heads >= 1, "num_heads", "at least 1", num_heads)
    return jnp.array([math.log1p(-(2.0 ** (-5 - h))) for h in range(num_heads)])


def _alibi_slopes(num_heads: int) -> list[float]:
    """A power of two's slopes, then every other one of the next power's."""
    power = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * (h + 1) / power) for h in range(power)]
    if power < num_heads:
        slopes += _alibi_slopes(2 * power)[0::2][: num_heads - power]
    return slopes


def _check(num_heads: int, layer: int, num_layers: int) -> None:
    expect(num_heads >= 1, "num_heads", "at least 1", num_heads)
    expect(num_layers >= 1, "num_layers", "at least 1", num_layers)
    expect(0 <= layer < num_layers, "layer", f"0 to {num_layers - 1}", layer)
