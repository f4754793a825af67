"""One call for any mesh: the functions of attnx where their arrays are."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

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
    expect(fn in LAYOUTS, "fn", f"one of {', '.join(map(_name, LAYOUTS))}", fn)
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

    return cast(Function, call)


def _call(fn, layout: Layout, mesh, spec: PartitionSpec, arguments: dict[str, Any]):
    """Calls `fn` on each device's parts, `spec` being the leading array's."""
    leaves, treedef = tree_flatten_with_path(arguments)
    letters = [_letters(path, arguments, layout) for path, _ in leaves]
    # What is no array is known, and stays so.
    is_array = [isinstance(x, jax.Array | np.ndarray) for _, x in leaves]
    leads = [path[0].key == layout.leading for path, _ in leaves].index(True)
    cut = _Cut.of(layout, mesh, spec, arguments, letters[leads], leaves[leads][1])
    axis_name = cut.axes.get("t", cut.axes.get("s"))
    if layout.with_axis:
        wanted = f"{layout.leading}'s tokens cut over a mesh axis, for {_name(fn)}"
        expect(axis_name is not None, "sharding", wanted, spec)

    arrays, specs = [], []
    for i in itertools.compress(range(len(leaves)), is_array):
        path, x = leaves[i]
        name = ".".join(str(getattr(k, "key", getattr(k, "name", k))) for k in path)
        specs.append(cut.checked(letters[i], x, name, leads=i == leads))
        arrays.append(_laid_out(x, specs[-1], mesh, name))

    def local(*arrays):
        remaining = iter(arrays)
        parts = [
            next(remaining) if yes else x
            for (_, x), yes in zip(leaves, is_array, strict=True)
        ]
        parts = jax.tree.unflatten(treedef, parts)
        for name in ("mask", "block_mask"):
            if isinstance(parts.get(name), Mask | BlockMask):
                shape = parts["query"].shape
                starts = cut.start("b", shape[0]), cut.start("n", shape[-2])
                parts[name] = of_rows(parts[name], *starts)
        if layout.with_axis:
            parts["axis_name"] = axis_name
        return fn(**parts)

    returns = layout.returns
    if arguments.get("return_residual") or arguments.get("return_state"):
        returns = returns, layout.residual
    free = {name for name, kind in _kinds(mesh).items() if kind != AxisType.Manual}
    return jax.shard_map(
        local,
        mesh=mesh if jax.sharding.get_abstract_mesh().empty else None,
        in_specs=tuple(specs),
        out_specs=jax.tree.map(cut.spec, returns),
        axis_names=free,
        check_vma=False,
    )(*arrays)


@dataclasses.dataclass(frozen=True)
class _Cut:
    """How the arrays of a call are cut.

    Attributes:
      mesh: of the devices.
      axes: the mesh axis, or axes, of each letter that is cut.
      space: axes that `*` stands for.
    """

    mesh: Any
    axes: Mapping[str, Any]
    space: int

    @classmethod
    def of(cls, layout, mesh, spec, arguments, letters, leader):
        """As the leading array is; refuses axes that may not be cut."""
        cuts = layout.cuts if isinstance(layout.cuts, str) else layout.cuts(arguments)
        has_space = "*" in letters
        space = leader.ndim - len(letters) + 1 if has_space else 0
        axes = {}
        letters = _of_rank(letters, leader.ndim, space)
        for letter, entry in zip(letters, spec, strict=False):
            if _names(entry):
                names = {"b": "batch", "n": "heads", "t": "tokens", "s": "tokens"}
                may = " and ".join(sorted({names[letter] for letter in cuts}))
                wanted = f"a sharding of {may} alone (attnx.parallel may cut tokens)"
                expect(letter in cuts, layout.leading, wanted, spec)
                axes[letter] = entry
        if "t" in axes and "s" in cuts:
            axes["s"] = axes["t"]
        return cls(mesh, axes, space)

    def spec(self, letters: Letters, rank: int = 99) -> PartitionSpec:
        """Of an array with these axes; of pairs of tokens the queries are cut."""
        entries = [self.axes.get(x) for x in _of_rank(letters, rank, self.space)]
        once = [x if x not in entries[:i] else None for i, x in enumerate(entries)]
        return PartitionSpec(*once)

    def checked(self, letters: Letters, x, name: str, *, leads: bool) -> PartitionSpec:
        """The same for an array, whose axes of size 1 serve all unless it leads."""
        entries = list(self.spec(letters, x.ndim))
        for i, entry in enumerate(entries):
            if x.shape[i] == 1 and not leads:
                entries[i] = None
            elif entry is not None:
                size = _size(self.mesh, entry)
                wanted = f"a multiple of mesh axis {entry!r} ({size}) along axis {i}"
                expect(x.shape[i] % size == 0, name, wanted, x.shape[i])
        return PartitionSpec(*entries)

    def start(self, letter: str, size: int):
        """The first row of this device's, each having so many."""
        axis = self.axes.get(letter)
        return 0 if axis is None else jax.lax.axis_index(axis) * size


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


def _name(fn) -> str:
    return f"{fn.__module__}.{fn.__name__}"


def _names(entry) -> tuple[str, ...]:
    if entry is None:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


def _size(mesh, entry) -> int:
    return math.prod(mesh.shape[name] for name in _names(entry))


def _kinds(mesh) -> dict[str, AxisType]:
    return dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
