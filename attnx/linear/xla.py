"""Linear attention by chunks: matrix products inside a chunk, a state between chunks.

One function, `_chunk`, holds the mathematics of a chunk (arXiv:2312.06635 section 4;
arXiv:2401.04658 eqs. 6-9) and `jax.lax.scan` runs it over the sequence. The backward
pass keeps the inputs and the state at each chunk's edge, nothing of size T x T or
T x chunk, and scans back over the chunks, differentiating `_chunk` at each.

No weight is ever made as e^G * e^-G, which overflows for strong decay: each is the
exponential of a sum of log decays between two tokens. Products of float32 matrices
follow `jax.default_matmul_precision`: full on CPU, lower by default elsewhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attnx.linear.feature_maps import identity, taylor
from attnx.linear.normalizer import divide_by_last
from attnx.linear.operands import by_token, empty_state

# Tokens a chunk. Longer chunks store fewer states and do more work inside the chunk.
CHUNK = 64


class Kernel(NamedTuple):
    """What a query and a key are to each other, said twice.

    Attributes:
      weight: a function of their inner product and their size.
      features: a map of either, the inner product of whose values is the same.
    """

    weight: Callable[[jax.Array, int], jax.Array]
    features: Callable[[jax.Array], jax.Array]


PRODUCT = Kernel(lambda product, size: product, identity)


class _Weights(NamedTuple):
    """How much of what a chunk's rows see of one another and of the state.

    With C tokens a chunk and D either 1 (one decay for all channels) or H.
    """

    within: Any  # [..., C, C]: scale e^(G_i - G_j), 0 above the diagonal
    entering: jax.Array  # [..., C, D]: scale e^(G_i), from the state that enters
    leaving: jax.Array  # [..., C, D]: e^(G_C - G_j), to the state that leaves
    across: jax.Array  # [..., D, 1]: e^(G_C), from state to state


def linear_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    scale: jax.Array,
    log_decay: jax.Array | None,
    initial_state: jax.Array | None,
    segment_ids: jax.Array | None,
    *,
    reverse: bool,
    normalize: bool,
    kernel: Kernel = PRODUCT,
) -> tuple[jax.Array, jax.Array]:
    """See `attnx.linear_attention`; returns the output and the final state.

    `kernel` makes it the same function of features that exist a chunk at a time; not
    with one decay a channel, nor with a scale but 1.
    """
    length = query.shape[1]
    dtype = scale.dtype
    chunk_size = min(CHUNK, 1 << (length - 1).bit_length())
    # The first chunk is filled up in front, and that must not decay a state.
    filled = length % chunk_size > 0 and initial_state is not None
    log_decay = by_token(log_decay, segment_ids, query, dtype, reverse, filled)
    if log_decay.ndim == 1:
        weights = _head_weights(jnp.tile(log_decay[:, None], chunk_size), scale)
        log_decay = None
    else:
        weights = None
    if initial_state is None:
        first = kernel.features(query[:, :1])
        initial_state = empty_state(first, value.shape[-1] + normalize, dtype)
    # One more column of values; tokens that fill up have 0, and are not counted.
    ones = jnp.ones_like(query[..., :1, :1], dtype) if normalize else None
    tokens = query, key, value, log_decay, ones
    return _scan(chunk_size, reverse, kernel, tokens, initial_state, weights, scale)


def taylor_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    initial_state: jax.Array | None,
    segment_ids: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """See `attnx.taylor_attention`; returns the output and the final state."""
    dtype = jnp.promote_types(jnp.result_type(query, key, value), jnp.float32)
    return linear_attention(
        *(query, key, value, jnp.ones((), dtype), None, initial_state, segment_ids),
        reverse=False,
        normalize=True,
        kernel=Kernel(_second_order, taylor),
    )


def _second_order(product: jax.Array, size: int) -> jax.Array:
    a = product / size**0.5
    return 1 + a + a * a / 2


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _scan(chunk_size, reverse, kernel, tokens, state, weights, scale):
    """The outputs for all tokens and the last state, from the first."""
    (out, state), _ = _scan_fwd(
        chunk_size, reverse, kernel, tokens, state, weights, scale
    )
    return out, state


def _scan_fwd(chunk_size, reverse, kernel, tokens, state, weights, scale):
    whole = jax.tree.map(functools.partial(_split, chunk_size, reverse), tokens)
    query, _, value, *_ = whole
    # Made from the query, so as to be laid out over devices as it is.
    out = jnp.zeros_like(query[..., :1], state.dtype)
    out = jnp.broadcast_to(out, (*query.shape[:-1], value.shape[-1]))

    def step(carry, _):
        i, state, out = carry
        chunk = _take(whole, i, reverse, state.dtype)
        after, chunk = _chunk(kernel, state, chunk, weights, scale)
        return (i + 1, after, _put(out, i, reverse, chunk)), state

    carry, states = jax.lax.scan(step, (0, state, out), length=query.shape[1])
    _, last, out = carry
    return (_join(out, tokens[0], reverse), last), (tokens, states, weights, scale)


def _scan_bwd(chunk_size, reverse, kernel, residuals, cotangents):
    tokens, states, weights, scale = residuals
    d_out, d_state = cotangents
    split = functools.partial(_split, chunk_size, reverse)
    whole, d_out = jax.tree.map(split, (tokens, d_out))

    def step(carry, state):
        i, d_state, d_tokens, d_shared = carry
        chunk, d_chunk = _take((whole, d_out), i, reverse, state.dtype)
        _, vjp = jax.vjp(
            functools.partial(_chunk, kernel), state, chunk, weights, scale
        )
        d_state, d_chunk, *more = vjp((d_state, d_chunk))
        d_tokens = _put(d_tokens, i, reverse, d_chunk)
        return (i - 1, d_state, d_tokens, jax.tree.map(jnp.add, d_shared, more)), None

    zeros = functools.partial(jnp.zeros_like, dtype=states.dtype)
    d_tokens, d_shared = jax.tree.map(zeros, (whole, [weights, scale]))
    carry = states.shape[0] - 1, d_state, d_tokens, d_shared
    carry, _ = jax.lax.scan(step, carry, states, reverse=True)
    _, d_state, d_tokens, d_shared = carry
    join = functools.partial(_join, reverse=reverse)
    return jax.tree.map(join, d_tokens, tokens), d_state, *d_shared


_scan.defvjp(_scan_fwd, _scan_bwd)


def _chunk(kernel, state, tokens, weights, scale):
    """The state after a chunk and the chunk's outputs, from the state before it.

    `tokens` are the query `[B, C, N, H]`, key and value with their K heads, and the log
    decay if it varies by token; else `weights`, made of it, serve every chunk. `ones`,
    if there are, make the outputs means.
    """
    query, key, value, log_decay, ones = tokens
    num_heads = query.shape[2]
    q, k, v = (_heads_first(x, num_heads) for x in (query, key, value))
    if ones is not None:
        v = jnp.concatenate([v, _heads_first(ones, num_heads)], axis=-1)

    if log_decay is None or log_decay.ndim == 3:
        if weights is None:
            weights = _head_weights(jnp.swapaxes(log_decay, 1, 2), scale)
        within = weights.within * kernel.weight(q @ k.mT, q.shape[-1])
        q, k = kernel.features(q), kernel.features(k)
        out = within @ v + weights.entering * (q @ state)
    else:
        log_decay = _heads_first(log_decay, num_heads)
        inside, weights = _channel_decay(q, k, v, log_decay, scale)
        out = inside + (weights.entering * q) @ state
    state = weights.across * state + (weights.leaving * k).mT @ v
    if ones is not None:
        out = divide_by_last(out)
    return state, jnp.swapaxes(out, 1, 2)


def _head_weights(log_decay: jax.Array, scale: jax.Array) -> _Weights:
    """The weights for one decay a token and head, `log_decay` being `[..., C]`.

    A difference of two long sums would lose the small decays behind a large one, so
    sums are kept in two parts: multiples of 1/64, whose sums are exact, and the rest.
    """
    coarse = jax.lax.stop_gradient(jnp.round(log_decay * 64) / 64)
    sums = [jnp.cumsum(part, axis=-1) for part in (coarse, log_decay - coarse)]
    between = sum(part[..., :, None] - part[..., None, :] for part in sums)
    token = jnp.arange(log_decay.shape[-1])
    age = token[:, None] - token
    # Masks are inside the exponential, beyond them lie overflows. The diagonal is a
    # constant: a token meets itself undecayed, and its gradient would drown the others.
    itself = jnp.where(age == 0, 0.0, -jnp.inf)
    between = jnp.exp(jnp.where(age > 0, between, itself))
    since_start = jnp.exp(sum(sums))[..., None]
    return _Weights(
        within=scale * between,
        entering=scale * since_start,
        leaving=between[..., -1, :, None],
        across=since_start[..., -1:, :],
    )


def _channel_decay(q, k, v, log_decay, scale) -> tuple[jax.Array, _Weights]:
    """What a chunk's tokens see of one another under one decay a channel.

    Blocks of 1, 2, 4, ... tokens are joined in pairs. Between the two blocks of a pair
    the weight is a product of what is left of the key at the end of its block, and of
    the decay from there to the query: two factors below 1, and a matrix product.
    `until[i]` sums a block's log decays up to token i, `after[i]` those behind it.
    """
    chunk_size = q.shape[-2]
    out = scale * jnp.sum(q * k, -1, keepdims=True) * v
    until, after = log_decay, jnp.zeros_like(log_decay)
    size = 1
    while size < chunk_size:
        pairs = functools.partial(_pairs, size=size)
        (_, right_q), (left_k, _), (left_v, _) = pairs(q), pairs(k), pairs(v)
        (left_until, right_until), (left_after, right_after) = (
            pairs(until),
            pairs(after),
        )
        weights = (scale * jnp.exp(right_until) * right_q) @ (
            jnp.exp(left_after) * left_k
        ).mT
        left_out, right_out = pairs(out)
        out = _unpair(left_out, right_out + weights @ left_v)
        left_total, right_total = left_until[..., -1:, :], right_until[..., -1:, :]
        until = _unpair(left_until, left_total + right_until)
        after = _unpair(left_after + right_total, right_after)
        size *= 2
    across = jnp.exp(until[..., -1, :, None])
    return out, _Weights(None, scale * jnp.exp(until), jnp.exp(after), across)


def _heads_first(x: jax.Array, num_heads: int) -> jax.Array:
    """`[B, C, K, H]` to `[B, N, C, H]`, each head repeated for its group of queries."""
    x = jnp.swapaxes(x, 1, 2)
    return jnp.repeat(x, num_heads // x.shape[1], axis=1)


def _pairs(x: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """The left and the right blocks, `[..., C / (2 size), size, H]`, of each pair."""
    x = x.reshape(*x.shape[:-2], -1, 2, size, x.shape[-1])
    return x[..., 0, :, :], x[..., 1, :, :]


def _unpair(left: jax.Array, right: jax.Array) -> jax.Array:
    x = jnp.stack([left, right], axis=-3)
    return x.reshape(*x.shape[:-4], -1, x.shape[-1])


def _split(chunk_size: int, reverse: bool, x: jax.Array) -> jax.Array:
    """`[B, T, ...]` to `[B, T / C, C, ...]`, which copies nothing if C divides T.

    Else the first chunk is filled up with zeros: keys that add nothing, no decay.
    """
    if fill := -x.shape[1] % chunk_size:
        width = (0, fill) if reverse else (fill, 0)
        x = jnp.pad(x, [(0, 0), width] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(x.shape[0], -1, chunk_size, *x.shape[2:])


def _join(x: jax.Array, like: jax.Array, reverse: bool) -> jax.Array:
    """`_split` undone: as many tokens as `like` has, and of its dtype."""
    length = like.shape[1]
    x = x.reshape(x.shape[0], -1, *x.shape[3:])
    return (x[:, :length] if reverse else x[:, -length:]).astype(like.dtype)


def _take(tree, i: jax.Array, reverse: bool, dtype):
    """The i-th chunk of each array, `[B, C, ...]`, all in the order of processing.

    Chunks are taken and put where they are: to bring whole arrays into another order
    or dtype first makes long sequences slower by the token than short ones.
    """

    def take(x):
        at = x.shape[1] - 1 - i if reverse else i
        x = jax.lax.dynamic_index_in_dim(x, at, axis=1, keepdims=False)
        return (jnp.flip(x, axis=1) if reverse else x).astype(dtype)

    return jax.tree.map(take, tree)


def _put(tree, i: jax.Array, reverse: bool, chunks):
    """The arrays with chunks put where `_take` would find them.

    They are float32, or wider: where XLA for CPU updates a slice of a bfloat16 array,
    it converts the whole array, once a chunk.
    """

    def put(x, chunk):
        at = x.shape[1] - 1 - i if reverse else i
        chunk = jnp.flip(chunk, axis=1) if reverse else chunk
        return jax.lax.dynamic_update_index_in_dim(x, chunk, at, axis=1)

    return jax.tree.map(put, tree, chunks)
