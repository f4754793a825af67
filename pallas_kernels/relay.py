"""What warps without work do for the gradients of queries of other heads.

Blocks of threads begin in the order of their heads. While their products are computed,
sums of a later head are filled with zeros, and those of an earlier one put in rows.
None waits for a block that has yet to begin, and heads are far enough apart that there
is hardly anything to wait for.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm, vector
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu.utils import getelementptr, memref_ptr

from pallas_kernels import fragments, mosaic
from pallas_kernels.integers import Int, i32, steps, when
from pallas_kernels.rows import placed
from pallas_kernels.shared import thread_here
from pallas_kernels.turns import PROCESSORS

_REF, _SPLAT = plgpu.RefType(), plgpu.Layout.WG_SPLAT
_COPYING = 32  # Threads of the first warp.
_WORKERS = 128 - _COPYING
_BARRIER = 7  # A named one, for these.


@dataclasses.dataclass(frozen=True)
class Relay:
    """Sums `[B, N, tiles, parts, 64 C]` on their way, by `blocks` blocks a head.

    They are put in rows `[B, length, N, parts C]` as `fragments.in_rows` does it.
    `marks`, int32 `[2, B N]`, count the blocks of threads that have filled a head with
    zeros, and the warpgroups that have added to it all they had.
    """

    shape: tuple[int, ...]
    blocks: int
    scale: float
    dtype: Any
    length: int

    @property
    def ahead(self) -> int:
        """Heads from one to the one that it fills with zeros: what runs at once."""
        return max(2, -(-PROCESSORS // self.blocks))

    @property
    def behind(self) -> int:
        """Heads from one that is put in rows to the one that does so."""
        return self.ahead + 1

    @property
    def pays(self) -> bool:
        """Whether there are so many heads; the interpreter lacks what it takes."""
        return self._heads > 2 * self.behind and not mosaic.interpreted()

    def begin(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Sums, of which the first heads are zeros, room for the rows, and marks."""
        batch, heads, tiles, parts, size = self.shape
        sums = lax.empty((self._heads, tiles, parts, size), jnp.float32)
        zeros = jnp.zeros((self.ahead, *sums.shape[1:]), jnp.float32)
        sums = lax.dynamic_update_slice(sums, zeros, (0, 0, 0, 0))
        columns = parts * size // fragments.ROWS
        rows = lax.empty((batch, self.length, heads, columns), self.dtype)
        filled = jnp.where(jnp.arange(self._heads) < self.ahead, self.blocks, 0)
        marks = jnp.stack([filled, jnp.zeros_like(filled)]).astype(jnp.int32)
        return sums.reshape(self.shape), rows, marks

    def wait_for_zeros(self, marks, head):
        """To be called by a warpgroup before it adds to a head."""

        @plgpu.inline_mgpu(arg_types=(_REF,))
        def run(_, mark):
            _wait(memref_ptr(mark), self.blocks)
            _asm("fence.proxy.async.global;")  # The copy engine adds to them.

        run(marks.at[0, head])

    def added(self, marks, head):
        """To be called by a warpgroup when it has added all it has to a head."""

        @plgpu.inline_mgpu(arg_types=(_REF,))
        def run(_, mark):
            mgpu.utils.warpgroup_barrier()
            with when(thread_here() % 128 < 1):
                _count(memref_ptr(mark))

        run(marks.at[1, head])

    def serve(self, sums, rows, marks, places, head, block):
        """To be called by the warpgroup of which one warp copies: the others work.

        `places` are those of `fragments.in_rows`, int32 `[64 tiles]`, or None.
        """
        given = [sums, rows, marks] + ([] if places is None else [places])

        @plgpu.inline_mgpu(arg_types=(*[_REF] * len(given), _SPLAT, _SPLAT))
        def run(_, *given):
            *given, head, block = given
            sums, rows, marks, *rest = (memref_ptr(x) for x in given)
            head, block = (Int(x.registers[()]) for x in (head, block))
            worker = thread_here() % 128 - _COPYING
            later, earlier = head + self.ahead, head - self.behind
            with when(worker > -1):
                with when(later < self._heads):
                    self._fill(sums, later, block, worker)
                    _asm(f"bar.sync {_BARRIER}, {_WORKERS};")
                    with when(worker < 1):
                        _count(later.element_of(marks, i32()))
                with when(earlier > -1):
                    mark = (earlier + self._heads).element_of(marks, i32())
                    _wait(mark, 2 * self.blocks)
                    self._put_in_rows(sums, rows, rest, earlier, block, worker)

        run(*given, *(jnp.asarray(x, jnp.int32) for x in (head, block)))

    def end(self, sums, rows, places):
        """Rows, when those of the last heads have been put there too."""
        return fragments.in_rows(
            sums, self.scale, self.dtype, rows, self.behind, places=places
        )

    @property
    def _heads(self):
        return self.shape[0] * self.shape[1]

    def _fill(self, sums, head, block, worker):
        four = ir.VectorType.get((4,), ir.F32Type.get())
        zero = arith.constant(ir.F32Type.get(), 0.0)
        zeros = vector.from_elements(four, [zero] * 4)
        for tile in steps(block, self.shape[2], self.blocks):
            start = self._tile(sums, head, tile)
            for i in steps(worker, self._tile_size // 4, _WORKERS):
                llvm.store(zeros, i.element_of(start, four), alignment=16)

    def _put_in_rows(self, sums, rows, places, head, block, worker):
        _, heads, tiles, parts, size = self.shape
        columns = size // fragments.ROWS
        width = heads * parts * columns
        kind = ir.BF16Type.get() if self.dtype == jnp.bfloat16 else ir.F16Type.get()
        four = ir.VectorType.get((4,), ir.F32Type.get())
        scale = arith.constant(ir.F32Type.get(), self.scale)
        out = (head // heads).wide() * (self.length * width)
        out = out + (head % heads).wide() * (parts * columns)
        out = out.element_of(rows, kind)
        # Four columns a thread, of one of the upper 8 rows of a warp and of the one
        # below it, which lie between each other (`fragments`). One loop over all tiles:
        # there are 24 registers.
        pieces = self._tile_size // 8
        last = (tiles + self.blocks - 1 - block) // self.blocks * pieces
        for n in steps(worker, last, _WORKERS):
            tile, i = block + n // pieces * self.blocks, n % pieces
            start = self._tile(sums, head, tile)
            quarter, pair = i % (columns // 4), i // (columns // 4)
            part, pair = pair // 32, pair % 32
            place = quarter // 2 * 128 + pair * 4 + quarter % 2 * 2
            place = (place + part * (size // 4)).element_of(start, four)
            loaded = [
                llvm.load(four, getelementptr(place, [k], four), alignment=16)
                for k in range(2)
            ]
            row = tile * fragments.ROWS + pair + pair // 8 * 8
            column = (part * columns + quarter * 4).wide()
            for half in range(2):
                values = [
                    arith.mulf(vector.extract(x, [], [2 * half + k]), scale)
                    for x in loaded
                    for k in range(2)
                ]
                values = vector.from_elements(
                    ir.VectorType.get((4,), kind),
                    [arith.truncf(kind, x) for x in values],
                )
                for at in placed(row + 8 * half, *places):
                    at = at.wide() * width + column
                    llvm.store(values, at.element_of(out, kind), alignment=8)

    @property
    def _tile_size(self):
        return self.shape[3] * self.shape[4]

    def _tile(self, sums, head, tile):
        first = head.wide() * (self.shape[2] * self._tile_size)
        first = first + (tile * self._tile_size).wide()
        return first.element_of(sums, ir.F32Type.get())


def _wait(mark, count):
    """Until a mark is `count`: what was written before is then seen."""
    _asm(
        "{.reg .pred less; .reg .s32 found; again_${:uid}: "
        "ld.acquire.gpu.global.s32 found, [$0]; "
        f"setp.lt.s32 less, found, {count}; @less bra again_${{:uid}}; }}",
        mark,
    )


def _count(mark):
    """Adds 1 to a mark, after all that this block of threads has written so far."""
    _asm("fence.acq_rel.gpu; red.relaxed.gpu.global.add.s32 [$0], 1;", mark)


def _asm(text, *pointers):
    space = llvm.PointerType.get(address_space=1)
    llvm.inline_asm(
        ir.Type.parse("!llvm.void"),
        [llvm.addrspacecast(space, x) for x in pointers],
        text,
        ",".join(["l"] * len(pointers) + ["~{memory}"]),
        has_side_effects=True,
    )
