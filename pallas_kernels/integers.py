"""Integers of a program, inside `inline_mgpu`, with operators."""

from __future__ import annotations

from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, scf
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu.utils import getelementptr


def _operator(operation):
    def run(self, other):
        return Int(operation(self.value, self.like(other).value))

    return run


class Int:
    """An integer with operators; none that is divided is negative."""

    def __init__(self, value):
        self.value = value

    def like(self, x) -> Int:
        """A number of Python's with as many bits."""
        return x if isinstance(x, Int) else Int(arith.constant(self.value.type, x))

    def __rsub__(self, other):
        return self.like(other) - self

    __add__, __sub__, __mul__ = map(_operator, (arith.addi, arith.subi, arith.muli))
    __floordiv__, __mod__ = map(_operator, (arith.divui, arith.remui))
    __and__, __xor__ = map(_operator, (arith.andi, arith.xori))
    __rshift__ = _operator(arith.shrui)
    __lt__ = _operator(lambda x, y: arith.cmpi(arith.CmpIPredicate.slt, x, y))
    __gt__ = _operator(lambda x, y: arith.cmpi(arith.CmpIPredicate.sgt, x, y))

    def wide(self):
        """With 64 bits."""
        return Int(arith.extsi(ir.IntegerType.get_signless(64), self.value))

    def element_of(self, start, kind):
        """The address of that element of an array."""
        return getelementptr(start, [self.value], kind)


def at_most(x: Int, most: int) -> Int:
    """The lesser, where numbers above 2**31 - 1 are no negative ones."""
    return Int(arith.minui(x.value, x.like(most).value))


def when(condition: Int):
    """What its body does is done where the condition holds."""
    return mgpu.utils.when(condition.value)


def steps(first: Int, last: Int | int, step: int):
    """A loop of the program; what this one's body does is its body."""
    bounds = (first.like(x).value for x in (last, step))
    loop = scf.ForOp(first.value, *bounds, [])
    with ir.InsertionPoint(loop.body):
        yield Int(loop.induction_variable)
        scf.yield_([])


def i32():
    return ir.IntegerType.get_signless(32)
