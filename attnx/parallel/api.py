"""One call for any mesh: the functions of attnx where their arrays are."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.tree_util import tree_flatten_with_path

from attnx._checks import expect
from attnx.parallel.layouts import FIELDS, LAYOUTS, Layout, Letters
from attnx.parallel.pieces import of_rows
from attnx.softmax import BlockMask
from attnx.softmax.mask import Mask

Function = TypeVar("Function", bound=Callable)


def sharded(
    fn: Function, *, sharding: PartitionSpec | NamedSharding | None = None
) -> Function:
    """Makes a function of attnx run where its arrays are, each device on its own part.

    Batch and heads can be cut over mesh axes without any communication. The functions
    of `attnx.parallel` may have their tokens cut as well; the mesh axis of these is
    then their `axis_name`.

    On a mesh of Explicit axes, how arrays are cut is read from query's own sharding; on
    one of Auto axes `sharding` says it. Inside a `jax.shard_map` over all axes the
    function is called straight through, and so it is where there is no mesh.

    All arrays are cut as query is. Those that are whole on each device are sliced
    there; one that would have to be gathered is refused where its sharding is known.

    Args:
      fn: a function of attnx, or of `attnx.parallel`, that attends.
      sharding: of the array that leads: query; for functions of `attnx.parallel` that
        decode, the keys of the cache; for `merge_attention` the first output.

    Returns:
      A function of the same arguments, but `axis_name`, with the same results.

    Raises:
      ValueError: a function that is not known; an axis that the mesh does not have or
        that does not divide; arrays cut in a way that `fn` cannot serve.

    Example:
      >>> import jax
      >>> from attnx import parallel
      >>> explicit = (jax.sharding.AxisType.Explicit,) * 2
      >>> mesh = jax.make_mesh((1, 1), ("data", "context"), axis_types=explicit)
      >>> spec = jax.P("data", "context")
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 64, 2, 16))
      >>> with jax.set_mesh(mesh):
      ...     q, k, v = (jax.device_put(x, spec) for x in (q, k, v))
      ...     out = parallel.sharded(parallel.ring_attention)(q, k, v, is_causal=True)
      >>> out.sharding.spec[:2]
      ('data', 'context')
    """
    names = ", ".join(f"{f.__module__}.{f.__name__}" for f in LAYOUTS)
    expect(fn in LAYOUTS, "fn", f"one of {names}", fn)
    layout, signature = LAYOUTS[fn], inspect.signature(fn)
    if layout.with_axis:
        parameters = dict(signature.parameters)
        parameters.pop("axis_name")
        signature = signature.replace(parameters=tuple(parameters.values()))

    @functools.wraps(fn)
    def call(*args, **kwargs):
        whole = kwargs.pop("axis_name", None)
        arguments = dict(signature.bind(*args, **kwargs).arguments)
        leader = jax.tree.leaves(arguments[layout.leading])[0]
        mesh = _mesh(leader, sharding)
        if mesh is None or all(kind == AxisType.Manual for kind in mesh.axis_types):
            more = {} if whole is None else {"axis_name": whole}
            return fn(**arguments, **more)
        return _call(fn, layout, mesh, _spec(leader, mesh, sharding), arguments)

    return call  # ty: ignore[invalid-return-type]


def _call(fn, layout: Layout, mesh, spec: PartitionSpec, arguments: dict[str, Any]):
    """Calls `fn` on each device's parts, `spec` being the leading array's."""
    paths, treedef = tree_flatten_with_path(arguments)
    is_array = [isinstance(x, jax.Array | np.ndarray) for _, x in paths]
    letters = [_letters(path, arguments, layout) for path, _ in paths]
    first = next(
        i for i, (path, _) in enumerate(paths) if path[0].key == layout.leading
    )
    leader = paths[first][1]
    space = leader.ndim - len(_of_rank(letters[first], 4, 0))
    space = max(0, space) if "*" in letters[first] else 0
    cuts = layout.cuts if isinstance(layout.cuts, str) else layout.cuts(arguments)
    axes = _axes(layout, cuts, _of_rank(letters[first], leader.ndim, space), spec)

    def to_spec(letters: Letters, shape=None, name=""):
        one = _of_rank(letters, 99 if shape is None else len(shape), space)
        entries = [axes.get(letter) for letter in one]
        for i, entry in enumerate(entries):
            size = _size(mesh, entry)
            if shape is None or size == 1:
                continue
            if shape[i] == 1 and name != layout.leading:
                entries[i] = None  # It serves all.
                continue
            if entry in entries[:i]:
                entries[i] = None  # Of pairs of tokens, the queries are cut.
                continue
            wanted = f"a multiple of mesh axis {entry!r} ({size}) along axis {i}"
            expect(shape[i] % size == 0, name, wanted, shape[i])
        return PartitionSpec(*entries)

    arrays, specs = [], []
    for (path, x), its_letters, yes in zip(paths, letters, is_array, strict=True):
        if yes:
            name = ".".join(
                str(getattr(k, "key", getattr(k, "name", ""))) for k in path
            )
            wanted = to_spec(its_letters, x.shape, name)
            arrays.append(_laid_out(x, wanted, mesh, name))
            specs.append(wanted)
    rest = [None if yes else x for (_, x), yes in zip(paths, is_array, strict=True)]
    axis_name = axes.get("t", axes.get("s"))
    if layout.with_axis:
        expect(
            axis_name is not None,
            "sharding",
            f"tokens of {layout.leading} that are cut over a mesh axis, for "
            f"{fn.__module__}.{fn.__name__}",
            spec,
        )

    def local(*arrays):
        remaining = iter(arrays)
        leaves = [
            next(remaining) if yes else x for x, yes in zip(rest, is_array, strict=True)
        ]
        parts = jax.tree.unflatten(treedef, leaves)
        for name in ("mask", "block_mask"):
            if (
                isinstance(parts.get(name), Mask | BlockMask)
                and {"b", "n"} & axes.keys()
            ):
                batch, heads = parts["query"].shape[0], parts["query"].shape[-2]
                parts[name] = of_rows(
                    parts[name], _start(axes, "b", batch), _start(axes, "n", heads)
                )
        if layout.with_axis:
            parts["axis_name"] = axis_name
        return fn(**parts)

    returns = layout.returns
    if arguments.get("return_residual") or arguments.get("return_state"):
        returns = returns, layout.residual
    context = jax.sharding.get_abstract_mesh()
    manual = [n for n, k in _kinds(mesh).items() if k == AxisType.Manual]
    return jax.shard_map(
        local,
        mesh=mesh if context.empty else None,
        in_specs=tuple(specs),
        out_specs=jax.tree.map(to_spec, returns),
        axis_names=set(mesh.axis_names) - set(manual),
        check_vma=False,
    )(*arrays)


def _mesh(leader, sharding):
    """The mesh that an array, a sharding or the context names, or None."""
    if isinstance(sharding, NamedSharding):
        return sharding.mesh
    context = jax.sharding.get_abstract_mesh()
    if not context.empty:
        return context
    own = getattr(leader, "sharding", None)
    own = own if isinstance(own, NamedSharding) else jax.typeof(leader).sharding
    return None if own.mesh.empty else own.mesh


def _spec(leader, mesh, sharding) -> PartitionSpec:
    """How the leading array is cut."""
    if sharding is None:
        auto = [n for n, kind in _kinds(mesh).items() if kind == AxisType.Auto]
        expect(
            not auto,
            "sharding",
            f"a PartitionSpec, the mesh axes {auto} being Auto",
            None,
        )
        return jax.typeof(leader).sharding.spec
    spec = sharding.spec if isinstance(sharding, NamedSharding) else sharding
    for entry in spec:
        for name in _names(entry):
            wanted = f"axes of the mesh {mesh.axis_names}"
            expect(name in mesh.axis_names, "sharding", wanted, repr(name))
    wanted = f"at most {leader.ndim} entries"
    expect(len(spec) <= leader.ndim, "sharding", wanted, spec)
    return spec


def _axes(layout, cuts, letters: str, spec) -> dict[str, Any]:
    """The mesh axis, or axes, of each letter that is cut."""
    axes = {}
    for letter, entry in zip(letters, spec, strict=False):
        if not _names(entry):
            continue
        names = {"b": "batch", "n": "heads", "t": "tokens", "s": "tokens"}
        may = sorted({names[letter] for letter in cuts})
        expect(
            letter in cuts,
            layout.leading,
            f"a sharding of {' and '.join(may)} alone (functions of attnx.parallel "
            "take tokens that are cut)",
            spec,
        )
        axes[letter] = entry
    if "t" in axes and "s" in cuts:
        axes["s"] = axes["t"]
    return axes


def _laid_out(x, wanted: PartitionSpec, mesh, name: str):
    """The array cut as is wanted; refuses what would have to be gathered."""
    own = getattr(x, "sharding", None)
    if not isinstance(own, NamedSharding):
        own = jax.typeof(x).sharding
    if own.mesh.axis_names == mesh.axis_names:
        spec = (*own.spec, *[None] * (np.ndim(x) - len(own.spec)))
        pairs = zip(spec, wanted, strict=True)
        fits = all(_names(has) in ((), _names(will)) for has, will in pairs)
        expect(fits, name, f"sharding {wanted} or less", own.spec)
    if AxisType.Explicit in mesh.axis_types:
        return jax.sharding.reshard(x, NamedSharding(mesh, wanted))
    return x


def _letters(path, arguments: Mapping[str, Any], layout: Layout) -> Letters:
    """The letters of the array that a path into the arguments leads to."""
    node, letters = arguments, layout.letters(path[0].key)
    for key in path:
        kind = type(node)
        if isinstance(key, jax.tree_util.GetAttrKey):
            if kind in FIELDS:
                letters = FIELDS[kind].get(key.name, "")
            elif isinstance(node, Mask):
                letters = ""  # Whole: it is asked about the indices of the whole.
            node = getattr(node, key.name)
        else:
            node = node[key.key if isinstance(key, jax.tree_util.DictKey) else key.idx]
    return letters


def _of_rank(letters: Letters, rank: int, space: int) -> str:
    """The letters of an array of so many axes."""
    if not isinstance(letters, str):
        return letters[rank]
    letters = letters.replace("*", "." * space)
    return letters[max(0, len(letters) - rank) :]


def _names(entry) -> tuple[str, ...]:
    if entry is None:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


def _size(mesh, entry) -> int:
    return math.prod(mesh.shape[name] for name in _names(entry))


def _kinds(mesh) -> dict[str, AxisType]:
    return dict(zip(mesh.axis_names, mesh.axis_types, strict=True))


def _start(axes, letter, size):
    """The first row of this device's."""
    return jax.lax.axis_index(axes[letter]) * size if letter in axes else 0
