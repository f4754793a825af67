"""Parts of rows, gathered from anywhere in memory and summed up, on Hopper.

Each row of a tile of 64 has its own list of parts. A warpgroup walks the lists of its
rows side by side and reads the next part of each straight into registers; what is
summed does not depend on the order of columns, so each thread reads 16 bytes at once.
Other blocks of threads read while one waits: nothing passes through shared memory.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, gpu, llvm
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu.utils import getelementptr, memref_ptr

from pallas_kernels import mosaic
from pallas_kernels.mosaic import ROW, TILE

ROWS = 64
_PIECE = 16  # Bytes that a thread reads at once.
_QUAD = 4  # Threads that share a row.


class PartsOfRows(NamedTuple):
    """Where the parts of each row are.

    Attributes:
      place: int32 `[B, N, P]`, the places of all parts, those of a row one after the
        other; a number past the last place for a part that is not there.
      first: int32 `[B, N, T]`, where in `place` those of each row begin.
      stop: int32 `[B, N, T]`, and where they end.
    """

    place: jax.Array
    first: jax.Array
    stop: jax.Array


def merge_rows(
    out: jax.Array,
    lse: jax.Array,
    parts: PartsOfRows,
    rest: tuple[jax.Array, jax.Array] | None,
) -> tuple[jax.Array, jax.Array]:
    """Merges the parts of each row by their log-sum-exps.

    Args:
      out: `[B, M, N, V]` of 16 bits, V a multiple of 32.
      lse: natural, float32 `[B, N, M]`; -inf for a part that counts nothing.
      parts: where those of each row are.
      rest: one more part of every row, `[B, T, N, V]` and `[B, N, T]`, or None.

    Returns:
      `[B, T, N, V]` and the log-sum-exp `[B, N, T]`: 0 and -inf without parts.
    """

    def begin(rest):
        if rest is None:
            vector = functools.partial(mosaic.full, (ROWS,), layout=ROW)
            return _zeros(out), vector(-jnp.inf), vector(0.0)
        merged, peak = rest
        return merged, peak, jnp.where(peak == -jnp.inf, 0.0, 1.0)

    def add(state, part, lse):
        merged, peak, total = state
        new_peak = jnp.maximum(peak, lse)
        base = jnp.where(new_peak == -jnp.inf, 0.0, new_peak)
        before, weight = jnp.exp(peak - base), jnp.exp(lse - base)
        merged = _along(before, merged) * merged + _along(weight, part) * part
        return merged, new_peak, before * total + weight

    def end(state):
        merged, peak, total = state
        empty = total == 0.0
        total = jnp.where(empty, 1.0, total)
        merged = merged * _along(1.0 / total, merged)
        return merged, jnp.where(empty, -jnp.inf, peak + jnp.log(total))

    return _walk("merge_rows", (begin, add, end), out, lse, parts, rest)


def sum_rows(x: jax.Array, parts: PartsOfRows) -> jax.Array:
    """Adds up the parts of each row.

    Args:
      x: `[B, M, N, V]` of 16 bits, V a multiple of 32.
      parts: where those of each row are.

    Returns:
      `[B, T, N, V]`.
    """
    begin = lambda _: (_zeros(x),)
    add = lambda state, part, _: (state[0] + part,)
    [total] = _walk("sum_rows", (begin, add, lambda x: x), x, None, parts, None)
    return total


def _walk(name, steps, x, lse, parts, rest):
    """`end(add(... add(begin(rest), part, lse) ...))` for each row: `[B, T, N, V]`.

    And `[B, N, T]` if there is a log-sum-exp.
    """
    begin, add, end = steps
    batch, places, heads, size = x.shape
    place, first, stop = parts
    length = first.shape[2]
    pad = -length % ROWS
    first, stop = (jnp.pad(x, ((0, 0), (0, 0), (0, pad))) for x in (first, stop))
    tiles = (length + pad) // ROWS
    most = (stop - first).reshape(*first.shape[:2], tiles, ROWS).max(-1)
    given = [lse, *(rest or ())]
    given = [x for x in given if x is not None]

    def body(*refs):
        x_g, place_g, first_g, stop_g, most_g = refs[:5]
        given_g, outs_g = refs[5 : 5 + len(given)], refs[5 + len(given) :]
        h, i, b = (lax.axis_index(axis) for axis in ("h", "q", "b"))
        rows = pl.ds(i * ROWS, ROWS)
        first, stop = (
            mosaic.load(ref.at[b, h, rows], ROW) for ref in (first_g, stop_g)
        )
        start = None
        if rest is not None:
            own = i * ROWS + mosaic.iota(ROWS, 0)
            start = (
                _gather(given_g[1].at[b, :, h], own).astype(jnp.float32),
                _look_up(given_g[2].at[b, h], own, -jnp.inf),
            )

        def place_of(j):
            number = first + j
            number = jnp.where(number < stop, number, place_g.shape[2])
            return _look_up(place_g.at[b, h], number, places)

        def step(j, carry):
            here, state = carry
            weigh = None
            if lse is not None:
                weigh = _look_up(given_g[0].at[b, h], here, -jnp.inf)
            part = _gather(x_g.at[b, :, h], here).astype(jnp.float32)
            # The next place comes while this part does.
            return place_of(j + 1), add(state, part, weigh)

        carry = place_of(0), begin(start)
        _, state = lax.fori_loop(0, most_g[b, h, i], step, carry)
        total, *logs = end(state)
        _put(outs_g[0].at[b, rows, h], total.astype(x.dtype))
        for ref, log in zip(outs_g[1:], logs, strict=True):
            ref.at[b, h, rows][...] = log

    padded = length + pad
    outputs = [jax.ShapeDtypeStruct((batch, padded, heads, size), x.dtype)]
    if lse is not None:
        outputs.append(jax.ShapeDtypeStruct((batch, heads, padded), jnp.float32))
    out, *logs = mosaic.call(
        body,
        (x, place, first, stop, most, *given),
        tuple(outputs),
        scratch=[],
        grid=(heads, tiles, batch),
        grid_names=("h", "q", "b"),
        kernel_name=name,
    )
    return out[:, :length], *(x[..., :length] for x in logs)


def _zeros(like):
    return mosaic.full((ROWS, like.shape[-1]), 0.0, TILE)


def _along(x, tile):
    return mosaic.along(x, 0, tile.shape)


def _look_up(source, index, fill):
    """`source[index]` along the rows of a tile; `fill` where that is past the end."""
    [length] = source.shape
    if mosaic.interpreted():
        return jnp.take(source[...], index, mode="fill", fill_value=fill)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), ROW),
        return_type=plgpu.ShapeDtypeStruct((ROWS,), source.dtype, ROW),
    )
    def run(_, source, index):
        memory = _Memory(source, length)
        dtype = ir.MemRefType(source.type).element_type
        found = np.empty_like(index.registers)
        for at, number in np.ndenumerate(index.registers):
            [word] = memory.read(_element(number, 0), 1, bits)
            found[at] = llvm.bitcast(ir.VectorType.get((1,), dtype), word)
        return _registers(found, ROW, is_signed)

    bits = int(np.asarray(fill, source.dtype).view(np.uint32))
    is_signed = True if jnp.issubdtype(source.dtype, jnp.integer) else None
    return run(source, index)


def _gather(source, index):
    """The rows `source[index]`, a tile; 0 where that is past the end.

    The columns are in an order of their own, which `_put` undoes: four threads share a
    row, and each has 16 bytes of every 64 in place of 4 bytes of every 16.
    """
    length, columns = source.shape
    if mosaic.interpreted():
        return jnp.take(source[...], index, axis=0, mode="fill", fill_value=0)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), ROW),
        return_type=plgpu.ShapeDtypeStruct((ROWS, columns), source.dtype, TILE),
    )
    def run(_, source, index):
        memory = _Memory(source, length)
        dtype = ir.MemRefType(source.type).element_type
        pair = ir.VectorType.get((2,), dtype)
        shape = TILE.to_mgpu().registers_shape((ROWS, columns))
        found = np.empty(shape, object)
        for half, number in enumerate(index.registers.reshape(-1)):
            number = _element(number, 0)
            # Pairs of columns, four in 16 bytes.
            pairs = found.reshape(-1, _QUAD, 2)[..., half]
            for i, four in enumerate(pairs):
                words = memory.read(number, _QUAD, 0, _QUAD * i)
                four[:] = [llvm.bitcast(pair, word) for word in words]
        return _registers(found, TILE, None)

    return run(source, index)


def _put(target, x):
    """Writes a tile whose columns are in the order of `_gather` to memory."""
    if mosaic.interpreted():
        target[...] = x
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), TILE))
    def run(_, target, x):
        memory = _Memory(target, ROWS)
        i32 = ir.IntegerType.get_signless(32)
        thread = _thread()
        # Of each warp 16 rows, one for four threads, and eight rows on another.
        row = arith.divui(thread, _constant(32))
        row = arith.addi(
            arith.muli(row, _constant(16)),
            arith.divui(arith.remui(thread, _constant(32)), _constant(_QUAD)),
        )
        for half in range(2):
            own = arith.addi(row, _constant(8 * half))
            for i, four in enumerate(x.registers.reshape(-1, _QUAD, 2)[..., half]):
                words = [llvm.bitcast(i32, pair) for pair in four]
                memory.write(own, words, _QUAD * i)

    run(target, x)


class _Memory:
    """Rows in memory, read and written by 4 or 16 bytes a thread."""

    def __init__(self, ref, length):
        [stride, *_], _ = ir.MemRefType(ref.type).get_strides_and_offset()
        itemsize = mgpu.utils.bytewidth(ir.MemRefType(ref.type).element_type)
        self._start, self._stride = memref_ptr(ref), stride * itemsize
        self._length = length

    def _at(self, row, piece):
        """The address of this thread's piece of a row, or of a row that is a word."""
        i8, i64 = (ir.IntegerType.get_signless(bits) for bits in (8, 64))
        offset = arith.muli(arith.extui(i64, row), _constant(self._stride, i64))
        if piece is not None:
            lane = arith.remui(_thread(), _constant(_QUAD))
            piece = arith.addi(lane, _constant(piece))
            piece = arith.muli(piece, _constant(_PIECE))
            offset = arith.addi(offset, arith.extui(i64, piece))
        return getelementptr(self._start, [offset], i8)

    def read(self, row, words, fill, piece=None):
        """So many words; `fill` past the last row, for which no memory is read."""
        i32 = ir.IntegerType.get_signless(32)
        inside = arith.cmpi(arith.CmpIPredicate.ult, row, _constant(self._length))
        inside = arith.extui(i32, inside)
        names = [f"${i}" for i in range(words)]
        wide, to = (".v4", f"{{{', '.join(names)}}}") if words > 1 else ("", names[0])
        filled = " ".join(f"mov.b32 {name}, {fill};" for name in names)
        result = ir.Type.parse(f"!llvm.struct<({', '.join(['i32'] * words)})>")
        found: Any = llvm.inline_asm(
            result if words > 1 else i32,
            [self._at(row, piece), inside],
            f"{{ .reg .pred p; setp.ne.b32 p, ${words + 1}, 0; {filled} "
            f"@p ld.global.nc{wide}.b32 {to}, [${words}]; }}",
            ",".join(["=&r"] * words + ["l", "r"]),
        )
        if words == 1:
            return [found]
        return [llvm.extractvalue(i32, found, [i]) for i in range(words)]

    def write(self, row, words, piece):
        llvm.inline_asm(
            ir.Type.parse("!llvm.void"),
            [self._at(row, piece), *words],
            "st.global.v4.b32 [$0], {$1, $2, $3, $4};",
            "l,r,r,r,r",
            has_side_effects=True,
        )


def _registers(found, layout, is_signed):
    return mgpu.FragmentedArray(
        _registers=found, _layout=layout.to_mgpu(), _is_signed=is_signed
    )


def _thread():
    """This thread's number in its warpgroup."""
    i32 = ir.IntegerType.get_signless(32)
    return arith.remui(
        arith.index_cast(i32, gpu.thread_id(gpu.Dimension.x)), _constant(128)
    )


def _element(values, i):
    return llvm.extractelement(values, _constant(i))


def _constant(value, kind=None):
    kind = kind or ir.IntegerType.get_signless(32)
    return arith.constant(kind, ir.IntegerAttr.get(kind, value))
