"""Rows from and to anywhere in memory, of the tiles that products take.

The copy engine of Hopper takes boxes of neighbouring rows. Others are copied by the
threads, 16 bytes each; those that are gathered past the registers, without waiting.
"""

from __future__ import annotations

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import llvm
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu.utils import memref_ptr

from pallas_kernels import mosaic, shared
from pallas_kernels.integers import Int, at_most, i32, when

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
    swizzle = mosaic.swizzle_of(columns, source.dtype)
    pieces = columns * jnp.dtype(source.dtype).itemsize // _PIECE

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.RefType(), mosaic.ref_type(target))
    )
    def run(_, source, rows, target):
        start, tiles = memref_ptr(source), memref_ptr(target)
        for row, piece in _pieces(count, pieces):
            index = llvm.load(i32(), row.element_of(memref_ptr(rows), i32()))
            index = at_most(Int(index), length - 1)
            copied = _piece(source, start, index, piece)
            to = _in_tiles(row, piece, pieces, swizzle).element_of(tiles, _piece_type())
            llvm.inline_asm(
                ir.Type.parse("!llvm.void"),
                [llvm.ptrtoint(i32(), to), copied],
                f"cp.async.cg.shared.global [$0], [$1], {_PIECE};",
                "r,l",
                has_side_effects=True,
            )

    run(source, rows, target)


def scatter(source, places, target, swizzle: int):
    """`target[places[i]] = source[i]`; all threads of a warpgroup take part.

    Args:
      source: shared memory `[R, H]` made by `mosaic.tiled` with that swizzle, in which
        this warpgroup has stored.
      places: memory, int32 `[R]`; a row with a negative number is put nowhere.
      target: memory `[T, H]`.
      swizzle: of the source.
    """
    count, columns = source.shape
    if mosaic.interpreted():

        @pl.loop(0, count)
        def _(i):
            place = places[i]

            @pl.when(place >= 0)
            def _():
                target[place] = source[i]

        return
    pieces = columns * jnp.dtype(source.dtype).itemsize // _PIECE

    @plgpu.inline_mgpu(
        arg_types=(
            mosaic.tiled_type(swizzle, source.dtype),
            plgpu.RefType(),
            plgpu.RefType(),
        )
    )
    def run(_, source, places, target):
        mgpu.utils.warpgroup_barrier()
        tiles, start, kind = memref_ptr(source), memref_ptr(target), _piece_type()
        for row, piece in _pieces(count, pieces):
            x = _in_tiles(row, piece, pieces, swizzle).element_of(tiles, kind)
            x = llvm.load(kind, x, alignment=_PIECE)
            for place in placed(row, memref_ptr(places)):
                to = _piece(target, start, place, piece)
                llvm.store(x, to, alignment=_PIECE)

    run(source, places, target)


def placed(row: Int, places=None):
    """Inside, where a row belongs; what this one's body does is done if it does.

    `places` is a pointer to int32 numbers, and by default they are the rows' own.
    """
    if places is None:
        yield row
        return
    place = Int(llvm.load(i32(), row.element_of(places, i32())))
    with when(place > -1):
        yield place


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


def _pieces(count, pieces):
    """The row and the number in it of each piece that this thread copies."""
    thread = shared.thread_here() % _THREADS
    for first in range(0, count * pieces, _THREADS):
        number = thread + first
        yield number // pieces, number % pieces


def _piece(ref, start, row, piece):
    """Where a piece of a row of memory is."""
    kind = ir.MemRefType(ref.type)
    [stride, _], _ = kind.get_strides_and_offset()
    offset = row.wide() * (stride * mgpu.bytewidth(kind.element_type))
    offset = offset + piece.wide() * _PIECE
    return offset.element_of(start, ir.IntegerType.get_signless(8))


def _in_tiles(row, piece, pieces, swizzle):
    """The number of a piece in shared memory made by `mosaic.tiled`."""
    wide = swizzle // _PIECE  # Pieces of a row of one swizzled tile of 8 rows.
    # Tiles of 8 rows, one swizzle wide, side by side and then down.
    tile = row // 8 * (pieces // wide) + piece // wide
    inside = row % 8 * wide + piece % wide
    # Of every 128 bytes the pieces are exchanged as their number says.
    inside = inside ^ (inside // 8 % wide)
    return tile * (8 * wide) + inside


def _piece_type():
    return ir.VectorType.get((_PIECE // 4,), i32())
