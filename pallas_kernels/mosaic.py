"""Mosaic GPU as both jax versions spell it, and the pieces their interpreters lack.

The kernels are written once. Under `interpret()` the barriers, copies and loops stay
the real ones; matrix products and register layouts, which the interpreters do not
model, become plain arrays.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import llvm, nvvm
from jax._src.pallas.mosaic_gpu.interpret.params import (  # Public since 0.11.
    InterpretGPUParams,
    force_gpu_interpret_mode,
)

TILE = plgpu.Layout.WGMMA
# Vectors along the rows of a tile, and along its columns.
ROW = TILE.reduce(1)
COL = TILE.reduce(0)
LAYOUTS = (ROW, COL)
SMEM_BYTES = 232_448
LOG2E = math.log2(math.e)

_SINCE_0_11 = jax.__version_info__ >= (0, 11)
_interpreted: contextvars.ContextVar[bool] = contextvars.ContextVar(
    "interpreted", default=False
)


@contextlib.contextmanager
def interpret(**options):
    """Runs kernels on the CPU; options are those of `InterpretGPUParams`."""
    token = _interpreted.set(True)
    try:
        with force_gpu_interpret_mode(InterpretGPUParams(**options)):
            yield
    finally:
        _interpreted.reset(token)


def interpreted() -> bool:
    """Whether kernels traced now are for the interpreter."""
    return _interpreted.get()


def wrong_device() -> str | None:
    """Why kernels cannot run on the GPU that is here, or None."""
    if jax.default_backend() == "gpu":
        found = getattr(jax.devices()[0], "compute_capability", "9.0")
        if str(found) != "9.0":
            return f"the kernel is for compute capability 9.0, not {found}"
    return None


def compiler_params() -> plgpu.CompilerParams:
    """What every kernel is compiled with."""
    return plgpu.CompilerParams(
        approx_math=True,
        unsafe_no_auto_barriers=True,
        reduction_scratch_bytes=0,
        lowering_semantics=plgpu.LoweringSemantics.Lane,
    )


def call(body, inputs, outputs, *, scratch, **mesh):
    """`plgpu.kernel` of `body(*inputs, *outputs, *scratch)`."""
    with _counted_in_32_bits():
        return plgpu.kernel(
            body,
            out_type=outputs,
            scratch_types=scratch,
            compiler_params=compiler_params(),
            **mesh,
        )(*inputs)


def call_in_place(body, inputs, outputs, *, scratch, **mesh):
    """The same, but the outputs begin as the given arrays and are added to."""
    params = compiler_params()

    def run(refs):
        if _SINCE_0_11:  # Kernels take references.
            plgpu.kernel(
                body,
                out_type=(),
                scratch_types=scratch,
                compiler_params=params,
                **mesh,
            )(*refs)
        else:
            name = mesh.pop("kernel_name")

            @pl.core_map(plgpu.Mesh(**mesh), compiler_params=params, name=name)
            def _():
                pl.run_scoped(
                    lambda *local: body(*refs, *local),
                    *scratch,
                    collective_axes=mesh.get("thread_name", ()),
                )

    with _counted_in_32_bits():
        return pl.run_state(run)((*inputs, *outputs))[len(inputs) :]


def _counted_in_32_bits():
    """Inside, loops and grids count in int32, also where the caller enabled x64."""
    return jax.enable_x64(False)


def tiled(shape, dtype, swizzle: int | None = None):
    """Shared memory in the tiling that matrix products and box copies use."""
    swizzle = swizzle or swizzle_of(shape[-1], dtype)
    columns = swizzle // jnp.dtype(dtype).itemsize
    transforms = (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def swizzle_of(columns: int, dtype) -> int:
    """The widest swizzle that rows of so many columns have room for."""
    for swizzle in (128, 64, 32):
        if columns * jnp.dtype(dtype).itemsize % swizzle == 0:
            return swizzle
    raise ValueError(f"columns: expected a multiple of 32 bytes, got {columns}")


def load(ref, layout):
    """Registers in a layout, from memory of any kind."""
    if interpreted() and not _SINCE_0_11:
        return ref[...]
    source: list = [ref] if _SINCE_0_11 else [ref, None]
    return plgpu.load(*source, layout=layout, optimized=False)


def load_transposed(ref):
    """A tile in registers, from shared memory with its rows as columns."""
    if interpreted():
        return ref[...].T
    columns = ref.transpose((1, 0))
    x = load(columns, plgpu.Layout.WGMMA_TRANSPOSED)
    return plgpu.layout_cast(x, TILE)


def full(shape, value, layout, dtype=jnp.float32):
    """A constant in a layout."""
    x = jnp.full(shape, value, dtype)
    return x if interpreted() else plgpu.layout_cast(x, layout)


def rounded(x, dtype):
    """In a smaller dtype, also where XLA would drop a conversion there and back."""
    if interpreted():
        info = jnp.finfo(dtype)
        x = lax.reduce_precision(x, info.nexp, info.nmant)
    return x.astype(dtype)


def iota(size: int, axis: int):
    """0, 1, 2, ... along an axis of a tile."""
    if interpreted():
        return lax.iota(jnp.int32, size)
    return plgpu.broadcasted_iota(jnp.int32, (size,), 0, layout=LAYOUTS[axis])


def along(x, axis: int, shape):
    """A vector along one axis of a tile, repeated along the other."""
    return lax.broadcast_in_dim(x, shape, (axis,))


def transposed(ref):
    """Shared memory with its rows as columns, for products."""
    return _Transposed(ref) if interpreted() else ref.transpose((1, 0))


def by_one_warp(body):
    """Runs `body` in a single warp: enough to issue copies, and fewer arrivals."""
    if interpreted():
        body()
        return

    @plgpu.warp_map
    def _(warp):
        pl.when(warp == 0)(body)


def named_barrier(operation: str, number, threads: int):
    """`bar.sync` or `bar.arrive`: for the turns of warpgroups, which carry no data."""
    if interpreted():
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT,))
    def barrier(_, number):
        llvm.inline_asm(
            ir.Type.parse("!llvm.void"),
            [number.registers[()]],
            f"bar.{operation} $0, {threads};",
            "r",
            has_side_effects=True,
        )

    barrier(jnp.asarray(number, jnp.int32))


def again(x):
    """A number anew, so that addresses made of it are not kept in registers."""
    return lax.optimization_barrier(x)


def emulated(scratch):
    """Scratch for the interpreter alone, in place of what only the hardware has."""
    return scratch if interpreted() else None


def meet(number: int, barrier):
    """Waits for the other warpgroup, which then sees what this one stored.

    In shared memory, its products included; `barrier` is `emulated`.
    """
    if interpreted():
        plgpu.commit_smem()
        plgpu.barrier_arrive(barrier)
        plgpu.barrier_wait(barrier)
        return

    @plgpu.inline_mgpu()
    def fence(_):
        nvvm.fence_proxy(nvvm.ProxyKind.async_shared, space=nvvm.SharedSpace.shared_cta)

    fence()
    named_barrier("sync", number, 256)


def plain(x):
    """The float32 values behind a reference or an array, for the interpreter."""
    if isinstance(x, _Transposed):
        return plain(x.ref).T
    return (x if isinstance(x, jax.Array) else x[...]).astype(jnp.float32)


class _Transposed(NamedTuple):
    """What the interpreter of jax 0.10 cannot read: a transposed reference."""

    ref: Any


def ref_type(ref):
    """How `inline_mgpu` is to hand over shared memory made by `tiled`."""
    base = ref
    while hasattr(base, "ref"):
        base = base.ref
    return tiled_type(swizzle_of(base.shape[-1], base.dtype), base.dtype)


def tiled_type(swizzle, dtype):
    """The same of memory made with that swizzle."""
    columns = swizzle // jnp.dtype(dtype).itemsize
    return plgpu.RefType(
        (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(swizzle))
    )
