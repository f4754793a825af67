"""Linear attention on a GPU, timed by `gpu_cases`."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

import attnx
from benchmarks import peers
from benchmarks.cases import Case

# Heads of a check: its reference keeps a state in float64 for each head and token.
FEW = 4


def linear(kind: str, batch: int, length: int, heads: int, size: int) -> Case:
    """Linear attention with a decay, beside a copy and beside causal softmax."""
    tokens = (batch, length, heads, size)
    shapes, candidates = (tokens,) * 3, {}
    if kind == "per token":
        shapes += (tokens[:3],)
    elif kind == "per channel":
        shapes += (tokens,)
    else:
        candidates["chunked_einsum"] = lambda query, key, value: peers.chunked_einsum(
            query, key, value, attnx.decay.retnet(heads)
        )

    def attention(query, key, value, log_decay=None, *, implementation):
        if log_decay is None:
            log_decay = attnx.decay.retnet(heads)
        return attnx.linear_attention(
            query, key, value, log_decay=log_decay, implementation=implementation
        )

    def gates(arrays):
        # As in Gated Linear Attention, from any numbers.
        *tokens, gates = arrays
        return [*tokens, jax.nn.log_sigmoid(gates.astype(jnp.float32)) / 16]

    def copy(query, key, *_):
        # As many bytes read and written as attention reads and writes, but of decays.
        return -query, -key

    def softmax(query, key, value, *_):
        return peers.cudnn(is_causal=True)(query, key, value)

    return Case(
        "linear_attention",
        f"{kind} decay B{batch} T{length} N{heads} H{size}",
        shapes,
        {**candidates, **peers.ours(attention)},
        functools.partial(linear, kind, 2, 1024, min(heads, FEW), size),
        "bfloat16",
        yardsticks={"copy": copy, "causal cudnn": softmax},
        prepare=gates if kind == "per channel" else list,
    )


def step(batch: int, heads: int, size: int) -> Case:
    """One token of linear attention, a decay a head, beside a copy of the state."""
    token = (batch, 1, heads, size)

    def attention(state, query, key, value):
        return attnx.linear_attention_step(
            state,
            *(x[:, 0] for x in (query, key, value)),
            log_decay=attnx.decay.retnet(heads),
        )

    def reference(state, query, key, value):
        out, state = attnx.linear_attention(
            query,
            key,
            value,
            log_decay=attnx.decay.retnet(heads),
            initial_state=state,
            implementation="reference",
            return_state=True,
        )
        return out[:, 0], state

    return Case(
        "linear_attention_step",
        f"step B{batch} N{heads} H{size}",
        ((batch, heads, size, size), token, token, token),
        {"reference": reference, "xla": attention, "einsum": peers.linear_step},
        functools.partial(step, 2, heads, size),
        "float32",
        ("forward",),
        {"copy": lambda state, *_: -state},
    )


def taylor(batch: int, length: int, heads: int, value_size: int) -> Case:
    """Taylor attention, beside a copy, causal softmax and features written out."""
    small, large = ((batch, length, heads, size) for size in (16, value_size))

    def features(query, key, value):
        # As wide as what they are multiplied with: else denominators come near 0.
        query, key = (x.astype(jnp.float32) for x in (query, key))
        query, key = map(attnx.feature_maps.taylor, (query, key))
        out = attnx.linear_attention(
            query, key, value, scale=1.0, normalize=True, implementation="xla"
        )
        return out.astype(value.dtype)

    def copy(query, key, value):
        # As many bytes read and written as attention reads and writes.
        return -query, -value

    def softmax(query, key, value):
        return peers.cudnn(is_causal=True)(value, value, value)

    return Case(
        "taylor_attention",
        f"taylor B{batch} T{length} N{heads} H16 V{value_size}",
        (small, small, large),
        {"features": features, **peers.ours(attnx.taylor_attention)},
        functools.partial(taylor, 1, 512, 4, value_size),
        "bfloat16",
        yardsticks={"copy": copy, "causal cudnn": softmax},
    )
