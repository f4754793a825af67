"""Every function under a mesh whose axes cut the batch and the heads."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import normal, relative_rms
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import attnx
from attnx import cache, masks, parallel

B, T, N, K, H, V = 4, 26, 4, 2, 16, 24
# Documents, others in each row.
IDS = np.sort(np.random.default_rng(0).integers(0, 4, (B, T)), 1)
LENGTHS = np.array([26, 9, 1, 20])
WINDOWS = np.array([3, 5, 26, 0])
QUERY, KEY, VALUE, ROUTER = normal(
    0, (B, T, N, H), (B, T, K, H), (B, T, K, V), (B, T, N, H)
)
STATE, DECAY, BIAS, CENTROIDS = normal(
    1, (B, N, H, V), (B, T, N), (1, N, T, T), (N, 3, H)
)
VIDEO = tuple(x.reshape(B, 2, 13, *x.shape[2:]) for x in (QUERY, KEY, VALUE))
BY_HEAD = masks.from_fn(lambda batch, head, query, key: (key + batch) % (head + 2) == 0)
LISTS = attnx.BlockMask.from_mask(
    masks.Causal() & BY_HEAD | masks.Prefix(2),
    *(T, T),
    block_size=(8, 8),
    batch=B,
    heads=N,
)

WHOLE, ROWS, HEADS = P(), P("data"), P("model")
TOKENS, SPACE, STATES = (
    P("data", None, "model"),
    P("data", None, None, "model"),
    P("data", "model"),
)
QKV, QKV_SPACE = (TOKENS,) * 3, (SPACE,) * 3


def with_masks(fn):
    """What differs between rows and between heads, in every way that a mask knows."""

    def call(query, key, value, ids, lengths, windows, bias):
        mask = masks.Window(windows, None) | masks.Prefix(lengths // 4)
        mask &= masks.Offset(masks.Causal() | BY_HEAD, query=lengths // 8)
        mask = mask & masks.Segments(ids) | masks.Lengths(None, lengths // 9)
        return fn(query, key, value, bias, mask, return_residual=True)

    return call


def with_extra(fn):
    def call(query, key, value, extra_key, extra_value):
        extra = {"extra_key": extra_key, "extra_value": extra_value}
        return fn(query, key, value, kernel_size=(2, 5), **extra)

    return call


def with_state(fn):
    def call(query, key, value, log_decay, initial_state, segment_ids):
        return fn(
            query,
            key,
            value,
            log_decay=-abs(log_decay),
            initial_state=initial_state,
            segment_ids=segment_ids,
            return_state=True,
        )

    return call


def of_parts(fn):
    return lambda a, b: fn((a, b), (a[..., 0], b[..., 0]))


def one_token(fn):
    return lambda *arrays: fn(*arrays[:4], log_decay=-abs(arrays[4]))


def packed(fn):
    return lambda *arrays: fn(*arrays[:3], segment_ids=arrays[3], block_size=4, top_k=2)


def sparse(fn):
    def call(query, *arrays):
        return fn(query, cache.SparseCache.of(attnx.KVCache(*arrays)))

    return call


def segments(fn):
    def call(query, *arrays):
        held = cache.SparseCache.of(attnx.KVCache(*arrays))
        return fn(query, held.split((20, 6)))

    return call


def options(**values):
    return lambda fn: functools.partial(fn, **values)


# How each is called, on what, cut how: the leading array's is the first.
CASES = {
    attnx.dot_product_attention: (
        with_masks,
        (QUERY, KEY, VALUE, IDS, LENGTHS, WINDOWS, BIAS),
        (*QKV, ROWS, ROWS, HEADS, P(None, "model")),
    ),
    attnx.block_sparse_attention: (
        options(return_residual=True),
        (QUERY, KEY, VALUE, LISTS),
        (*QKV, WHOLE),
    ),
    attnx.neighborhood_attention: (
        with_extra,
        (*VIDEO, KEY[:, :3], VALUE[:, :3]),
        (*QKV_SPACE, TOKENS, TOKENS),
    ),
    attnx.decode_attention: (
        options(return_residual=True),
        (QUERY[:, :3], KEY, VALUE, LENGTHS),
        (*QKV, ROWS),
    ),
    attnx.merge_attention: (of_parts, (QUERY, ROUTER), (TOKENS, TOKENS)),
    attnx.linear_attention: (
        with_state,
        (QUERY, KEY, VALUE, DECAY, STATE, IDS),
        (*QKV, TOKENS, STATES, ROWS),
    ),
    attnx.linear_attention_step: (
        one_token,
        (STATE, QUERY[:, 0], KEY[:, 0], VALUE[:, 0], DECAY[:, 0]),
        (STATES,) * 5,
    ),
    attnx.moba_attention: (packed, (QUERY, KEY, VALUE, IDS), (*QKV, ROWS)),
    attnx.vmoba_attention: (options(block_size=(1, 13), top_k=1), VIDEO, QKV_SPACE),
    attnx.dhsa_attention: (
        options(max_chunks=9, budget=6),
        (QUERY, KEY, VALUE, np.arange(T)[None] % 4 == 0),
        (*QKV, WHOLE),
    ),
    attnx.hylra_attention: (
        options(block_size=8, top_k=2),
        (QUERY, KEY, VALUE),
        (ROWS,) * 3,
    ),
    attnx.routing_attention: (
        options(cluster_size=9, is_causal=True),
        (QUERY, KEY, VALUE, CENTROIDS),
        (*QKV, HEADS),
    ),
    attnx.superlinear_attention: (
        options(),
        (ROUTER, QUERY, KEY, VALUE),
        (TOKENS, *QKV),
    ),
    cache.sparse_decode_attention: (
        sparse,
        (QUERY[:, :1], KEY, VALUE, LENGTHS),
        (*QKV, ROWS),
    ),
    cache.dist_attention: (
        segments,
        (QUERY[:, :1], KEY, VALUE, LENGTHS),
        (*QKV, ROWS),
    ),
}
ENGINES = (
    attnx.dot_product_attention,
    attnx.neighborhood_attention,
    attnx.decode_attention,
    attnx.linear_attention,
)


def make_mesh(kind):
    kinds = (kind, kind)
    return jax.make_mesh((2, 2), ("data", "model"), kinds, devices=jax.devices()[:4])


def laid_out(mesh, arrays, specs):
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    return [
        jax.tree.map(lambda x, spec=spec: put(x, spec), x)
        for x, spec in zip(arrays, specs, strict=True)
    ]


def collectives(compiled):
    """What communicates in a program, by name."""
    names = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    return re.findall(rf" ({names})(?:-start)?\(", compiled.as_text())


def assert_close(got, want):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative_rms(x, y) <= 2e-6


@pytest.mark.parametrize(
    ("fn", "kind"),
    [
        *((fn, AxisType.Explicit) for fn in CASES),
        *((fn, AxisType.Auto) for fn in (ENGINES[0], ENGINES[-1])),
    ],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_batch_and_heads_are_cut_without_a_word(fn, kind):
    call, arrays, specs = CASES[fn]
    leading = specs[1] if fn is attnx.linear_attention_step else specs[0]
    told = leading if kind == AxisType.Auto else None
    mesh = make_mesh(kind)
    with jax.set_mesh(mesh):
        arguments = laid_out(mesh, arrays, specs)
        run = jax.jit(call(parallel.sharded(fn, sharding=told)))
        compiled = run.lower(*arguments).compile()
        got = compiled(*arguments)
    assert collectives(compiled) == []
    for x in jax.tree.leaves(got)[:2]:
        assert "data" in x.sharding.spec
    assert_close(got, jax.jit(call(fn))(*arrays))


@pytest.mark.parametrize(
    "fn",
    [attnx.dot_product_attention, attnx.linear_attention],
    ids=lambda x: x.__name__,
)
def test_gradients_stay_where_they_are(fn):
    call, arrays, specs = CASES[fn]
    floats = arrays[:3]
    mesh = make_mesh(AxisType.Explicit)

    def grads(fn):
        def loss(*tokens):
            out, more = call(fn)(*tokens, *arrays[3:])
            return jnp.sin(out).sum() + jnp.where(jnp.isfinite(more), more, 0).sum()

        return jax.jit(jax.grad(loss, (0, 1, 2)))

    with jax.set_mesh(mesh):
        arguments = laid_out(mesh, floats, specs[:3])
        compiled = grads(parallel.sharded(fn)).lower(*arguments).compile()
        got = compiled(*arguments)
    assert collectives(compiled) == []
    assert [x.sharding.spec[0] for x in got] == ["data"] * 3
    assert_close(got, grads(fn)(*floats))


@pytest.mark.parametrize("fn", ENGINES, ids=lambda x: x.__name__)
def test_inside_of_shard_map_functions_are_called_as_they_are(fn):
    """Also under the checks of `jax.shard_map`, gradients too."""
    call, arrays, specs = CASES[fn]
    if fn is attnx.dot_product_attention:  # A mask would count from its own part.
        call = lambda fn: lambda q, k, v, ids, *_: fn(q, k, v, mask=masks.Segments(ids))
    mesh = make_mesh(AxisType.Auto)

    def grads(fn, wrap):
        def loss(*tokens):
            first = lambda *a: jax.tree.leaves(call(fn)(*a))[0]
            return jnp.sin(wrap(first)(*tokens, *arrays[3:])).sum()

        return jax.jit(jax.grad(loss, (0, 1, 2)))

    inside = functools.partial(
        jax.shard_map, mesh=mesh, in_specs=specs, out_specs=specs[0]
    )
    got = grads(parallel.sharded(fn), inside)(*arrays[:3])
    assert_close(got, grads(fn, lambda fn: fn)(*arrays[:3]))


def test_shared_keys_serve_the_heads_of_all_devices():
    key, value = KEY[:, :, :1], VALUE[:, :, :1]
    mesh = make_mesh(AxisType.Explicit)
    with jax.set_mesh(mesh):
        arguments = laid_out(mesh, (QUERY, key, value), (TOKENS, ROWS, ROWS))
        run = jax.jit(parallel.sharded(attnx.dot_product_attention))
        compiled = run.lower(*arguments).compile()
        got = compiled(*arguments)
    assert collectives(compiled) == []
    assert_close(got, attnx.dot_product_attention(QUERY, key, value))


def test_without_a_mesh_there_is_nothing_to_do():
    attend = parallel.sharded(attnx.dot_product_attention)
    chex.assert_trees_all_equal(
        attend(QUERY, KEY, VALUE), attnx.dot_product_attention(QUERY, KEY, VALUE)
    )


def attend(sharding, query=QUERY, key=KEY, fn=attnx.dot_product_attention, **options):
    mesh = make_mesh(AxisType.Auto)
    with jax.set_mesh(mesh):
        value = key[..., :H]
        return parallel.sharded(fn, sharding=sharding)(query, key, value, **options)


LAYER = {"scope": "layer", "block_size": (1, 13)}
BAD = {
    "unknown function": (
        lambda: parallel.sharded(jnp.sin),
        "fn: expected one of attnx",
    ),
    "no sharding": (lambda: attend(None), r"\['data', 'model'\] being Auto"),
    "no such axis": (lambda: attend(P("batch")), r"sharding: .*'model'\), got 'batch'"),
    "does not divide": (
        lambda: attend(P("data"), QUERY[:3], KEY[:3]),
        r"expected a multiple of mesh axis 'data' \(2\) along axis 0, got 3",
    ),
    "key heads": (
        lambda: attend(P(None, None, ("data", "model"))),
        r"key: expected a multiple of mesh axis \('data', 'model'\) \(4\) along axis 2",
    ),
    "tokens": (lambda: attend(P(None, "data")), "query: expected a sharding of batch"),
    "size": (lambda: attend(P(None, None, None, "model")), "of batch and heads alone"),
    "rank": (lambda: attend(P(*[None] * 5)), "sharding: expected at most 4 entries"),
    "heads that compete": (
        lambda: attend(SPACE, *VIDEO[:2], attnx.vmoba_attention, **LAYER),
        "query: expected a sharding of batch alone",
    ),
    "whole tokens": (
        lambda: attend(P("data"), fn=parallel.ring_attention),
        "sharding: expected query's tokens cut over a mesh axis",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_calls_are_named(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_what_would_have_to_be_gathered_is_refused():
    mesh = make_mesh(AxisType.Explicit)
    with jax.set_mesh(mesh):
        arrays = laid_out(mesh, (QUERY, KEY, VALUE), (ROWS, TOKENS, ROWS))
        with pytest.raises(ValueError, match="key: expected sharding"):
            parallel.sharded(attnx.dot_product_attention)(*arrays)
