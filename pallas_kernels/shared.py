"""Tiles between a warpgroup's registers and shared memory.

What Mosaic leaves out: 16-bit tiles come as matrices of 8 x 8, four an instruction, and
each of their rows may come from somewhere else. Addresses are made where they are used:
those of a tile are the same whenever a loop comes by, so that LLVM would make them
before it and keep them in registers.
"""

from __future__ import annotations

import contextlib
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu.utils import getelementptr, memref_ptr

from pallas_kernels.integers import Int, i32
from pallas_kernels.mosaic import ROW, TILE, interpreted, tiled_type

_ROWS = 64


def store(ref, x, swizzle: int | None = None):
    """`ref[...] = x`, a tile to shared memory made by `mosaic.tiled` with that swizzle.

    Without a swizzle to memory that is not tiled.
    """
    if interpreted():
        ref[...] = x
        return
    kind = plgpu.RefType() if swizzle is None else tiled_type(swizzle, x.dtype)

    @plgpu.inline_mgpu(arg_types=(kind, TILE))
    def run(_, ref, x):
        with _threads_counted_here():
            if swizzle is None:
                x.store_untiled(ref, optimized=False)
            else:
                x.store_tiled(ref, swizzle)

    run(ref, x)


def store_matrices(ref, x, swizzle: int):
    """The same by matrices: with fewer registers for addresses, but later."""
    if interpreted():
        ref[...] = x
        return

    @plgpu.inline_mgpu(arg_types=(tiled_type(swizzle, x.dtype), TILE))
    def run(_, ref, x):
        places = _rows_of_matrices([ref], x.shape[1], swizzle)
        for place, four in zip(places, x.registers.reshape(-1, 4), strict=True):
            llvm.inline_asm(
                ir.Type.parse("!llvm.void"),
                [place.value, *(llvm.bitcast(i32(), pair) for pair in four)],
                "stmatrix.sync.aligned.m8n8.x4.shared.b16 [$0], {$1, $2, $3, $4};",
                "r,r,r,r,r,~{memory}",
                has_side_effects=True,
            )

    run(ref, x)


def load(ref, swizzle: int):
    """A tile from shared memory made by `mosaic.tiled` with that swizzle."""
    if interpreted():
        return ref[...]
    result = plgpu.ShapeDtypeStruct(ref.shape, ref.dtype, layout=TILE)

    @plgpu.inline_mgpu(arg_types=(tiled_type(swizzle, ref.dtype),), return_type=result)
    def run(_, ref):
        if _is_of_matrices(ref):
            return _loaded([ref], result.shape, swizzle)
        with _threads_counted_here():
            return mgpu.FragmentedArray.load_tiled(ref, swizzle, optimized=False)

    return run(ref)


def load_alternating(even, odd, run_length_log2, swizzle: int):
    """Rows of two 16-bit tiles in turn, `2**run_length_log2` of each."""
    shape, n = even.shape, jnp.asarray(run_length_log2, jnp.int32)
    if interpreted():
        row = lax.broadcasted_iota(jnp.int32, shape, 0)
        return jnp.where((row >> n) & 1 == 1, odd[...], even[...])
    kind = tiled_type(swizzle, even.dtype)

    @plgpu.inline_mgpu(
        arg_types=(kind, kind, plgpu.Layout.WG_SPLAT),
        return_type=plgpu.ShapeDtypeStruct(shape, even.dtype, layout=TILE),
    )
    def run(_, even, odd, n):
        def is_odd(row):
            return row >> Int(n.registers[()]) & 1 > 0

        return _loaded([even, odd], shape, swizzle, is_odd)

    return run(even, odd, n)


def store_sums(ref, x):
    """Puts a float32 tile where `load_sums` finds its rows; the last is as it is.

    In memory that is not tiled, of a multiple of 32 columns. Blocks of 8 columns change
    places by rows, so that rows which threads read together lie in different banks.
    """
    if interpreted():
        ref[...] = x
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), TILE))
    def run(_, ref, x):
        row = thread_here() % 128 // 4
        # A warp has 16 rows, a thread one of the upper 8 and the one below it.
        row = row + (row & ~7)
        pairs = x.registers.reshape(-1)
        for place, pair in zip(_sums(ref, [row, row + 8]), pairs, strict=True):
            llvm.store(pair, place, alignment=8)

    run(ref, x)


def load_sums(ref, rows):
    """A tile of rows `rows[0]`, `rows[1]`, ... of what `store_sums` has put there."""
    if interpreted():
        return ref[...][rows]
    shape = rows.shape[0], ref.shape[1]

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), ROW),
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=TILE),
    )
    def run(_, ref, rows):
        first = arith.constant(i32(), 0)
        rows = [Int(llvm.extractelement(row, first)) for row in rows.registers.flat]
        pair = ir.VectorType.get((2,), ir.F32Type.get())
        places = _sums(ref, rows)
        return _tile(shape, (llvm.load(pair, x, alignment=8) for x in places))

    return run(ref, rows)


def thread_here() -> Int:
    """The number of the thread, inside `inline_mgpu`, read where it is asked for.

    So what is made of it is not kept in registers over a loop.
    """
    text = "mov.u32 $0, %tid.x;"
    return Int(llvm.inline_asm(i32(), [], text, "=r", has_side_effects=True))


def _sums(ref, rows):
    """Where this thread's pairs of 8 columns are, in each of its two rows in turn."""
    (stride, _), _ = ir.MemRefType(ref.type).get_strides_and_offset()
    start = Int(llvm.ptrtoint(i32(), memref_ptr(ref)))
    column = thread_here() % 4 * 8
    firsts = []
    for row in rows:
        first = start + row * (4 * stride)
        first = first + (column + ((row ^ -1) & 3) * 32)
        # Rows begin at multiples of 128 bytes, four blocks.
        places = (first ^ 32 * block for block in range(4))
        pointer = llvm.PointerType.get(memref_ptr(ref).type.address_space)
        firsts.append([llvm.inttoptr(pointer, place.value) for place in places])
    for i in range(ref.type.shape[1] // 8):
        for first in firsts:
            yield getelementptr(first[i % 4], [i // 4 * 32], ir.F32Type.get())


def _loaded(refs, shape, swizzle, is_second=None):
    """A 16-bit tile, each row of it from the first ref or from the second.

    `is_second` decides by the row.
    """
    kind = ir.MemRefType(refs[0].type).element_type
    pair = ir.VectorType.get((2,), kind)
    four = ir.Type.parse("!llvm.struct<(i32, i32, i32, i32)>")

    def pairs():
        for place in _rows_of_matrices(refs, shape[1], swizzle, is_second):
            found: Any = llvm.inline_asm(
                four,
                [place.value],
                "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0, $1, $2, $3}, [$4];",
                "=r,=r,=r,=r,r,~{memory}",
                has_side_effects=True,
            )
            for i in range(4):
                yield llvm.bitcast(pair, llvm.extractvalue(i32(), found, [i]))

    return _tile(shape, pairs())


def _rows_of_matrices(refs, columns, swizzle, is_second=None):
    """Where the row is that this thread gives of each 16 columns.

    Of four matrices: the upper rows, the lower ones, and both of the next 8 columns.
    """
    thread = thread_here() % 128
    lane = thread % 32
    right, lower, in_tile = lane // 16, lane // 8 % 2, lane % 8
    tile = thread // 32 * 2 + lower
    starts = []
    for ref in refs:
        (by_row, by_column, *_), _ = ir.MemRefType(ref.type).get_strides_and_offset()
        start = Int(llvm.ptrtoint(i32(), memref_ptr(ref)))
        starts.append(start + tile * (2 * by_row))
    start = starts[0]
    if is_second is not None:
        second = is_second(tile * 8 + in_tile).value
        start = Int(arith.select(second, starts[1].value, start.value))
    # As many of an address's bits 4 to 6 as a row has change by the bits 7 to 9.
    place = in_tile * swizzle + right * 16
    place = place ^ (place >> 3 & swizzle - 16)
    for column in range(0, columns, 16):
        tile, rest = divmod(2 * column, swizzle)
        yield start + (place ^ rest) + 2 * by_column * tile


def _tile(shape, pairs):
    """A tile of pairs of columns, of a thread's upper and lower row in turn."""
    assert shape[0] == _ROWS, shape
    layout = TILE.to_mgpu()
    registers = np.empty(layout.registers_shape(shape), object)
    registers.reshape(-1)[:] = list(pairs)
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def _is_of_matrices(ref):
    kind = ir.MemRefType(ref.type).element_type
    return isinstance(kind, ir.BF16Type | ir.F16Type)


@contextlib.contextmanager
def _threads_counted_here():
    names, number = vars(mgpu.utils), thread_here().value
    before = names["thread_idx"]
    names["thread_idx"] = lambda: number
    try:
        yield
    finally:
        names["thread_idx"] = before
