"""The GPU kernels without a GPU: lowered for CUDA, and run by Pallas' interpreter."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SINCE_0_11, SLOW, assert_matches, normal, relative_rms

import attnx
from attnx import BlockMask, masks
from pallas_kernels import mosaic

SOFTMAX = attnx.dot_product_attention
DETERMINISTIC = attnx.KernelConfig(deterministic=True)
IDS = jnp.sort(jax.random.randint(jax.random.key(0), (1, 200), 0, 5))
TILES = jnp.array([[[1, 0], [1, 1]], [[0, 1], [0, 0]]], bool)
RANK = jnp.arange(200) // 3
LISTS = BlockMask.from_tiles(
    TILES,
    200,
    200,
    mask=masks.from_fn(lambda b, h, q, k, rank: rank[q] >= rank[k], RANK),
)


def shapes(batch, space, heads, size, *, keys=None, key_heads=None, value_size=None):
    """Of a query, a key and a value."""
    space = space if isinstance(space, tuple) else (space,)
    keys = space if keys is None else (keys,)
    rest = (batch, *keys, key_heads or heads)
    return (batch, *space, heads, size), (*rest, size), (*rest, value_size or size)


def case(fn, shapes, dtype="bfloat16", **options):
    return functools.partial(fn, **options), shapes, dtype


CASES = {
    "dense": case(SOFTMAX, shapes(1, 256, 1, 64)),
    "causal grouped": case(SOFTMAX, shapes(1, 200, 2, 32, key_heads=1), is_causal=True),
    "cross, wider values": case(SOFTMAX, shapes(1, 130, 1, 32, keys=77, value_size=64)),
    "window": case(SOFTMAX, shapes(1, 384, 1, 64), local_window_size=(50, 9)),
    "keys that nobody sees": case(
        SOFTMAX,
        shapes(1, 256, 1, 128, value_size=64),
        mask=masks.Window(70, 0) & ~masks.Prefix(200),
    ),
    "lengths": case(
        SOFTMAX,
        shapes(2, 200, 1, 32),
        query_seq_lengths=jnp.array([100, 0]),
        key_value_seq_lengths=jnp.array([50, 200]),
    ),
    "documents": case(
        SOFTMAX,
        shapes(1, 200, 1, 96),
        "float16",
        mask=masks.Segments(IDS) & masks.Causal(),
    ),
    "window per head": case(
        SOFTMAX,
        shapes(2, 200, 2, 64),
        mask=masks.Window(jnp.array([3, 77]), 5) | masks.Prefix(jnp.array([3, 70])),
    ),
    "negative scale": case(
        SOFTMAX, shapes(1, 128, 1, 64), mask=~masks.Strided(3), scale=-0.1
    ),
    "many heads": case(SOFTMAX, shapes(3, 1024, 16, 64), is_causal=True),
    "head size 256": case(SOFTMAX, shapes(1, 128, 2, 256, key_heads=1), is_causal=True),
    "lists per head": case(
        attnx.block_sparse_attention, shapes(1, 200, 2, 64), block_mask=LISTS
    ),
    "blocks of 384 queries": case(
        attnx.block_sparse_attention,
        shapes(1, 500, 1, 128),
        block_mask=BlockMask.from_mask(masks.Causal(), 500, 500, block_size=(384, 128)),
    ),
    "1-D": case(
        attnx.neighborhood_attention,
        shapes(1, 300, 1, 64),
        kernel_size=31,
        dilation=3,
        is_causal=True,
    ),
    "2-D": case(
        attnx.neighborhood_attention,
        shapes(1, (15, 21), 1, 32),
        kernel_size=(7, 5),
        stride=(2, 3),
        dilation=(1, 2),
    ),
    "3-D": case(
        attnx.neighborhood_attention,
        shapes(1, (5, 7, 9), 1, 64),
        kernel_size=(3, 5, 4),
        is_causal=(True, False, False),
    ),
    "decode": case(
        attnx.decode_attention,
        shapes(2, 2, 4, 64, keys=1024, key_heads=2),
        lengths=jnp.array([3, 1000]),
    ),
}
# An interpreted kernel takes seconds, four times as many before jax 0.11.
INTERPRETED = ["cross, wider values", "documents"]
if SINCE_0_11:
    INTERPRETED += [
        "keys that nobody sees",
        "causal grouped",
        "lists per head",
        "2-D",
        "decode",
    ]


def with_gradients(fn, implementation="pallas"):
    def run(*arrays):
        call = functools.partial(fn, implementation=implementation)
        out, pull = jax.vjp(lambda *a: call(*a, return_residual=True), *arrays)
        return out, pull(out)

    return run


def structs(shapes, dtype):
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]


def kernels(fn, *structs):
    """The kernels' calls in a program for CUDA."""
    text = jax.jit(fn).trace(*structs).lower(lowering_platforms=("cuda",)).as_text()
    return re.findall(r"custom_call @mosaic_gpu\w*\(", text)


@pytest.mark.parametrize("name", CASES)
def test_lowers_for_cuda(name):
    fn, shapes, dtype = CASES[name]
    found = kernels(with_gradients(fn), *structs(shapes, dtype))
    # Forward, backward and what puts the queries' gradients in rows; one a gradient for
    # wide heads. The backward of decoding attends again.
    assert len(found) == {"head size 256": 4, "decode": 4}.get(name, 3)


def test_a_fixed_order_takes_a_kernel_a_gradient():
    fn, shapes, dtype = CASES["causal grouped"]
    found = kernels(with_gradients(fn, DETERMINISTIC), *structs(shapes, dtype))
    assert len(found) == 4


def assert_matches_the_reference(name, implementation):
    fn, shapes, dtype = CASES[name]
    run = functools.partial(fn, return_residual=True)
    assert_matches(
        functools.partial(run, implementation=implementation),
        functools.partial(run, implementation="reference"),
        normal(0, *shapes, dtype=dtype),
    )


@pytest.mark.parametrize("name", INTERPRETED)
def test_matches_the_reference(name):
    with mosaic.interpret():
        assert_matches_the_reference(name, "pallas")


@pytest.mark.parametrize(
    "name",
    [
        "head size 256",
        *[pytest.param(x, marks=SLOW) for x in ("causal grouped", "2-D")],
    ],
)
def test_a_fixed_order_matches_the_reference(name):
    with mosaic.interpret():
        assert_matches_the_reference(name, DETERMINISTIC)


def test_decoding_splits_the_cache():
    args = normal(0, *shapes(1, 2, 2, 32, keys=1024, key_heads=1), dtype="bfloat16")
    decode = functools.partial(
        attnx.decode_attention, lengths=jnp.array([900]), return_residual=True
    )
    with mosaic.interpret():
        got = jax.jit(functools.partial(decode, implementation="pallas"))(*args)
    wide = [x.astype(jnp.float32) for x in args]
    for x, y in zip(got, decode(*wide, implementation="reference"), strict=True):
        assert relative_rms(x, y) < 4e-3


@SLOW
def test_a_mapped_axis_joins_the_batch():
    mask = masks.from_fn(lambda b, h, q, k: q + 50 * b >= k)
    query, key, value = normal(0, (2, 2, 128, 1, 32), *[(2, 128, 1, 32)] * 2)
    arrays = [x.astype(jnp.bfloat16) for x in (query, key, value)]

    def mapped(implementation):
        run = functools.partial(SOFTMAX, mask=mask, implementation=implementation)
        both = jax.vmap(run, in_axes=(0, None, None))
        return lambda *a: (both(*a),)

    with mosaic.interpret():
        assert_matches(mapped("pallas"), mapped("reference"), arrays)


@pytest.mark.skipif(not SINCE_0_11, reason="the detector came with jax 0.11")
@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        ("cross, wider values", "pallas"),
        ("keys that nobody sees", "pallas"),
        # By default blocks of threads add to the same gradients of queries, which the
        # memory puts in turn and the detector does not know to.
        ("causal grouped", DETERMINISTIC),
    ],
)
def test_no_memory_is_raced_for(name, implementation):
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    fn, shapes, dtype = CASES[name]
    arrays = normal(0, *shapes, dtype=dtype)
    with mosaic.interpret(detect_races=True):
        run = jax.jit(with_gradients(fn, implementation))
        jax.block_until_ready(run(*arrays))
        assert not gpu_callbacks.get_races().races_found


def test_other_lists_of_a_shape_reuse_the_program():
    arrays = normal(0, *shapes(1, 256, 1, 32), dtype="bfloat16")

    @jax.jit
    @chex.assert_max_traces(n=1)
    def fn(arrays, tiles):
        lists = BlockMask.from_tiles(tiles, 256, 256)
        return attnx.block_sparse_attention(*arrays, lists, implementation="pallas")

    for tiles in ([[1, 0], [1, 1]], [[0, 1], [0, 0]]):
        tiles = jnp.array(tiles, bool)
        with mosaic.interpret():
            got = fn(arrays, tiles)
        lists = BlockMask.from_tiles(tiles, 256, 256)
        want = attnx.block_sparse_attention(
            *(x.astype(jnp.float32) for x in arrays), lists, implementation="reference"
        )
        assert relative_rms(got, want) < 4e-3


@pytest.mark.parametrize("transform", [jax.checkpoint, jax.vmap, jax.jit])
def test_lowers_under_transformations(transform):
    fn = functools.partial(SOFTMAX, is_causal=True, implementation="pallas")

    def loss(*arrays):
        return transform(fn)(*arrays).astype(jnp.float32).sum()

    gradients = jax.grad(loss, (0, 1, 2))
    assert len(kernels(gradients, *structs(shapes(2, 256, 2, 64), "bfloat16"))) >= 3


def test_lowers_in_a_scan_and_in_a_shard_map():
    fn = functools.partial(SOFTMAX, is_causal=True, implementation="pallas")
    args = structs(shapes(2, 256, 2, 64), "bfloat16")

    def scanned(query, key, value):
        body = lambda carry, _: (fn(carry, key, value), None)
        return jax.lax.scan(body, query, length=3)[0]

    assert len(kernels(scanned, *args)) == 1
    mesh = jax.make_mesh((1,), ("x",), (jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("x")
    sharded = jax.shard_map(
        fn, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False
    )
    assert len(kernels(sharded, *args)) == 1


@pytest.mark.parametrize(
    ("reason", "dtype", "size", "options"),
    [
        ("takes bfloat16 and float16, not float32", "float32", 64, {}),
        ("takes head sizes .*, not 48", "bfloat16", 48, {}),
        ("takes no bias", "bfloat16", 64, {"bias": jnp.zeros((1, 1, 256, 256))}),
        (
            "by query and key",
            "bfloat16",
            64,
            {"mask": jnp.ones((1, 1, 256, 256), bool)},
        ),
    ],
)
def test_what_is_not_served_says_why(reason, dtype, size, options):
    args = structs(shapes(1, 256, 1, size), dtype)
    call = functools.partial(SOFTMAX, implementation="pallas", **options)
    with pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(call, *args)


def test_blocks_that_are_not_served_say_why():
    lists = BlockMask.from_mask(masks.Causal(), 256, 256, block_size=(64, 64))
    call = functools.partial(
        attnx.block_sparse_attention, block_mask=lists, implementation="pallas"
    )
    with pytest.raises(NotImplementedError, match="multiples of 128"):
        jax.eval_shape(call, *structs(shapes(1, 256, 1, 64), "bfloat16"))


def test_explain_says_where_the_kernels_run():
    args = structs(shapes(1, 256, 1, 64), "bfloat16")
    (decision,) = attnx.explain(SOFTMAX, *args).decisions
    assert decision.runs == "pallas on CUDA, xla elsewhere"


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("implementation", ["pallas", DETERMINISTIC], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_matches_the_reference_on_a_gpu(name, implementation):
    assert_matches_the_reference(name, implementation)


def test_a_query_that_sees_nothing_gives_nothing():
    args = normal(0, *shapes(1, 128, 1, 32), dtype="bfloat16")
    call = functools.partial(
        SOFTMAX,
        mask=masks.Causal() & ~masks.Prefix(40),
        implementation="pallas",
        return_residual=True,
    )
    with mosaic.interpret():
        out, lse = jax.jit(call)(*args)
    np.testing.assert_array_equal(out[:, :40], 0)
    np.testing.assert_array_equal(lse[:, :40], -np.inf)
    assert np.isfinite(lse[:, 40:]).all()
