"""Training on many devices: what of a run is cut over which axis of a mesh.

Two axes have a meaning: `data` cuts the batch, and with it parameters and the state of
the optimizer; `context` cuts the sequences.
"""

from __future__ import annotations

import math
from typing import Any

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from attnx import parallel
from attnx.linear import linear_attention
from attnx.nn import LinearMixer, Mixer, MoHMixer, SoftmaxMixer
from attnx.softmax import dot_product_attention
from models.runs import RunError

AXES = ("data", "context")


def make_mesh(sizes: str) -> Mesh:
    """Makes the mesh that `data=4,context=2` names, of the first devices there are.

    Raises:
      RunError: another axis, no size, or more devices than there are.

    Example:
      >>> dict(make_mesh("data=1").shape)
      {'data': 1, 'context': 1}
    """
    shape = dict.fromkeys(AXES, 1)
    for part in sizes.split(","):
        name, _, size = part.partition("=")
        if name not in AXES or not size.isdigit() or int(size) < 1:
            wanted = "sizes such as data=4,context=2"
            raise RunError(f"mesh: expected {wanted}, got {part!r}.")
        shape[name] = int(size)
    count, devices = math.prod(shape.values()), jax.devices()
    if count > len(devices):
        raise RunError(
            f"mesh: {sizes} takes {count} devices, and there are {len(devices)}."
        )
    kinds = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(shape.values()), AXES, kinds, devices=devices[:count])


def attend_in_pieces(model: nnx.Module, mesh: Mesh) -> None:
    """Has every mixer of a model attend where its tokens are.

    Raises:
      RunError: a mixer that has no such way.
    """
    cut = mesh.shape["context"] > 1
    tokens = NamedSharding(mesh, PartitionSpec("data", "context" if cut else None))
    ways = {
        SoftmaxMixer: parallel.ring_attention if cut else dot_product_attention,
        LinearMixer: parallel.linear_attention if cut else linear_attention,
    }
    for _, mixer in nnx.iter_graph(model):
        # Mixture-of-Head weighs the heads of a mixer that is met as well.
        if isinstance(mixer, Mixer) and not isinstance(mixer, MoHMixer):
            fns = [fn for kind, fn in ways.items() if isinstance(mixer, kind)]
            if not fns:
                name = type(mixer).__name__
                raise RunError(f"mesh: {name} cannot be trained on many devices yet.")
            mixer.attend = parallel.sharded(fns[0], sharding=tokens)


def of_state(mesh: Mesh, state: Any) -> Any:
    """Shardings over `data`, along the first axis that divides; else whole."""

    def sharding(x):
        fits = [i for i, n in enumerate(x.shape) if n % mesh.shape["data"] == 0]
        spec = [*[None] * fits[0], "data"] if fits else []
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(sharding, state)


def of_batches(mesh: Mesh, batches: Any) -> Any:
    """The same for the batches `[steps, B, ...]` of a call, along B."""

    def sharding(x):
        cut = x.ndim > 1 and x.shape[1] % mesh.shape["data"] == 0
        return NamedSharding(mesh, PartitionSpec(*[None, "data"] if cut else []))

    return jax.tree.map(sharding, batches)
