"""How a pointer network answers: beam search among the sequences that are allowed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from models.pointer.network import PointerNetwork


class Prefix(NamedTuple):
    """What a constraint knows of the symbols so far.

    Attributes:
      length: int `[...]`, how many they are.
      used: bool `[..., n + 1]`, which symbols are among them, or are padding.
    """

    length: jax.Array
    used: jax.Array


# `prefix -> allowed`, bool `[..., n + 1]`: the symbols that may follow, at least one.
Constraint = Callable[[Prefix], jax.Array]


class Hypotheses(NamedTuple):
    """The sequences of a beam, likeliest first.

    Attributes:
      symbols: int32 `[B, W, M]`, 0 from the end on.
      log_probability: `[B, W]`; -inf where there are fewer than W sequences.
    """

    symbols: jax.Array
    log_probability: jax.Array


def anything(prefix: Prefix) -> jax.Array:
    """Allows every symbol at any time."""
    return jnp.ones_like(prefix.used)


def tours(prefix: Prefix) -> jax.Array:
    """Allows each city once, the first city first, and the end after the last."""
    first = jnp.arange(prefix.used.shape[-1]) == 1
    rest = ~prefix.used
    rest = rest.at[..., 0].set(~rest[..., 1:].any(-1))
    return jnp.where(prefix.length[..., None] == 0, first, rest)


def log_likelihood(
    model: PointerNetwork,
    points: jax.Array,
    lengths: jax.Array,
    symbols: jax.Array,
    allowed: Constraint,
) -> jax.Array:
    """Measures given sequences, symbol by symbol.

    Args:
      model: the network.
      points: `[B, n, 2]`.
      lengths: int `[B]`, real points of these.
      symbols: int `[B, M]`, allowed ones, 0 from the end on.
      allowed: what may follow what; the probabilities are among that.

    Returns:
      `[B, M]`, 0 after the end.
    """
    scores = model(points, lengths, symbols)
    seen = jax.nn.one_hot(symbols, scores.shape[-1], dtype=jnp.int32).cumsum(1)
    padding = jnp.arange(scores.shape[-1]) > lengths[:, None, None]
    used = jnp.pad(seen[:, :-1] > 0, ((0, 0), (1, 0), (0, 0))) | padding
    prefix = Prefix(jnp.arange(symbols.shape[1]), used)
    picked = jnp.take_along_axis(
        _log_softmax(scores, allowed(prefix)), symbols[..., None], -1
    )[..., 0]
    return jnp.where(used[..., 0], 0, picked)


@functools.partial(jax.jit, static_argnames=("max_symbols", "width", "allowed"))
def search(
    model: PointerNetwork,
    points: jax.Array,
    lengths: jax.Array,
    max_symbols: int,
    *,
    width: int,
    allowed: Constraint,
) -> Hypotheses:
    """Finds likely sequences by beam search; greedily with a beam of width 1.

    Args:
      model: the network.
      points: `[B, n, 2]`.
      lengths: int `[B]`, real points of these.
      max_symbols: M, after which a sequence is cut.
      width: W, sequences kept at each step. If no fewer than there are sequences, the
        search is exhaustive.
      allowed: what may follow what.
    """
    memory, carry = model.encode(points, lengths)
    batch, count = memory.valid.shape
    used = jnp.broadcast_to(~memory.valid[:, None], (batch, width, count))
    start = _Beam(
        # All are alike at first: the others wait for branches of the first.
        jnp.full((batch, width), -jnp.inf).at[:, 0].set(0),
        jnp.zeros((batch, width, max_symbols), jnp.int32),
        jax.tree.map(lambda x: jnp.repeat(x[:, None], width, 1), carry),
        jnp.zeros((batch, width), jnp.int32),
        used,
    )
    only_end = jnp.arange(count) == 0

    def step(beam: _Beam, length: jax.Array) -> tuple[_Beam, None]:
        scores, carry = model.step(memory, beam.carry, beam.last)
        prefix = Prefix(jnp.broadcast_to(length, beam.last.shape), beam.used)
        ended = beam.used[..., :1]
        choice = jnp.where(ended, only_end, allowed(prefix))
        total = beam.log_probability[..., None] + _log_softmax(scores, choice)
        best, index = jax.lax.top_k(total.reshape(batch, -1), width)
        parent, symbol = jnp.divmod(index, count)
        beam = _select(beam._replace(carry=carry), parent)
        return _Beam(
            best,
            beam.symbols.at[..., length].set(symbol),
            beam.carry,
            symbol,
            beam.used | jax.nn.one_hot(symbol, count, dtype=bool),
        ), None

    beam, _ = jax.lax.scan(step, start, jnp.arange(max_symbols))
    return Hypotheses(beam.symbols, beam.log_probability)


class _Beam(NamedTuple):
    """W sequences so far; arrays `[B, W, ...]`."""

    log_probability: jax.Array
    symbols: jax.Array
    carry: Any
    last: jax.Array
    used: jax.Array


def _select(beam: _Beam, parent: jax.Array) -> _Beam:
    """The sequences `parent` `[B, W]` of a beam."""
    return jax.vmap(lambda beam, index: jax.tree.map(lambda x: x[index], beam))(
        beam, parent
    )


def _log_softmax(scores: jax.Array, allowed: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(jnp.where(allowed, scores, -jnp.inf))
