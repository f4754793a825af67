"""Compiles the GPU kernels for an H100 on any machine: `python -m benchmarks.compile`.

Needs the CUDA compiler's wheels (the extra `kernels`), no GPU and no driver. Two things
that ptxas reports spoil a kernel and fail here: registers spilled to memory, and wgmma
products that were made to wait for each other (its advisories C75xx).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

# jax reads the first when it is imported and the second when it starts its backends;
# the third makes Mosaic print what ptxas says.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, NamedSharding, PartitionSpec

import attnx
from attnx import masks, parallel, select

H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 10 patch: 0 }
runtime_version { major: 13 minor: 0 patch: 0 }
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
"""
SIZES = (64, 128, 256)


class Kernel(NamedTuple):
    """What ptxas says of one kernel: `spills` in bytes stored, `warnings` all told."""

    name: str
    registers: int
    spills: int
    warnings: tuple[str, ...]


def compile_for_h100(fn: Callable, *structs) -> list[Kernel]:
    """Compiles a function for an H100 and says what its Mosaic kernels came to.

    In no fixed order. A kernel that the process has compiled before is not compiled,
    nor listed, again.

    Args:
      fn: a function of arrays.
      *structs: its arguments, pytrees of `jax.ShapeDtypeStruct` or arrays.
    """
    with _stdout() as log:
        _compiled(fn, *structs)
        caught = log()
    return list(_parse(caught))


def plan_for_h100(fn: Callable, *structs) -> tuple[int, int, int]:
    """Bytes of arguments, temporaries and results in the compiler's plan for an H100.

    Args:
      fn: a function of arrays.
      *structs: its arguments, as of `compile_for_h100`.
    """
    with _stdout():
        plan = _compiled(fn, *structs).memory_analysis()
    return (
        plan.argument_size_in_bytes,
        plan.temp_size_in_bytes,
        plan.output_size_in_bytes,
    )


def _compiled(fn, *structs):
    structs = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_one_h100()), structs
    )
    # What kernels see that ask for the device while they are traced.
    device = AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        lowered = jax.jit(fn).lower(*structs)
    return lowered.compile()


def cases() -> Iterator[tuple[str, Callable, tuple]]:
    """Every variant of the kernels: name, function and arguments."""
    for size in SIZES:
        tokens, grouped = _bfloat16(2, 4096, 8, size), _bfloat16(2, 4096, 2, size)
        space, volume = _bfloat16(2, 64, 64, 8, size), _bfloat16(2, 16, 32, 32, 8, size)
        dense = functools.partial(attnx.dot_product_attention, implementation="pallas")
        nearest = functools.partial(
            attnx.neighborhood_attention, implementation="pallas"
        )
        ids = jax.ShapeDtypeStruct((2, 4096), jnp.int32)
        chosen = jax.ShapeDtypeStruct((2, 8, 32, 32), jnp.bool)
        for name, fn, structs in (
            ("dense", dense, (tokens, tokens, tokens)),
            ("grouped", dense, (tokens, grouped, grouped)),
            ("causal", functools.partial(dense, is_causal=True), (tokens,) * 3),
            (
                "window",
                functools.partial(dense, local_window_size=(1023, 0)),
                (tokens,) * 3,
            ),
            ("segments", _segments, (tokens, tokens, tokens, ids)),
            ("blocks", _blocks, (tokens, tokens, tokens, chosen)),
            ("2-D", functools.partial(nearest, kernel_size=13), (space,) * 3),
            (
                "2-D stride",
                functools.partial(nearest, kernel_size=16, stride=8),
                (space,) * 3,
            ),
            ("3-D", functools.partial(nearest, kernel_size=(7, 9, 9)), (volume,) * 3),
        ):
            yield f"{name} H{size}", fn, structs
            yield f"{name} H{size} backward", _backward(fn), structs
        pieces = _bfloat16(3, 1, 4096, 8, size)
        keys = _bfloat16(3, 1, 4096, 2, size)
        for name, fn in (("", _ring), (" backward", _backward(_ring))):
            fn = jax.vmap(fn, axis_name="pieces")
            yield f"ring H{size}{name}", fn, (pieces, keys, keys)
        boxes = functools.partial(
            select.vmoba_attention,
            block_size=(8, 16, 8),
            top_k=3,
            implementation="pallas",
        )
        yield f"vmoba H{size}", boxes, (volume,) * 3
        yield f"vmoba H{size} backward", _backward(boxes), (volume,) * 3
        linear = functools.partial(attnx.linear_attention, implementation="pallas")
        yield f"linear H{size}", linear, (tokens,) * 3
        yield f"linear H{size} backward", _backward(linear), (tokens,) * 3
        if size <= 128:
            decays = jax.ShapeDtypeStruct((2, 4096, 8), jnp.float32)
            yield f"linear decay H{size} backward", _of_decay, (*(tokens,) * 3, decays)
        if size <= 128:
            kernel = functools.partial(linear, normalize=True)
            yield f"linear normalized H{size}", kernel, (tokens,) * 3
            yield (
                f"linear normalized H{size} backward",
                _backward(kernel),
                (tokens,) * 3,
            )
        if size <= 128:
            blocks = functools.partial(
                select.moba_attention, block_size=128, top_k=8, implementation="pallas"
            )
            yield f"moba H{size}", blocks, (tokens,) * 3
            decays = jax.ShapeDtypeStruct(tokens.shape, jnp.float32)
            structs = (*(tokens,) * 3, decays)
            yield f"linear by channel H{size}", _by_channel, structs
            yield f"linear by channel H{size} backward", _of_channels, structs
            small = _bfloat16(2, 4096, 8, 16)
            taylor = functools.partial(attnx.taylor_attention, implementation="pallas")
            yield f"taylor V{size}", taylor, (small, small, tokens)
            yield f"taylor V{size} backward", _backward(taylor), (small, small, tokens)
        lengths = jax.ShapeDtypeStruct((2,), jnp.int32)
        decode = functools.partial(attnx.decode_attention, implementation="pallas")
        structs = (_bfloat16(2, 1, 8, size), grouped, grouped, lengths)
        yield f"decode H{size}", decode, structs


def main() -> int:
    """Compiles all cases, or those named, and gives the exit status."""
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(
        "python -m benchmarks.compile", description=__doc__
    )
    parser.add_argument("case", nargs="*", help="only cases whose name holds such text")
    wanted = parser.parse_args().case
    table = Table("case", "kernel", title="Compiled for an H100", title_justify="left")
    for column in ("registers", "spill bytes", "seconds"):
        table.add_column(column, justify="right")
    table.add_column("wrong")
    failed = 0
    for name, fn, structs in cases():
        if wanted and not any(text in name for text in wanted):
            continue
        print(name, file=sys.stderr)
        start = time.perf_counter()
        try:
            kernels = compile_for_h100(fn, *structs)
        except Exception as error:  # Whatever it is, the other cases are still tried.
            failed += 1
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            table.add_row(name, "-", "", "", "", reason)
            continue
        seconds = f"{time.perf_counter() - start:.1f}"
        if not kernels:
            table.add_row(name, "(compiled above)", "", "", seconds, "")
        for kernel in kernels:
            wrong = [*kernel.warnings, *["spills"] * bool(kernel.spills)]
            failed += bool(wrong)
            numbers = (str(kernel.registers), str(kernel.spills))
            table.add_row(name, kernel.name, *numbers, seconds, "\n".join(wrong))
            name = seconds = ""
    Console(width=160).print(table)
    return int(failed > 0)


def _bfloat16(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def _backward(fn: Callable) -> Callable:
    def run(*arrays):
        def of(*floats):
            return fn(*floats, *arrays[3:])

        out, pull = jax.vjp(of, *arrays[:3])
        return pull(out)

    return run


def _ring(query, key, value):
    return parallel.ring_attention(
        query, key, value, "pieces", is_causal=True, implementation="pallas"
    )


def _of_decay(query, key, value, log_decay):
    def attention(log_decay):
        return attnx.linear_attention(
            query, key, value, log_decay=log_decay, implementation="pallas"
        )

    out, pull = jax.vjp(attention, log_decay)
    return pull(out)


def _by_channel(query, key, value, log_decay):
    return attnx.linear_attention(
        query, key, value, log_decay=log_decay, implementation="pallas"
    )


def _of_channels(*arrays):
    out, pull = jax.vjp(_by_channel, *arrays)
    return pull(out)


def _segments(query, key, value, ids):
    return attnx.dot_product_attention(
        query, key, value, mask=masks.Segments(ids), implementation="pallas"
    )


def _blocks(query, key, value, chosen):
    lists = attnx.BlockMask.from_tiles(chosen, query.shape[1], key.shape[1])
    return attnx.block_sparse_attention(
        query, key, value, lists, implementation="pallas"
    )


@functools.cache
def _one_h100() -> NamedSharding:
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=H100, topology="1x1x1"
    )
    mesh = topologies.make_mesh(topology, (1,), ("x",))
    return NamedSharding(mesh, PartitionSpec())


@contextlib.contextmanager
def _stdout() -> Iterator[Callable[[], str]]:
    """Catches what C++ writes to stdout; it is shown if the block raises."""
    sys.stdout.flush()
    before = os.dup(1)
    with tempfile.TemporaryFile() as file:

        def text() -> str:
            ctypes.CDLL(None).fflush(None)
            file.seek(0)
            return file.read().decode(errors="replace")

        os.dup2(file.fileno(), 1)
        try:
            yield text
        except BaseException:
            print(text(), file=sys.stderr)
            raise
        finally:
            os.dup2(before, 1)
            os.close(before)


def _parse(log: str) -> Iterator[Kernel]:
    """Reads ptxas's reports, each of which ends with the time it took."""
    *reports, _ = re.split(r"Compile time = .*", log)
    for report in reports:
        name = re.search(r"Compiling entry function '(\w+)'", report)
        registers = re.search(r"Used (\d+) registers", report)
        spills = re.search(r"(\d+) bytes spill stores", report)
        if not (name and registers and spills):
            raise ValueError(f"not a report of ptxas: {report}")
        warnings = re.findall(r"ptxas .*(?:: \(C75|warning : (?!Reg)).*", report)
        yield Kernel(
            name[1].removesuffix("_mosaic_gpu_kernel"),
            int(registers[1]),
            int(spills[1]),
            tuple(warnings),
        )


if __name__ == "__main__":
    sys.exit(main())
