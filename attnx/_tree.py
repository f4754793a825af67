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
            children = [getattr(tree, name) for name in data]
            return children, tuple(getattr(tree, name) for name in meta)

        def flatten_with_keys(tree):
            children, static = flatten(tree)
            return list(zip(keys, children, strict=True)), static

        def unflatten(static, children):
            # Children may be anything while a tree is mapped: nothing is checked.
            tree = object.__new__(cls)
            for name, value in zip((*meta, *data), (*static, *children), strict=True):
                object.__setattr__(tree, name, value)
            return tree

        jax.tree_util.register_pytree_with_keys(
            cls, flatten_with_keys, unflatten, flatten
        )
        return cls

    return decorate
