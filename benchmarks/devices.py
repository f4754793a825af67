"""Times sequences that are cut over the GPUs of a machine: `-m benchmarks.devices`.

Beside each, one GPU with the whole, and one with a device's share of the tokens. What
is cut is first compared with the whole.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import re
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import attnx
from attnx import parallel
from benchmarks.gpu import host_milliseconds
from benchmarks.measure import ERRORS, MODES, provenance, save

RUNS = 10


class Cut(NamedTuple):
    """A function of arrays that are cut, and what it is on one device.

    Attributes:
      name: of the row.
      shapes: of the arrays, whose axis 1 is cut.
      cut: the function on all devices.
      whole: the same on one.
      ordered: whether `cut` takes tokens in zig-zag order.
      modes: that are timed.
      whole_arrays: leading arrays that every device has whole.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    cut: Callable
    whole: Callable
    ordered: bool = False
    modes: tuple[str, ...] = ("forward", "forward+backward")
    whole_arrays: int = 0


def cases(length: int, heads: int, size: int) -> Iterator[Cut]:
    """Every way to cut a sequence of so many tokens."""
    tokens = ((1, length, heads, size),) * 3
    causal = {"is_causal": True}
    dense = functools.partial(attnx.dot_product_attention, **causal)
    ring = functools.partial(parallel.ring_attention, order="zigzag", **causal)
    ulysses = functools.partial(parallel.ulysses_attention, **causal)
    yield Cut("ring, zigzag", tokens, ring, dense, ordered=True)
    yield Cut("all-to-all", tokens, ulysses, dense)
    decay: dict[str, Any] = {"log_decay": attnx.decay.retnet(heads)}
    for name, options in (("states", decay), ("states, no decay", {})):
        linear = parallel.linear_attention, attnx.linear_attention
        yield Cut(name, tokens, *(functools.partial(fn, **options) for fn in linear))
    near = parallel.neighborhood_attention, attnx.neighborhood_attention
    window = (functools.partial(fn, kernel_size=1025) for fn in near)
    yield Cut("halo", tokens, *window)
    caches = ((8, length, heads // 4, size),) * 2
    full = lambda capacity: jnp.full(8, capacity, jnp.int32)
    one = lambda query, key, value: attnx.decode_attention(
        query, key, value, full(key.shape[1])
    )
    cut = lambda *arrays, axis_name: parallel.decode_attention(
        *arrays, full(length), axis_name
    )
    yield Cut(
        "decoding",
        ((8, 1, heads, size), *caches),
        cut,
        one,
        modes=("forward",),
        whole_arrays=1,
    )


def measure(case: Cut, mesh: jax.sharding.Mesh) -> Iterator[dict]:
    """Rows of one case; raises where the cut differs from the whole."""
    devices = mesh.size
    keys = jax.random.split(jax.random.key(0), len(case.shapes))
    whole = [
        jax.random.normal(key, shape, jnp.bfloat16)
        for key, shape in zip(keys, case.shapes, strict=True)
    ]
    share = [
        x if i < case.whole_arrays else x[:, : x.shape[1] // devices]
        for i, x in enumerate(whole)
    ]
    order = functools.partial(parallel.to_zigzag, devices=devices)
    back = functools.partial(parallel.from_zigzag, devices=devices)
    along, everywhere = (NamedSharding(mesh, P(None, *x)) for x in (["context"], []))
    spread = [
        jax.device_put(
            order(x) if case.ordered else x,
            everywhere if i < case.whole_arrays else along,
        )
        for i, x in enumerate(whole)
    ]
    for mode in case.modes:
        one = jax.jit(MODES[mode](case.whole))
        cut = jax.jit(MODES[mode](_mapped(case.cut, mesh, case.whole_arrays)))
        wanted, got = one(*whole), cut(*spread)
        if case.ordered:
            got = jax.tree.map(back, got)
        for i, (x, y) in enumerate(
            zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True)
        ):
            x, y = (np.asarray(x, np.float32) for x in (x, y))
            error = float(np.linalg.norm(x - y) / np.linalg.norm(y))
            if not error <= ERRORS["bfloat16"][min(i, 1)]:
                raise ValueError(f"{case.name}, {mode}, result {i}: error {error:.1e}")
        del wanted, got
        label = "x".join(map(str, case.shapes[-1]))
        runs = (("one", one, whole), ("share", one, share), ("cut", cut, spread))
        for name, fn, arrays in runs:
            jax.block_until_ready(fn(*arrays))
            times = host_milliseconds(fn, arrays, RUNS)
            yield {
                "op": "devices",
                "case": f"{case.name} over {devices}, {label}",
                "candidate": name,
                "mode": mode,
                "milliseconds": statistics.median(times),
                "fastest": min(times),
                "runs": len(times),
                "timer": "host",
            }


def _mapped(fn: Callable, mesh: jax.sharding.Mesh, whole_arrays: int) -> Callable:
    """`fn` on all devices, of arrays as `measure` lays them out."""

    def run(*arrays):
        specs = [P() if i < whole_arrays else P(None, "context") for i in range(3)]
        out = P() if whole_arrays else specs[-1]
        local = functools.partial(fn, axis_name="context")
        return jax.shard_map(
            local, mesh=mesh, in_specs=tuple(specs), out_specs=out, check_vma=False
        )(*arrays)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=65536)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--case", default="", help="regular expression")
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--commit", default="", help="by default git is asked")
    args = parser.parse_args()
    kinds = (AxisType.Auto,)
    mesh = jax.make_mesh((jax.device_count(),), ("context",), kinds)
    rows = []
    for case in cases(args.length, args.heads, args.size):
        if not re.search(args.case, case.name):
            continue
        for row in measure(case, mesh):
            rows.append(row)
            print(
                f"{row['case']:<50}{row['mode']:<18}{row['candidate']:<7}"
                f"{row['milliseconds']:9.3f} ms",
                flush=True,
            )
            if args.output:
                save(args.output, provenance(args.commit), rows)


if __name__ == "__main__":
    main()
