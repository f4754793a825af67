"""`docs/scaling.md` says what the programs send."""

import math
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from attnx import parallel
from benchmarks import scaling

SIZES = scaling.Sizes(
    devices=4,
    tokens=32,
    heads=8,
    key_heads=4,
    head_size=16,
    reach=10,
    window=11,
)
FUNCTIONS = {
    "ring": (parallel.ring_attention, {}),
    "all-to-all": (parallel.ulysses_attention, {}),
    "states": (parallel.linear_attention, {}),
    "halo": (parallel.neighborhood_attention, {"kernel_size": 11}),
}


def received(jaxpr, devices, times=1):
    """Bytes that a device gets from others in a program, loops counted."""
    total = 0
    for eqn in jaxpr.eqns:
        inside = [
            x for x in jax.tree.leaves(eqn.params, is_leaf=is_jaxpr) if is_jaxpr(x)
        ]
        rounds = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        for x in inside:
            total += received(getattr(x, "jaxpr", x), devices, times * rounds)
        shares = {
            "ppermute": (1, eqn.invars),
            "all_to_all": ((devices - 1) / devices, eqn.invars),
            "all_gather": (devices - 1, eqn.invars),
            "reduce_scatter": (devices - 1, eqn.outvars),
        }
        share, arrays = shares.get(eqn.primitive.name, (0, ()))
        size = sum(math.prod(x.aval.shape) * x.aval.dtype.itemsize for x in arrays)
        total += times * share * size
    return total


def is_jaxpr(x):
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")


@pytest.mark.parametrize("mode", FUNCTIONS)
def test_formulas_count_what_is_sent(mode):
    fn, options = FUNCTIONS[mode]
    kinds, devices = (AxisType.Auto,), jax.devices()[: SIZES.devices]
    mesh = jax.make_mesh((SIZES.devices,), ("context",), kinds, devices=devices)
    attend = parallel.sharded(
        fn, sharding=NamedSharding(mesh, PartitionSpec(None, "context"))
    )
    length = SIZES.devices * SIZES.tokens
    tokens = [
        jax.ShapeDtypeStruct((1, length, heads, SIZES.head_size), jnp.bfloat16)
        for heads in (SIZES.heads, SIZES.key_heads, SIZES.key_heads)
    ]

    def loss(*tokens):
        return attend(*tokens, **options).sum()

    forward = received(jax.make_jaxpr(loss)(*tokens).jaxpr, SIZES.devices)
    both = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(*tokens).jaxpr
    both = received(both, SIZES.devices)
    assert (forward, both - forward) == scaling.sent(SIZES)[mode]


def test_the_page_has_the_tables():
    page = pathlib.Path(__file__).parents[1] / "docs" / "scaling.md"
    between = r"<!-- tables: [^>]*-->\n(.*)\n<!-- end -->"
    assert (
        re.search(between, page.read_text(), re.DOTALL).group(1) == scaling.markdown()
    )
