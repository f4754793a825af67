"""How far every implementation is from the float64 reference: `-m benchmarks.accuracy`.

Errors are relative root mean squares, `||got - wanted|| / ||wanted||`, of the output
and of all gradients together, for small random inputs that every dtype holds exactly.
"""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
import os
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import attnx

IMPLEMENTATIONS = ("reference", "xla", "pallas")
DTYPES = ("float32", "bfloat16")


class Row(NamedTuple):
    """One function by one implementation in one dtype, and how far off it is."""

    function: str
    implementation: str
    dtype: str
    output: float
    gradient: float


def measure() -> list[Row]:
    """Measures every attnx function by every implementation that serves it here."""
    # Almost all of the time goes into compiling, which threads do side by side.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
        return [row for rows in threads.map(_measure, CASES) for row in rows]


def table(rows: Iterable[Row]) -> Table:
    """Lays rows out for the terminal."""
    made = Table(title="Relative RMS error against the float64 reference")
    for column in Row._fields:
        made.add_column(
            column, justify="left" if column in Row._fields[:3] else "right"
        )
    for row in rows:
        made.add_row(*row[:3], *(f"{error:.1e}" for error in row[3:]))
    return made


def markdown(rows: Iterable[Row]) -> str:
    """Lays rows out for `docs/`."""
    lines = [" | ".join(Row._fields), "|".join(["---"] * 3 + ["--:"] * 2)]
    for row in rows:
        errors = (f"{error:.1e}" for error in row[3:])
        lines.append(" | ".join((f"`{row[0]}`", *row[1:3], *errors)))
    return "\n".join(f"| {line} |" for line in lines)


def _dot_product(query, key, value, bias, **options):
    return attnx.dot_product_attention(
        query, key, value, bias, is_causal=True, **options
    )


def _block_sparse(query, key, value, **options):
    rows, columns = jnp.arange(4)[:, None], jnp.arange(4)
    chosen = (columns == 0) | (columns == rows)
    lists = attnx.BlockMask.from_tiles(
        chosen, 100, 100, block_size=(32, 32), mask=attnx.masks.Causal()
    )
    return attnx.block_sparse_attention(query, key, value, lists, **options)


def _neighborhood(query, key, value, **options):
    return attnx.neighborhood_attention(
        query, key, value, kernel_size=(5, 3), dilation=(1, 2), **options
    )


def _decode(query, key, value, **options):
    lengths = jnp.array([100, 37])
    return attnx.decode_attention(query, key, value, lengths, **options)


def _linear(query, key, value, log_decay, initial_state, **options):
    return attnx.linear_attention(
        query,
        key,
        value,
        log_decay=-jnp.abs(log_decay),
        initial_state=initial_state,
        **options,
    )


_KEY_VALUE = [(2, 100, 2, 32), (2, 100, 2, 32)]
CASES: dict[str, tuple[Callable, list[tuple[int, ...]]]] = {
    "dot_product_attention": (
        _dot_product,
        [(2, 100, 4, 32), *_KEY_VALUE, (4, 100, 100)],
    ),
    "block_sparse_attention": (_block_sparse, [(2, 100, 4, 32), *_KEY_VALUE]),
    "neighborhood_attention": (_neighborhood, [(2, 11, 9, 2, 32)] * 3),
    "decode_attention": (_decode, [(2, 3, 4, 32), *_KEY_VALUE]),
    "linear_attention": (
        _linear,
        [(2, 100, 4, 32), *_KEY_VALUE, (2, 100, 4), (2, 4, 32, 32)],
    ),
}


def _measure(name: str) -> list[Row]:
    function, shapes = CASES[name]
    keys = jax.random.split(jax.random.key(0), len(shapes))
    # Numbers that every dtype holds exactly, so that all are measured against one.
    arrays = [
        np.asarray(jax.random.normal(key, shape, jnp.bfloat16), np.float64)
        for key, shape in zip(keys, shapes, strict=True)
    ]
    with jax.enable_x64(True):
        wanted = _with_gradients(function, "reference", map(jnp.asarray, arrays))
    rows = []
    # The kernels do not run elsewhere, whatever a program could be lowered for.
    on_gpu = jax.default_backend() == "gpu"
    implementations = IMPLEMENTATIONS if on_gpu else IMPLEMENTATIONS[:-1]
    for dtype, implementation in itertools.product(DTYPES, implementations):
        inputs = [jnp.asarray(x, dtype) for x in arrays]
        try:
            got = _with_gradients(function, implementation, inputs)
        except NotImplementedError:
            continue
        errors = map(_relative_rms, got, wanted)
        rows.append(Row(name, implementation, dtype, *errors))
    return rows


def _with_gradients(
    function: Callable, implementation: str, arrays: Iterable[jax.Array]
) -> tuple[np.ndarray, np.ndarray]:
    """The output, and the gradients of a fixed random combination of it, as vectors."""

    @jax.jit
    def run(*arrays):
        call = functools.partial(function, implementation=implementation)
        out, pull = jax.vjp(call, *arrays)
        weights = jax.random.normal(jax.random.key(1), out.shape, jnp.float32)
        return out, pull(weights.astype(out.dtype))

    out, gradients = run(*arrays)
    gradients = [np.asarray(x, np.float64).ravel() for x in gradients]
    return np.asarray(out, np.float64), np.concatenate(gradients)


def _relative_rms(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


if __name__ == "__main__":
    Console(width=200).print(markdown(measure()), highlight=False)
