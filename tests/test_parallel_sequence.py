"""Sequences cut over devices: the same outputs and gradients as on one."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import normal, relative_rms
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_parallel import collectives

import attnx
from attnx import cache, masks, parallel
from attnx.parallel.halo import reach
from attnx.softmax.masks import Dense
from attnx.softmax.neighborhood import windows

# Pieces of 13 tokens, or of twice 13 in zig-zag: no multiple of any block.
B, T, N, K, H, V, PIECES = 2, 104, 4, 4, 16, 24, 4
# A document of one token, one that ends with a piece, one over three pieces.
IDS = np.repeat(np.arange(5), [30, 1, 8, 13, 52])
IDS = np.stack([IDS, IDS[::-1] + 7])
QUERY, KEY, VALUE = normal(0, (B, T, N, H), (B, T, K, H), (B, T, K, V))
CAUSAL_PACKED = masks.Causal() & masks.Segments(IDS)
BY_HEAD = masks.from_fn(lambda batch, head, query, key: (key % 7 == head) & (batch < 1))
MESH_SHAPE = (2, PIECES)
TOKENS = P("data", "context")
RING, ULYSSES = parallel.ring_attention, parallel.ulysses_attention


def make_mesh(kind=AxisType.Auto):
    return jax.make_mesh(MESH_SHAPE, ("data", "context"), (kind, kind))


def cut(fn, spec=TOKENS):
    return parallel.sharded(fn, sharding=NamedSharding(make_mesh(), spec))


def assert_same(fn, one_device, arrays, output_error=2e-6, gradient_error=5e-6):
    """Outputs and all gradients of two functions; returns the compiled program."""

    def loss(fn, *arrays):
        outputs = jax.tree.leaves(fn(*arrays))
        weights = [
            np.random.default_rng(i).standard_normal(x.shape)
            for i, x in enumerate(outputs)
        ]
        finite = [jnp.where(jnp.isfinite(x), x, 0) for x in outputs]
        return sum((x * w).sum() for x, w in zip(finite, weights, strict=True)), outputs

    def run(fn):
        every = tuple(range(len(arrays)))
        grad = jax.value_and_grad(functools.partial(loss, fn), every, has_aux=True)
        compiled = jax.jit(grad).lower(*arrays).compile()
        (_, outputs), grads = compiled(*arrays)
        return compiled, outputs, grads

    compiled, outputs, grads = run(fn)
    _, wanted, wanted_grads = run(one_device)
    for got, want in zip(outputs, wanted, strict=True):
        assert relative_rms(got, want) <= output_error
    for got, want in zip(grads, wanted_grads, strict=True):
        assert relative_rms(got, want) <= gradient_error
    return compiled


SOFTMAX = {
    "causal": (None, {"is_causal": True, "scale": 0.1}),
    "any": (
        masks.Causal() & (masks.Window(20, 0) | BY_HEAD)
        | masks.Prefix(np.array([3, 9])) & ~masks.Segments(IDS),
        {},
    ),
    # Half of the second row's queries see nothing.
    "lengths": (masks.Lengths(np.array([T, 47]), np.array([40, T])), {}),
}


@pytest.mark.parametrize(
    ("fn", "case"),
    [*((RING, case) for case in SOFTMAX), (ULYSSES, "any"), (ULYSSES, "causal")],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_softmax(fn, case):
    mask, options = SOFTMAX[case]
    options = {"mask": mask, "return_residual": True, **options}
    compiled = assert_same(
        functools.partial(cut(fn), **options),
        functools.partial(attnx.dot_product_attention, **options),
        (QUERY, KEY, VALUE),
    )
    kinds = {RING: {"collective-permute"}, ULYSSES: {"all-to-all", "all-gather"}}[fn]
    # The loss is summed over devices.
    assert set(collectives(compiled)) <= {*kinds, "all-reduce"}


def test_zigzag():
    mask = masks.Causal() & masks.Segments(parallel.to_zigzag(IDS, PIECES))

    def in_zigzag(*tokens):
        tokens = (parallel.to_zigzag(x, PIECES) for x in tokens)
        out = cut(RING)(*tokens, mask=mask, order="zigzag", return_residual=True)
        return jax.tree.map(lambda x: parallel.from_zigzag(x, PIECES), out)

    one_device = functools.partial(
        attnx.dot_product_attention, mask=CAUSAL_PACKED, return_residual=True
    )
    assert_same(in_zigzag, one_device, (QUERY, KEY, VALUE))


def test_half_precision_is_that_of_one_device():
    tokens = [x.astype(jnp.bfloat16) for x in (QUERY, KEY, VALUE)]
    want = attnx.dot_product_attention(QUERY, KEY, VALUE, is_causal=True)
    got = cut(RING)(*tokens, is_causal=True)
    assert got.dtype == jnp.bfloat16
    assert relative_rms(got, want) <= 8e-3


DECAYS = {"none": None, "head": (N,), "token": (B, T, N), "channel": (B, T, N, H)}
LINEAR = [
    ("none", {}),
    ("head", {"segment_ids": IDS}),
    ("token", {"segment_ids": IDS, "reverse": True}),
    ("channel", {"segment_ids": IDS}),
    ("token", {"normalize": True}),
]


@pytest.mark.parametrize(("decay", "options"), LINEAR)
def test_linear(decay, options):
    normalize = options.get("normalize", False)
    arrays = [QUERY, KEY, VALUE, *normal(1, (B, N, H, V + normalize))]
    arrays += normal(2, DECAYS[decay]) if DECAYS[decay] else []

    def call(fn, query, key, value, state, log_decay=None):
        if normalize:
            query, key, state = jnp.exp(query / 4), jnp.exp(key / 4), abs(state)
        return fn(
            query,
            key,
            value,
            initial_state=state,
            log_decay=None if log_decay is None else -abs(log_decay) / 4,
            return_state=True,
            **options,
        )

    assert_same(
        functools.partial(call, cut(parallel.linear_attention)),
        functools.partial(call, attnx.linear_attention),
        arrays,
    )


def test_what_linear_attention_sends_does_not_grow():
    def sent(length):
        tokens = [jax.ShapeDtypeStruct((B, length, N, H), jnp.float32)] * 3
        run = jax.jit(cut(parallel.linear_attention))
        text = run.lower(*tokens).compile().as_text()
        return [
            line.split(" all-gather(")[0].split("=")[1]
            for line in text.splitlines()
            if " all-gather(" in line
        ]

    # One row a device, of four heads' states and decays.
    assert sent(64) == sent(256)
    assert len(sent(64)) == 1
    assert f"f32[{PIECES},1,{N},{H},{H + 1}]" in sent(64)[0]


SPACES = {
    "1-D": ((104,), {"kernel_size": 9}),
    "wider than a piece": (
        (104,),
        {"kernel_size": 31, "dilation": 3, "stride": 4, "is_causal": True},
    ),
    "3-D": ((8, 3, 4), {"kernel_size": (3, 2, 3), "dilation": (2, 1, 1)}),
}


@pytest.mark.parametrize("case", SPACES)
def test_neighborhood(case):
    space, options = SPACES[case]
    options = {"return_residual": True, **options}
    arrays = normal(3, *((B, *space, heads, H) for heads in (N, 2, 2)))
    extra = normal(4, (B, 3, 2, H)) if case == "3-D" else ()

    def call(fn, query, key, value, extra=None):
        more = {} if extra is None else {"extra_key": extra, "extra_value": extra}
        return fn(query, key, value, **more, **options)

    assert_same(
        functools.partial(call, cut(parallel.neighborhood_attention)),
        functools.partial(call, attnx.neighborhood_attention),
        (*arrays, *extra),
    )


def test_a_halo_is_no_larger_than_windows_ask():
    def halo(length, **options):
        return reach(windows((length,), **options)[0], 4)

    assert halo(400, kernel_size=9) == (4, 4)
    assert halo(400, kernel_size=9, is_causal=True) == (8, 0)
    assert halo(400, kernel_size=9, dilation=3) == (12, 12)
    # The last of the last piece see as many keys as the others: all before them.
    assert halo(8, kernel_size=7) == (5, 5)


def caches(capacity=64):
    """The same tokens appended to a cache that is cut and to one that is not."""
    tokens = normal(5, (2, 45, 2, H), (2, 45, 2, V))
    held = one = attnx.KVCache.create(2, capacity, 2, H, value_size=V)
    append = jax.jit(cut(parallel.append))
    for part in (slice(0, 45), slice(7, 10)):
        key, value = (x[:, part] for x in tokens)
        held, one = append(held, key, value), one.append(key, value)
    return held, one


def test_a_cache_is_spread_over_devices_and_decoded_with_one_merge():
    held, one = caches()
    chex.assert_trees_all_equal(held, one)
    assert held.key.sharding.spec == TOKENS
    (query,) = normal(6, (2, 3, 4, H))
    mask = masks.Causal() & (masks.Window(30, 0) | masks.Prefix(2))
    options = {"mask": mask, "return_residual": True}
    decode = cut(parallel.decode_attention)
    run = jax.jit(lambda query, *cache: decode(query, *cache, **options))
    compiled = run.lower(query, *held).compile()
    want = attnx.decode_attention(query, *one, **options)
    for x, y in zip(compiled(query, *held), want, strict=True):
        assert relative_rms(x, y) <= 2e-6
    assert collectives(compiled) == ["all-gather"]


def test_segments_of_a_sparse_cache_on_devices():
    _, one = caches()
    (query,) = normal(6, (2, 1, 4, H))
    # Slots in any order, on any device.
    order = np.random.default_rng(0).permutation(64)
    whole = cache.SparseCache.of(one)
    mixed = whole._replace(
        **{
            name: getattr(whole, name)[:, :, order]
            for name in ("key", "value", "positions")
        }
    )
    decode = cut(parallel.dist_attention, P("data", None, "context"))
    assert (
        relative_rms(decode(query, mixed), attnx.decode_attention(query, *one)) <= 2e-6
    )


def test_explicit_axes_say_how_tokens_are_cut():
    mesh = make_mesh(AxisType.Explicit)
    with jax.set_mesh(mesh):
        tokens = [jax.device_put(x, TOKENS) for x in (QUERY, KEY, VALUE)]
        out = jax.jit(parallel.sharded(RING))(*tokens, mask=CAUSAL_PACKED)
        assert out.sharding.spec[:2] == ("data", "context")
    want = attnx.dot_product_attention(QUERY, KEY, VALUE, mask=CAUSAL_PACKED)
    assert relative_rms(out, want) <= 2e-6


def test_inside_of_shard_map_with_its_checks():
    """Two mesh axes as one ring, gradients too."""
    axes = ("data", "context")
    spec = P(None, axes)

    def grads(fn):
        loss = lambda *tokens: jnp.sin(fn(*tokens)).sum()
        return jax.jit(jax.grad(loss, (0, 1, 2)))(QUERY, KEY, VALUE)

    ring = functools.partial(RING, axis_name=axes, is_causal=True)
    ring = jax.shard_map(ring, mesh=make_mesh(), in_specs=spec, out_specs=spec)
    want = grads(functools.partial(attnx.dot_product_attention, is_causal=True))
    for got, x in zip(grads(ring), want, strict=True):
        assert relative_rms(got, x) <= 5e-6


DENSE = Dense(np.ones((1, 1, T, T), bool))
SMALL = tuple(x[:, :102] for x in (QUERY, KEY, VALUE))
ALL = (QUERY, KEY, VALUE)
BAD = {
    "does not divide": (
        RING,
        SMALL,
        {},
        r"mesh axis 'context' \(4\) along axis 1, got 102",
    ),
    "dense": (RING, ALL, {"mask": DENSE}, "mask: .*cut along the tokens.*, got Dense"),
    "inside": (
        ULYSSES,
        ALL,
        {"mask": masks.Causal() & ~masks.Offset(masks.Segments(IDS))},
        "mask: .* got Segments",
    ),
    "lists": (
        RING,
        ALL,
        {"mask": attnx.BlockMask.from_mask(masks.Causal(), T, T)},
        "mask: expected a Mask, got BlockMask",
    ),
    "order": (
        RING,
        ALL,
        {"order": "striped"},
        "order: expected one of .* got 'striped'",
    ),
    "odd pieces": (RING, ALL, {"order": "zigzag"}, "query: expected a multiple of 2"),
    "heads": (
        ULYSSES,
        (QUERY, KEY[:, :, :2], VALUE[:, :, :2]),
        {},
        "key: expected a number of heads that is a multiple of 'context', 4, got 2",
    ),
    "kernel": (
        parallel.neighborhood_attention,
        ALL,
        {"kernel_size": 200},
        "kernel_size",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_calls_are_named(case):
    fn, arrays, options, message = BAD[case]
    if case == "odd pieces":
        arrays = [x[:, :52] for x in arrays]
    with pytest.raises(ValueError, match=message):
        cut(fn)(*arrays, **options)


def test_an_axis_that_there_is_not():
    with pytest.raises(ValueError, match="axis_name: expected one of the axes"):
        parallel.linear_attention(QUERY, KEY, VALUE, "context")
    with pytest.raises(ValueError, match=r"x: expected a multiple of 8 tokens, got 6"):
        parallel.to_zigzag(QUERY[:, :6], 4)
