"""What is timed: the functions of attnx, and what else a JAX user has."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

CHUNK = 128


def dense_softmax(mask):
    """`jax.nn.dot_product_attention` with the whole boolean mask `[T, S]`."""

    def attention(query, key, value):
        return jax.nn.dot_product_attention(query, key, value, mask=mask()[None, None])

    return attention


def causal_softmax(query, key, value):
    """`jax.nn.dot_product_attention` with its own causal mask."""
    return jax.nn.dot_product_attention(query, key, value, is_causal=True)


def by_head(attention):
    """The same one head at a time: only one head's scores exist, and none are kept."""

    @jax.checkpoint
    def head(arrays):
        return attention(*(x[:, :, None] for x in arrays))[:, :, 0]

    def attend(*arrays):
        heads = tuple(jnp.moveaxis(x, 2, 0) for x in arrays)
        return jnp.moveaxis(lax.map(head, heads), 0, 2)

    return attend


def dense_neighborhood(mask):
    """The same over the flattened tokens of an image `[B, *space, N, H]`."""

    def attention(*arrays):
        flat = (x.reshape(x.shape[0], -1, *x.shape[-2:]) for x in arrays)
        return dense_softmax(mask)(*flat).reshape(arrays[0].shape)

    return attention


def associative_scan(query, key, value, log_decay):
    """The recurrence of linear attention with one decay a head, every state kept."""

    def combine(left, right):
        return left[0] * right[0], left[1] * right[0][..., None, None] + right[1]

    decay = jnp.broadcast_to(jnp.exp(log_decay), query.shape[:3])
    outer = jnp.einsum("btnh,btnv->btnhv", key, value)
    _, states = lax.associative_scan(combine, (decay, outer), axis=1)
    scale = query.shape[-1] ** -0.5
    return scale * jnp.einsum("btnh,btnhv->btnv", query, states)


def linear_step(state, query, key, value):
    """One token of linear attention, written out, with the decay of RetNet."""
    heads, size = query.shape[2:]
    decay = 1 - 2.0 ** (-5 - jnp.arange(heads))
    q, k, v = (x[:, 0] for x in (query, key, value))
    state = decay[:, None, None] * state + jnp.einsum("bnh,bnv->bnhv", k, v)
    return size**-0.5 * jnp.einsum("bnh,bnhv->bnv", q, state), state


def chunked_einsum(query, key, value, log_decay):
    """The textbook chunked form, differentiated by JAX."""
    batch, length, heads, size = query.shape
    chunks = (batch, length // CHUNK, CHUNK, heads, -1)
    q, k, v = (x.reshape(chunks) for x in (query, key, value))
    steps = jnp.arange(CHUNK)
    ahead = steps[:, None] - steps
    weight = jnp.where(ahead >= 0, ahead, 0)[..., None] * log_decay
    weight = jnp.where((ahead >= 0)[..., None], jnp.exp(weight), 0)
    to_end = jnp.exp((CHUNK - 1 - steps)[:, None] * log_decay)
    from_start = jnp.exp((steps + 1)[:, None] * log_decay)
    inside = jnp.einsum("bcinh,bcjnh,ijn->bcijn", q, k, weight)
    out = jnp.einsum("bcijn,bcjnv->bcinv", inside, v)
    added = jnp.einsum("bcjnh,bcjnv,jn->bcnhv", k, v, to_end)
    decay = jnp.exp(CHUNK * log_decay)[:, None, None]

    def step(state, added):
        return decay * state + added, state

    start = jnp.zeros(added.shape[:1] + added.shape[2:], added.dtype)
    _, states = lax.scan(step, start, jnp.moveaxis(added, 1, 0))
    states = jnp.moveaxis(states, 0, 1)
    out += jnp.einsum("bcinh,bcnhv,in->bcinv", q, states, from_start)
    return size**-0.5 * out.reshape(batch, length, heads, -1)


def ours(
    fn: Callable, names: tuple[str, ...] = ("reference", "xla", "pallas"), **options
) -> dict[str, Callable]:
    """A function of attnx by each of its implementations."""
    return {
        name: functools.partial(fn, implementation=name, **options) for name in names
    }


def cudnn(**options) -> Callable:
    """`jax.nn.dot_product_attention` by cuDNN."""
    return functools.partial(
        jax.nn.dot_product_attention, implementation="cudnn", **options
    )
