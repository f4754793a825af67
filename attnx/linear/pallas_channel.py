"""Linear attention with a decay a channel: forward by its GPU kernel, backward by xla.

The backward makes the forward's states again, by chunks, before it differentiates them.
"""

from __future__ import annotations

import jax

from attnx.linear import xla
from pallas_kernels.batching import mappable
from pallas_kernels.linear_channel_decay import linear_channel_scan
from pallas_kernels.mosaic import LOG2E

HEAD_SIZES = (64, 128)


@jax.custom_vjp
def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    scale: jax.Array,
    log_decay: jax.Array,
    initial_state: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The output and the final state, for whole chunks of one document a row."""
    tokens = query, key, value, log_decay * LOG2E, initial_state
    return mappable(linear_channel_scan)(tokens, (scale[None],))


def _forward(*operands):
    return attention(*operands), operands


def _backward(operands, cotangents):
    def of(*operands):
        return xla.linear_attention(*operands, None, reverse=False, normalize=False)

    return jax.vjp(of, *operands)[1](cotangents)


attention.defvjp(_forward, _backward)
