"""Matrix products of a warpgroup, and what runs beside them."""

from __future__ import annotations

import contextlib
import functools

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import llvm
from jax.experimental.mosaic import gpu as mgpu

from pallas_kernels.mosaic import TILE, interpreted, plain, ref_type


def product(a, b, *, after=lambda: None):
    """`a b` for shared memory `a` and `b`; `after` runs while it is computed."""
    return product_while(a, b, after)[0]


def product_while(a, b, work):
    """`a b`, and `work()`, which runs while it is computed."""
    if interpreted():
        result = plain(a) @ plain(b)
        plgpu.commit_smem()
        return result, work()

    def run(acc):
        plgpu.wgmma(acc, a, b)
        done = work()
        return plgpu.wgmma_accumulator_load(acc, wait_n=0), done

    return pl.run_scoped(run, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def accumulated(acc, a, *bs):
    """`acc + a b` for each `b` in shared memory, and `a` there or in registers."""
    if interpreted():
        result = sum((plain(a) @ plain(b) for b in bs), acc)
        plgpu.commit_smem()
        return result

    def run(ref):
        for b in bs:
            plgpu.wgmma(ref, a, b)

    return pl.run_state(run)(plgpu.ACC.init(acc))


def overlapped(first, second, *, issued, meanwhile):
    """Two products, and work on the first while the second is computed.

    Args:
      first: `(a, b)` in shared memory, for `a b^T`.
      second: `(acc, c, d)`: `acc + c d`, for registers `c` and shared memory `d`.
      issued: runs when both are on their way.
      meanwhile: `a b^T -> anything`, while the second product is computed.

    Returns:
      `acc + c d` and what `meanwhile` returns.
    """
    (a, b), (acc, c, d) = first, second
    if interpreted():
        product = plain(a) @ plain(b).T
        acc = acc + plain(c) @ plain(d)
        plgpu.commit_smem()
        issued()
        return acc, meanwhile(product)

    @plgpu.inline_mgpu(
        arg_types=(*map(ref_type, (a, b, d)), TILE, TILE),
        return_type=(
            plgpu.ShapeDtypeStruct((a.shape[0], b.shape[0]), jnp.float32, TILE),
            plgpu.ShapeDtypeStruct(acc.shape, jnp.float32, TILE),
        ),
    )
    def issue(_, a, b, d, acc, c):
        # Registers are made ready before the first product, not between the two:
        # there the assembler would give up running them side by side.
        c = _fence(c)
        acc = mgpu.WGMMAAccumulator.from_registers(acc)
        product = mgpu.WGMMAAccumulator.zero(*product_shape)
        product = _issue(product, a, mgpu.memref_transpose(b, (1, 0, 3, 2)))
        with _fenced_already():
            acc = _issue(acc, c, d)
        return product.value, acc.value

    product_shape = (a.shape[0], b.shape[0])
    product, acc = issue(a, b, d, acc, c)
    issued()
    plgpu.wgmma_wait(1)
    done = meanwhile(lax.optimization_barrier(product))
    plgpu.wgmma_wait(0)
    # What reads these comes after the wait, or it could reuse registers in flight.
    return lax.optimization_barrier((acc, done))


def accumulators(body, refs, shapes):
    """Runs `body(*accumulators)`, which start at zero; returns what they come to.

    Args:
      body: gets one accumulator a shape.
      refs: `emulated` float32 memory in those shapes, this warpgroup's own.
      shapes: the accumulators'.
    """
    if interpreted():
        for ref in refs:
            ref[...] = jnp.zeros(ref.shape, jnp.float32)
        body(*refs)
        return tuple(ref[...] for ref in refs)

    def run(*refs):
        body(*refs)
        return tuple(ref[...] for ref in refs)

    return pl.run_scoped(run, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))


def two_products(first, second, meanwhile, *, issued=lambda: None):
    """`meanwhile(a b)` and `c d`, the one worked on while the other is computed.

    `issued` runs when both are on their way.
    """
    (a, b), (c, d) = first, second
    if interpreted():
        results = plain(a) @ plain(b), plain(c) @ plain(d)
        plgpu.commit_smem()
        issued()
        return meanwhile(results[0]), results[1]

    def run(left, right):
        plgpu.wgmma(left, a, b)
        plgpu.wgmma(right, c, d)
        issued()
        done = meanwhile(plgpu.wgmma_accumulator_load(left, wait_n=1))
        return done, plgpu.wgmma_accumulator_load(right, wait_n=0)

    shapes = (a.shape[0], b.shape[1]), (c.shape[0], d.shape[1])
    return pl.run_scoped(run, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))


def in_turn(operands, take, carry):
    """Products one after another, each one's operands made while the last is computed.

    Args:
      operands: functions that return `(a, b)` in shared memory.
      take: `(n, product, carry) -> carry`, of the n-th product.
      carry: what the first of these gets.

    Returns:
      What the last one returns.
    """
    if interpreted():
        for n, make in enumerate(operands):
            a, b = make()
            result = plain(a) @ plain(b)
            plgpu.commit_smem()
            carry = take(n, result, carry)
        return carry

    def run(n, before, carry):
        if n == len(operands):
            return take(n - 1, plgpu.wgmma_accumulator_load(before, wait_n=0), carry)
        a, b = operands[n]()

        def issue(acc):
            plgpu.wgmma(acc, a, b)
            done = carry
            if before is not None:
                product = plgpu.wgmma_accumulator_load(before, wait_n=1)
                done = take(n - 1, product, carry)
            return run(n + 1, acc, done)

        return pl.run_scoped(issue, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))

    return run(0, None, carry)


def products_before(firsts, second):
    """The sum of `a b`; `acc += c d`, which comes after them, may go on.

    See `wait_for_products`.

    Args:
      firsts: each `(a, b)` in shared memory, `a` there or in registers.
      second: `(acc, c, d)`.
    """
    acc, c, d = second
    if interpreted():
        result = sum(plain(a) @ plain(b) for a, b in firsts)
        plgpu.commit_smem()
        add_product(acc, c, d)
        return result

    def run(left):
        for a, b in firsts:
            plgpu.wgmma(left, a, b)
        plgpu.wgmma(acc, c, d)
        return plgpu.wgmma_accumulator_load(left, wait_n=1)

    a, b = firsts[0]
    return pl.run_scoped(run, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def product_beside(first, second, third, write, *, issued, ready, third_is_last):
    """`write(a b)` while `acc += c d` and `e f` are computed.

    Args:
      first: `(a, b)` in shared memory.
      second: `(acc, c, d)`.
      third: `(e, f)` in shared memory.
      write: gets `a b`.
      issued: runs when `a b` is on its way and the products before it are done.
      ready: runs after that, before `e f` is begun.
      third_is_last: whether it comes after the second product, which is then done when
        this returns, or before it, so that the second may go on: see
        `wait_for_products`.

    Returns:
      `e f`.
    """
    (a, b), (acc, c, d), (e, f) = first, second, third
    if interpreted():
        issued()
        result = plain(a) @ plain(b)
        add_product(acc, c, d)
        ready()
        following = plain(e) @ plain(f)
        plgpu.commit_smem()
        write(result)
        return following

    def run(left):
        plgpu.wgmma(left, a, b)
        plgpu.wgmma_wait(1)
        issued()
        if third_is_last:
            plgpu.wgmma(acc, c, d)
        ready()
        # An accumulator is made when nothing more is to be waited for.
        return pl.run_scoped(
            functools.partial(then, left),
            plgpu.ACC((e.shape[0], f.shape[1]), jnp.float32),
        )

    def then(left, right):
        plgpu.wgmma(right, e, f)
        if not third_is_last:
            plgpu.wgmma(acc, c, d)
        write(plgpu.wgmma_accumulator_load(left, wait_n=2))
        return plgpu.wgmma_accumulator_load(right, wait_n=0 if third_is_last else 1)

    return pl.run_scoped(run, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def wait_for_products():
    """Waits for all products of this warpgroup."""
    if not interpreted():
        plgpu.wgmma_wait(0)


def add_product(acc, a, b):
    """Begins `acc += a b` for an accumulator."""
    if interpreted():
        acc[...] = acc[...] + plain(a) @ plain(b)
        plgpu.commit_smem()
    else:
        plgpu.wgmma(acc, a, b)


def _issue(acc, a, b):
    # Rows of a tile are one swizzle wide; in a transposed one they are the columns.
    columns = max(ir.MemRefType(b.type).shape[-2:])
    acc = mgpu.wgmma(acc, a, b, swizzle=2 * columns)
    llvm.inline_asm(
        ir.Type.parse("!llvm.void"),
        [],
        "wgmma.commit_group.sync.aligned;",
        "",
        has_side_effects=True,
    )
    return acc


_fence = mgpu.wgmma.__globals__["wgmma_fence"]


@contextlib.contextmanager
def _fenced_already():
    names = mgpu.wgmma.__globals__
    names["wgmma_fence"] = lambda array: array
    try:
        yield
    finally:
        names["wgmma_fence"] = _fence
