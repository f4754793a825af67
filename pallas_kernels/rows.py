"""Rows gathered from memory into the tiles that products take.

The copy engine of Hopper takes boxes of neighbouring rows. Rows from anywhere are
copied by the threads, 16 bytes each, past the registers and without waiting.
"""

from __future__ import annotations

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm, memref
from jax.experimental.mosaic.gpu.utils import getelementptr, memref_ptr

from pallas_kernels import mosaic, shared

_THREADS = 128  # Of a warpgroup.
_PIECE = 16  # Bytes that a thread copies at once.


def gather(source, rows, target):
    """Begins `target[i] = source[rows[i]]`; all threads of a warpgroup take part.

    Args:
      source: memory `[T, H]`.
      rows: shared int32 `[R]`; too large a number gives the last row.
      target: shared memory `[R, H]` made by `mosaic.tiled`.
    """
    if mosaic.interpreted():
        target[...] = jnp.take(source[...], rows[...], axis=0, mode="clip")
        return
    (length, columns), count = source.shape, rows.shape[0]
    itemsize = jnp.dtype(source.dtype).itemsize
    swizzle = mosaic.swizzle_of(columns, source.dtype)
    pieces = columns * itemsize // _PIECE
    wide = swizzle // _PIECE  # Pieces of a row of one swizzled tile of 8 rows.

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.RefType(), mosaic.ref_type(target))
    )
    def run(_, source, rows, target):
        i8, i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (8, 32, 64))
        const = lambda x, kind=i32: arith.constant(kind, ir.IntegerAttr.get(kind, x))
        thread = arith.remui(shared.thread_here(), const(_THREADS))
        [stride, _], _ = ir.MemRefType(source.type).get_strides_and_offset()
        start = memref_ptr(source)
        place = llvm.ptrtoint(i32, memref_ptr(target))
        for first in range(0, count * pieces, _THREADS):
            piece = arith.addi(thread, const(first))
            row = arith.divui(piece, const(pieces))
            piece = arith.remui(piece, const(pieces))
            index = memref.load(rows, [arith.index_cast(ir.IndexType.get(), row)])
            index = arith.minui(index, const(length - 1))
            offset = arith.muli(arith.extui(i64, index), const(stride * itemsize, i64))
            column = arith.extui(i64, arith.muli(piece, const(_PIECE)))
            copied = getelementptr(start, [arith.addi(offset, column)], i8)
            # Tiles of 8 rows, one swizzle wide, side by side and then down.
            tile = arith.addi(
                arith.muli(arith.divui(row, const(8)), const(pieces // wide)),
                arith.divui(piece, const(wide)),
            )
            inside = arith.addi(
                arith.muli(arith.remui(row, const(8)), const(wide)),
                arith.remui(piece, const(wide)),
            )
            # Of every 128 bytes the pieces are exchanged as their number says.
            turn = arith.remui(arith.divui(inside, const(8)), const(wide))
            inside = arith.xori(inside, turn)
            inside = arith.addi(arith.muli(tile, const(8 * wide)), inside)
            to = arith.addi(place, arith.muli(inside, const(_PIECE)))
            llvm.inline_asm(
                ir.Type.parse("!llvm.void"),
                [to, copied],
                f"cp.async.cg.shared.global [$0], [$1], {_PIECE};",
                "r,l",
                has_side_effects=True,
            )

    run(source, rows, target)


def wait():
    """Waits until what this warpgroup gathers is there for products."""
    if not mosaic.interpreted():

        @plgpu.inline_mgpu()
        def run(_):
            llvm.inline_asm(
                ir.Type.parse("!llvm.void"),
                [],
                "cp.async.wait_all;",
                "",
                has_side_effects=True,
            )

        run()
    plgpu.commit_smem()
