"""Frozen dataclasses that go in and out of jit: masks, lists, choices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeVar, dataclass_transform

import jax

Class = TypeVar("Class", bound=type)


@dataclass_transform(frozen_default=True, eq_default=False)
def tree_class(*, meta: tuple[str, ...] = ()) -> Callable[[Class], Class]:
    """Makes a class a frozen dataclass and a pytree, `meta` fields being static.

    Not by `jax.tree_util.register_dataclass`: in jax 0.10 and 0.11 two dataclasses of
    the same fields have equal tree structures, of different hash, so that `jax.jit` now
    and then takes the program of one mask for another.
    """

    def decorate(cls: Class) -> Class:
        cls = dataclasses.dataclass(frozen=True, eq=False)(cls)
        names = [field.name for field in dataclasses.fields(cls)]
        data = [name for name in names if name not in meta]
        keys = [jax.tree_util.GetAttrKey(name) for name in data]

        def flatten(tree):
            children = [(key, getattr(tree, key.name)) for key in keys]
            return children, tuple(getattr(tree, name) for name in meta)

        def unflatten(static, children):
            fields = zip((*meta, *data), (*static, *children), strict=True)
            return cls(**dict(fields))

        jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
        return cls

    return decorate
