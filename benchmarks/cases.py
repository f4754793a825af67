"""What is timed: each mechanism, at which sizes, beside which peers.

Every candidate of a case computes the same function of the same arrays. A case also
comes in a small size, at which the candidates are checked against float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

import attnx
from attnx import masks
from benchmarks import peers

WINDOW = 512
KERNEL = 13


class Case(NamedTuple):
    """Candidates by name and the arrays that they are given.

    The yardsticks are timed beside them, but compute something else. What is given is
    made by `prepare` of random numbers of the shapes, outside of what is timed.
    """

    op: str
    name: str
    shapes: tuple[tuple[int, ...], ...]
    candidates: Mapping[str, Callable]
    small: Callable[[], Case] | None
    dtype: str = "float32"
    modes: tuple[str, ...] = ("forward", "forward+backward")
    yardsticks: Mapping[str, Callable] = {}
    prepare: Callable[[list[jax.Array]], list[jax.Array]] = list

    def arrays(self) -> list[jax.Array]:
        keys = jax.random.split(jax.random.key(0), len(self.shapes))
        arrays = [
            jax.random.normal(key, shape, self.dtype)
            for key, shape in zip(keys, self.shapes, strict=True)
        ]
        # Log decays, one a head or one a token and head.
        arrays = [-jnp.abs(x) / 8 if x.ndim in (1, 3) else x for x in arrays]
        return self.prepare(arrays)


def cases() -> Iterator[Case]:
    """Every case, the shortest first within its mechanism."""
    for length in (1024, 4096, 16384):
        yield causal(length)
    for length in (1024, 4096, 16384, 65536):
        yield window(length)
    yield neighborhood(96)
    for length in (1024, 2048, 4096, 8192, 16384, 32768, 65536):
        yield linear(length)


def causal(length: int, heads: int = 4, size: int = 64) -> Case:
    """Causal softmax attention."""
    return Case(
        "dot_product_attention",
        f"causal T{length} N{heads} H{size}",
        ((1, length, heads, size),) * 3,
        {
            "reference": _attnx(is_causal=True, implementation="reference"),
            "xla": _attnx(is_causal=True, implementation="xla"),
            "jax.nn": peers.causal_softmax,
            "jax.nn by head": peers.by_head(peers.causal_softmax),
        },
        functools.partial(causal, 300),
    )


def window(length: int, heads: int = 4, size: int = 64, left: int = WINDOW) -> Case:
    """Causal softmax attention to the last `left` keys."""
    reach = {"local_window_size": (left - 1, 0)}

    def mask():
        return masks.Window(left - 1, 0).to_dense(length, length)[0, 0]

    return Case(
        "dot_product_attention",
        f"window {left} T{length} N{heads} H{size}",
        ((1, length, heads, size),) * 3,
        {
            "reference": _attnx(**reach, implementation="reference"),
            "xla": _attnx(**reach, implementation="xla"),
            "jax.nn": peers.dense_softmax(mask),
            "jax.nn by head": peers.by_head(peers.dense_softmax(mask)),
        },
        functools.partial(window, 300, left=70),
    )


def neighborhood(
    side: int, heads: int = 4, size: int = 64, kernel: int = KERNEL
) -> Case:
    """Neighborhood attention over a square."""

    def mask():
        return masks.Neighborhood((side, side), kernel).to_dense(side**2, side**2)[0, 0]

    def ours(implementation):
        return functools.partial(
            attnx.neighborhood_attention,
            kernel_size=kernel,
            implementation=implementation,
        )

    return Case(
        "neighborhood_attention",
        f"{side}x{side} kernel {kernel}x{kernel} N{heads} H{size}",
        ((1, side, side, heads, size),) * 3,
        {
            "reference": ours("reference"),
            "xla": ours("xla"),
            "jax.nn": peers.dense_neighborhood(mask),
        },
        functools.partial(neighborhood, 19, kernel=5),
    )


def linear(length: int, heads: int = 4, size: int = 64) -> Case:
    """Linear attention with one decay a head."""

    def ours(implementation):
        return lambda query, key, value, log_decay: attnx.linear_attention(
            query, key, value, log_decay=log_decay, implementation=implementation
        )

    return Case(
        "linear_attention",
        f"per-head decay T{length} N{heads} H{size}",
        (*((1, length, heads, size),) * 3, (heads,)),
        {
            "reference": ours("reference"),
            "xla": ours("xla"),
            "associative_scan": peers.associative_scan,
            "chunked_einsum": peers.chunked_einsum,
        },
        functools.partial(linear, 384),
    )


def _attnx(**options) -> Callable:
    return functools.partial(attnx.dot_product_attention, **options)
