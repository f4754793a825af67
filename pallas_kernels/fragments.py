"""Float32 sums in memory, kept in the order in which a warpgroup holds a tile.

A thread of a warpgroup holds pairs of neighbouring columns of a tile. In memory that is
in rows, adding them takes a detour through shared memory or touches a row for every
pair. Memory in the order of the registers takes 16 bytes of each thread at once, and
without a gap between threads; one pass puts the sums into rows when all are there.
"""

from __future__ import annotations

import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, gpu, llvm, nvvm, vector
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu.utils import getelementptr, memref_ptr

from pallas_kernels import mosaic
from pallas_kernels.integers import Int, i32, when
from pallas_kernels.mosaic import TILE
from pallas_kernels.rows import scatter

ROWS = 64
_STEP = 128 * 16  # Bytes that a warpgroup's threads hold of 8 columns.
_DIRECT = 1  # Of these, how many are added from registers where the rest is sent.


def add(ref, x):
    """Adds a tile `[64, C]` to the `64 C` sums of a reference to memory."""
    if mosaic.interpreted():  # Any order will do that `load` reads again.
        ref[...] = ref[...] + x.reshape(ref.shape)
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), TILE))
    def run(_, ref, x):
        place = _place(ref)
        for i, values in enumerate(_fours(x)):
            _add(_step(place, i), values)

    run(ref, x)


def send(ref, x, staged):
    """`add` by way of shared memory, `64 C` floats that this warpgroup alone uses.

    Registers are free at once; the memory has added after `wait_smem_to_gmem`. Some are
    added directly, so that products share the memory's time with less. The interpreter
    lacks this.
    """
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # For what was there before.
    store(staged, x, skipped=_DIRECT)
    plgpu.commit_smem()

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), TILE))
    def run(_, ref, staged, x):
        with when(_thread() < 1):
            size = 4 * math.prod(ref.type.shape) - _DIRECT * _STEP
            llvm.inline_asm(
                ir.Type.parse("!llvm.void"),
                [_step(_pointer(x), _DIRECT) for x in (ref, staged)],
                "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 "
                f"[$0], [$1], {size};",
                "l,r,~{memory}",
                has_side_effects=True,
            )
            nvvm.cp_async_bulk_commit_group()
        place = _place(ref)
        for i, values in list(enumerate(_fours(x)))[:_DIRECT]:
            _add(_step(place, i), values)

    run(ref, staged, x)


def store(ref, x, skipped: int = 0):
    """Puts a tile `[64, C]` in the place of such sums.

    Of its columns the first `skipped` times 8 are left out.
    """
    if mosaic.interpreted():
        ref[...] = x.reshape(ref.shape)
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), TILE))
    def run(_, ref, x):
        place = _place(ref)
        for i, values in list(enumerate(_fours(x)))[skipped:]:
            llvm.store(_four(values), _step(place, i), alignment=16)

    run(ref, x)


def load(ref, columns: int):
    """The tile `[64, columns]` of such sums."""
    shape = (ROWS, columns)
    if mosaic.interpreted():
        return ref[...].reshape(shape)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),),
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.float32, TILE),
    )
    def run(_, ref):
        place, layout = _place(ref), TILE.to_mgpu()
        pair = ir.VectorType.get((2,), ir.F32Type.get())
        registers = np.empty(layout.registers_shape(shape), object)
        for i, pairs in enumerate(registers.reshape(-1, 2)):
            four = llvm.load(
                ir.VectorType.get((4,), ir.F32Type.get()), _step(place, i), alignment=16
            )
            for half in range(2):
                pairs[half] = vector.from_elements(
                    pair, [_element(four, 2 * half + j) for j in range(2)]
                )
        return mgpu.FragmentedArray(
            _registers=registers, _layout=layout, _is_signed=None
        )

    return run(ref)


def in_rows(
    sums: jax.Array,
    scale: float,
    dtype,
    rows: jax.Array | None = None,
    last: int | None = None,
    places: jax.Array | None = None,
) -> jax.Array:
    """Puts sums into rows.

    Args:
      sums: float32 `[B, N, tiles, parts, 64 C]`, each of `parts` a tile of C columns.
      scale: factor on them.
      dtype: of the result.
      rows: where they are put, by default in a new array of the same rows.
      last: only so many of all heads, the last ones.
      places: int32 `[1, 64 tiles]`, where among the given rows each belongs, or a
        negative number, by default its own.

    Returns:
      `[B, length, N, parts C]`.
    """
    batch, heads, tiles, parts, size = sums.shape
    columns = size // ROWS
    if rows is None:
        rows = lax.empty((batch, tiles * ROWS, heads, parts * columns), dtype)

    def body(sums_g, *refs):
        *places_g, out_g, out_s = refs
        # What was added last is in the cache still.
        at = batch * heads - 1 - lax.axis_index("bh")
        b, head = lax.div(at, jnp.int32(heads)), lax.rem(at, jnp.int32(heads))
        i, part = (lax.axis_index(axis) for axis in ("q", "part"))
        x = load(sums_g.at[b, head, i, part], columns)
        out_s[...] = (x * scale).astype(dtype)
        here = pl.ds(i * ROWS, ROWS)
        width = pl.ds(part * columns, columns)
        if places is not None:
            to = places_g[0].at[0, here], out_g.at[b, :, head, width]
            scatter(out_s, *to, mosaic.swizzle_of(columns, dtype))
            return
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_s, out_g.at[b, here, head, width])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    (rows,) = mosaic.call_in_place(
        body,
        (sums,) if places is None else (sums, places),
        (rows,),
        scratch=[mosaic.tiled((ROWS, columns), dtype)],
        grid=(last or batch * heads, tiles, parts),
        grid_names=("bh", "q", "part"),
        kernel_name="in_rows",
    )
    return rows


def _place(ref):
    """Where this thread's first 16 bytes are."""
    four = ir.VectorType.get((4,), ir.F32Type.get())
    return _thread().element_of(_pointer(ref), four)


def _pointer(ref):
    place = memref_ptr(ref)
    if place.type.address_space:  # That of shared memory.
        return place
    return llvm.addrspacecast(llvm.PointerType.get(address_space=1), place)


def _thread():
    return Int(arith.index_cast(i32(), gpu.thread_id(gpu.Dimension.x))) % 128


def _add(place, values):
    # The last operand is not used. Without a later use of the zero that accumulators
    # begin as, LLVM makes it one register with the last of these, and ptxas then keeps
    # all 32 of a product from the step's start.
    llvm.inline_asm(
        ir.Type.parse("!llvm.void"),
        [place, *values, _constant(0)],
        "red.relaxed.gpu.global.add.v4.f32 [$0], {$1, $2, $3, $4};",
        "l,f,f,f,f,r",
        has_side_effects=True,
    )


def _step(place, i):
    """Where its bytes of the i-th 8 columns are."""
    return getelementptr(place, [_STEP * i], ir.IntegerType.get_signless(8))


def _fours(x):
    """The numbers that a thread holds, four at a time."""
    for pairs in x.registers.reshape(-1, 2):
        yield [_element(pair, i) for pair in pairs for i in range(2)]


def _four(values):
    return vector.from_elements(ir.VectorType.get((4,), ir.F32Type.get()), values)


def _element(values, i):
    return llvm.extractelement(values, _constant(i))


def _constant(value):
    return arith.constant(i32(), value)
