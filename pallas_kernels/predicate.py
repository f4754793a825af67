"""A mask inside a kernel: traced on one pair, evaluated on a tile.

`trace` takes any function of (batch, head, query start, row, key start, column) and
follows what each value depends on. What depends on the row alone stays a vector along
the rows, what depends on the column alone a vector along the columns, and only what
needs both becomes a tile. Arrays that the function looks up by its query or its key
are looked up before the kernel, for all queries or keys, and loaded as vectors.

In a transposed tile queries are the columns, of which a thread holds many. Vectors
along them that take long are `words`, which a kernel may make and hand over itself.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Literal

QUERY, KEY = "query", "key"
_ARGUMENTS = (("batch",), ("head",), (QUERY,), (QUERY,), (KEY,), (KEY,))
# Nothing happens to a single value in these.
_SHAPE_ONLY = {
    "broadcast_in_dim",
    "reshape",
    "squeeze",
    "expand_dims",
    "transpose",
    "copy",
    "stop_gradient",
}
_ELEMENTWISE = {
    "add",
    "sub",
    "mul",
    "neg",
    "abs",
    "sign",
    "div",
    "rem",
    "max",
    "min",
    "and",
    "or",
    "not",
    "xor",
    "shift_left",
    "shift_right_logical",
    "shift_right_arithmetic",
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "select_n",
    "convert_element_type",
}


# Outside, even where the array has one element.
_LOOKUPS = {"dynamic_slice", "gather"}
# Operations from which on a vector is worth the way through shared memory.
_LONG = 8


class Untraceable(ValueError):
    """A predicate that a kernel cannot evaluate, and why."""


@dataclasses.dataclass(frozen=True)
class Lookup:
    """Where a looked up value comes from: by query, by key, or by neither."""

    by: str | None


@dataclasses.dataclass(frozen=True, eq=False)
class Predicate:
    """A traced predicate. Hashed by identity: it belongs to one call.

    Its batches count modulo `batch`.
    """

    batch: int
    lookups: tuple[Lookup, ...]
    _jaxpr: Any
    _arguments: tuple[Any, ...]
    _looked_up: tuple[Any, ...]

    def __call__(
        self, arguments: Sequence, looked_up: Sequence, shape, words: Sequence = ()
    ) -> Any:
        """The boolean tile.

        Args:
          arguments: the six arguments as `(value, axis)`, axis None for scalars.
          looked_up: one `(value, axis)` a lookup.
          shape: of the tile.
          words: those of `make_words` as `(value, axis)`, if they are there.
        """
        env = self._known(arguments, looked_up)
        env |= dict(zip(self.words, words, strict=False))
        (out,) = _evaluate(self._jaxpr, self._jaxpr.outvars, env, shape)
        return _spread(*out, shape)

    def make_words(self, arguments: Sequence, looked_up: Sequence, shape) -> list:
        """The vectors `words`, int32, of arguments as above."""
        env = self._known(arguments, looked_up)
        return [x for x, _ in _evaluate(self._jaxpr, self.words, env, shape)]

    @functools.cached_property
    def words(self) -> tuple[Any, ...]:
        """What meets the keys, depends on the row alone, and takes long to make.

        What is looked up does: memory is far, and a thread would hold it meanwhile.
        """
        along = {self._arguments[3]: {QUERY}, self._arguments[5]: {KEY}}
        for var, lookup in zip(self._looked_up, self.lookups, strict=True):
            along[var] = {lookup.by} - {None}
        words = {}
        for eqn in _leading_to(self._jaxpr, self._jaxpr.outvars, along):
            sides = [along.get(x, set()) for x in _variables(eqn.invars)]
            along |= dict.fromkeys(eqn.outvars, set().union(*sides))
            if along[eqn.outvars[0]] == {QUERY, KEY}:
                words |= dict.fromkeys(_variables(eqn.invars))

        def is_long(var):
            eqns = _leading_to(self._jaxpr, [var], self._looked_up)
            made = [
                eqn.primitive.name in _ELEMENTWISE
                for eqn in eqns
                if along[eqn.outvars[0]] == {QUERY}
            ]
            inputs = {var}.union(*(_variables(eqn.invars) for eqn in eqns))
            from_memory = any(along.get(x) for x in inputs & set(self._looked_up))
            return from_memory or sum(made) >= _LONG

        return tuple(
            var
            for var in words
            if along.get(var) == {QUERY}
            and var.aval.dtype == jnp.int32
            and is_long(var)
        )

    def _known(self, arguments, looked_up):
        env = dict(zip(self._arguments, arguments, strict=True))
        return env | dict(zip(self._looked_up, looked_up, strict=True))


def trace(
    fn: Callable, batch: int, heads: int, query_len: int, key_len: int
) -> tuple[Predicate, list[jax.Array]]:
    """Traces a predicate for arrays of given sizes.

    Args:
      fn: `(batch, head, query_start, row, key_start, column) -> bool`, traceable.
      batch: B.
      heads: N.
      query_len: T, to which looked up values reach.
      key_len: S.

    Returns:
      The predicate and the looked up values, int32 `[B or 1, N or 1, T, S or 1]`.

    Raises:
      Untraceable: `fn` looks up an array by query and key, or uses an operation that
        kernels do not have.
    """
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    closed = jax.make_jaxpr(fn)(*[scalar] * 6)
    jaxpr, constants, arguments = _inline(closed)
    depends = dict(zip(arguments, map(frozenset, _ARGUMENTS), strict=True))
    depends |= dict.fromkeys(constants, frozenset())
    wanted, inside = [], []
    for var, x in constants.items():
        if jnp.size(x) == 1:
            wanted.append(var)
    for eqn in jaxpr.eqns:
        on = frozenset().union(*(depends[x] for x in _variables(eqn.invars)))
        depends |= dict.fromkeys(eqn.outvars, on)
        name = eqn.primitive.name
        single = all(_is_single(x) for x in (*eqn.invars, *eqn.outvars))
        if single and name not in _LOOKUPS:
            if name not in _ELEMENTWISE | _SHAPE_ONLY:
                raise Untraceable(f"the mask uses {name}, which kernels do not have")
            inside.append(eqn)
            continue
        wanted += [x for x in eqn.outvars if _is_single(x)]
    used = {x for e in inside for x in _variables(e.invars)}
    used |= set(_variables(jaxpr.outvars))
    wanted = [x for x in wanted if x in used]
    lookups, arrays = [], []
    for var in wanted:
        on = depends[var]
        if {QUERY, KEY} <= on:
            raise Untraceable("the mask looks up an array by query and key")
        by = QUERY if QUERY in on else KEY if KEY in on else None
        sizes = (
            batch if "batch" in on else 1,
            heads if "head" in on else 1,
            {QUERY: query_len, KEY: key_len, None: 1}[by],
        )
        value = functools.partial(_outside, jaxpr, arguments, constants, var)
        for axis in reversed(range(3)):
            value = jax.vmap(value, [0 if i == axis else None for i in range(3)])
        looked_up = value(*(jnp.arange(n, dtype=jnp.int32) for n in sizes))
        lookups.append(Lookup(by))
        arrays.append(jnp.asarray(looked_up).reshape(sizes).astype(jnp.int32))
    return Predicate(batch, tuple(lookups), jaxpr, arguments, tuple(wanted)), arrays


def _outside(jaxpr, arguments, constants, wanted, batch, head, index):
    """A looked up value of one query or key, by evaluating what leads to it."""
    env = dict(zip(arguments, (batch, head, 0, index, 0, index), strict=True))
    env = {var: jnp.asarray(x, jnp.int32) for var, x in env.items()} | constants
    for eqn in _leading_to(jaxpr, [wanted], env):
        inputs = [x.val if isinstance(x, Literal) else env[x] for x in eqn.invars]
        outputs = eqn.primitive.bind(*inputs, **eqn.params)
        outputs = outputs if eqn.primitive.multiple_results else [outputs]
        env |= dict(zip(eqn.outvars, outputs, strict=True))
    return env[wanted].reshape(())


def _leading_to(jaxpr, wanted, known):
    """The operations that make some variables out of known ones."""
    known = set(known)
    needed = set(_variables(wanted)) - known
    eqns = []
    for eqn in reversed(jaxpr.eqns):
        if needed & set(eqn.outvars):
            eqns.append(eqn)
            needed |= set(_variables(eqn.invars)) - known
    return eqns[::-1]


def _variables(atoms):
    return [x for x in atoms if not isinstance(x, Literal)]


def _evaluate(jaxpr, wanted, env, shape):
    """The `(value, axis)` of some variables or literals."""
    env = dict(env)

    def read(x):
        return (_literal(x), None) if isinstance(x, Literal) else env[x]

    for eqn in _leading_to(jaxpr, wanted, env):
        inputs = [read(x) for x in eqn.invars]
        shape_only = eqn.primitive.name in _SHAPE_ONLY
        env[eqn.outvars[0]] = inputs[0] if shape_only else _apply(eqn, inputs, shape)
    return [read(x) for x in wanted]


def _apply(eqn, inputs, shape):
    axes = {axis for _, axis in inputs} - {None}
    if not axes:
        axis = None
        values = [x for x, _ in inputs]
    elif len(axes) == 1:
        (axis,) = axes
        size = shape if axis == "both" else (shape[axis],)
        values = [
            lax.broadcast_in_dim(x, size, ()) if at is None else x for x, at in inputs
        ]
    else:
        axis = "both"
        values = [_spread(x, at, shape) for x, at in inputs]
    params = dict(eqn.params)
    if eqn.primitive.name == "convert_element_type":
        return lax.convert_element_type(values[0], params["new_dtype"]), axis
    return eqn.primitive.bind(*values, **params), axis


def _spread(value, axis, shape):
    if axis == "both":
        return value
    return lax.broadcast_in_dim(value, shape, () if axis is None else (axis,))


def _literal(x):
    return jnp.asarray(x.val, x.aval.dtype).reshape(())


def _is_single(x) -> bool:
    return math.prod(x.aval.shape) == 1


def _inline(closed):
    """The jaxpr with the functions that it calls written out, its constants, and the
    variables of its arguments."""
    jaxpr, count = closed.jaxpr, len(closed.consts)
    structs = [
        jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype)
        for v in (*jaxpr.constvars, *jaxpr.invars)
    ]
    flat = jax.make_jaxpr(lambda *x: _replay(jaxpr, x[:count], x[count:]))(*structs)
    constants = dict(zip(flat.jaxpr.invars, closed.consts, strict=False))
    constants |= dict(zip(flat.jaxpr.constvars, flat.consts, strict=True))
    return flat.jaxpr, constants, tuple(flat.jaxpr.invars[count:])


def _replay(jaxpr, consts, args):
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
    for eqn in jaxpr.eqns:
        inputs = [x.val if isinstance(x, Literal) else env[x] for x in eqn.invars]
        inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        if inner is None:
            outputs = eqn.primitive.bind(*inputs, **eqn.params)
            outputs = outputs if eqn.primitive.multiple_results else [outputs]
        else:
            closed = hasattr(inner, "consts")
            body = inner.jaxpr if closed else inner
            outputs = _replay(body, inner.consts if closed else (), inputs)
        env |= dict(zip(eqn.outvars, outputs, strict=True))
    return [x.val if isinstance(x, Literal) else env[x] for x in jaxpr.outvars]
