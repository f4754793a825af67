"""neighborhood_attention: NATTEN's windows exactly, in 1, 2 and 3 dimensions."""

import itertools
import json
import math
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_matches, normal, relative_rms
from hypothesis import given
from hypothesis import strategies as st

import attnx
from attnx.softmax.mask import Tiles
from attnx.softmax.neighborhood import from_tiles, to_tiles, windows

# Masks and outputs of NATTEN 0.21.7 itself; `meta` says how the inputs are made.
GOLDEN = json.loads(
    (pathlib.Path(__file__).parent / "data/neighborhood_golden.json").read_text()
)["cases"]
IMPLEMENTATIONS = ("reference", "xla")

# shape, kernel_size, stride, dilation, is_causal
CASES = [
    ((60,), 7, 1, 1, False),
    ((61,), 8, 3, 4, True),
    ((13, 22), (5, 7), (2, 3), (2, 3), (False, True)),
    ((20, 9), (20, 9), 1, 1, False),
    ((17, 17), 3, 3, 5, False),
    ((5, 7, 9), (2, 3, 4), (1, 2, 2), (2, 1, 2), (True, False, False)),
    ((4, 10, 10), (4, 3, 3), 1, 1, False),
]


def options(case):
    return dict(
        zip(("kernel_size", "stride", "dilation", "is_causal"), case, strict=True)
    )


def attention(implementation, **kwargs):
    def fn(query, key, value, *extra):
        extra = dict(zip(("extra_key", "extra_value"), extra, strict=False))
        return attnx.neighborhood_attention(
            query,
            key,
            value,
            implementation=implementation,
            return_residual=True,
            **extra,
            **kwargs,
        )

    return fn


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])
def test_masks_are_nattens(case):
    tokens = math.prod(case["shape"])
    mask = attnx.masks.Neighborhood(tuple(case["shape"]), **golden_options(case))
    seen = mask.to_dense(tokens, tokens)[0, 0]
    np.testing.assert_array_equal(seen, np.array(case["mask"], bool))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])
def test_outputs_are_nattens(case, implementation):
    shape = (1, *case["shape"], 2, 8)
    n = np.arange(math.prod(shape)).reshape(shape)
    m = np.arange(48).reshape(1, 3, 2, 8)
    arrays = (np.sin(0.37 * n + 0.1), np.cos(0.23 * n), np.sin(0.11 * n + 0.5))
    extra = (np.cos(0.31 * m + 0.2), np.sin(0.17 * m + 0.3))
    arrays, extra = ([x.astype(np.float32) for x in group] for group in (arrays, extra))
    fn = attention(implementation, **golden_options(case))
    for inputs, suffix in ((arrays, ""), ([*arrays, *extra], "_additional")):
        out, lse = fn(*map(jnp.asarray, inputs))
        # The file keeps six decimals.
        np.testing.assert_allclose(out.ravel(), case["out" + suffix], atol=2e-6)
        np.testing.assert_allclose(lse.ravel(), case["lse" + suffix], atol=2e-6)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_xla_matches_the_reference(case):
    shape, *rest = case
    arrays = normal(0, (2, *shape, 4, 8), (2, *shape, 2, 8), (2, *shape, 2, 12))
    kwargs = options(rest)
    assert_matches(attention("xla", **kwargs), attention("reference", **kwargs), arrays)


def test_extra_keys_and_their_gradients():
    shape = (9, 10)
    arrays = normal(1, *[(2, *shape, 2, 8)] * 3, (2, 5, 2, 8), (2, 5, 2, 8))
    kwargs = {"kernel_size": 3, "dilation": (3, 2), "scale": 0.4}
    assert_matches(attention("xla", **kwargs), attention("reference", **kwargs), arrays)


def test_half_precision():
    arrays = normal(2, *[(2, 12, 16, 2, 32)] * 3, dtype=jnp.bfloat16)
    kwargs = {"kernel_size": 5}
    assert_matches(attention("xla", **kwargs), attention("reference", **kwargs), arrays)


@given(length=st.integers(2, 30), kernel=st.integers(1, 30), data=st.data())
def test_windows_by_their_definition(length, kernel, data):
    kernel = min(kernel, length)
    dilation = data.draw(st.integers(1, length // kernel))
    stride = data.draw(st.integers(1, kernel))
    causal = data.draw(st.booleans())
    mask = attnx.masks.Neighborhood((length,), kernel, stride, dilation, causal)
    seen = np.asarray(mask.to_dense(length, length)[0, 0])
    for i in range(length):
        group = [j for j in range(length) if j % dilation == i % dilation]
        place = group.index(i)
        first = place // stride * stride
        if causal:
            leader = min(first + stride - 1, len(group) - 1)
            want = group[max(leader - kernel + 1, 0) : place + 1]
        else:
            leader = min(first + stride // 2, len(group) - 1)
            start = min(max(leader - kernel // 2, 0), len(group) - kernel)
            want = group[start : start + kernel]
        assert np.flatnonzero(seen[i]).tolist() == want


@pytest.mark.parametrize("tile", [None, (4, 3), (1, 5), (8, 8)])
@pytest.mark.parametrize("block_size", [None, (7, 10)])
def test_bounds_never_miss_a_pair(tile, block_size):
    shape, *rest = ((13, 22), (5, 7), (2, 3), (2, 3), (False, True))
    axes = windows(shape, *rest)
    mask = attnx.masks.Neighborhood(shape, *rest, tile=tile)
    index = np.arange(math.prod(shape)).reshape(1, *shape, 1, 1)
    if tile is not None:
        index = to_tiles(jnp.asarray(index) + 1, axes, tile) - 1
    tokens = index.size
    seen = np.asarray(mask.to_dense(tokens, tokens)[0, 0])
    block_size = block_size or (math.prod(tile or (1, 22)),) * 2
    grid = Tiles.grid(tokens, tokens, block_size)
    some, every = (np.asarray(x) for x in mask.bounds(grid))
    real = index.ravel() >= 0
    for i, j in itertools.product(range(some.shape[2]), range(some.shape[3])):
        rows = np.arange(i * block_size[0], min((i + 1) * block_size[0], tokens))
        columns = np.arange(j * block_size[1], min((j + 1) * block_size[1], tokens))
        pairs = seen[np.ix_(rows[real[rows]], columns)]
        assert some[0, 0, i, j] >= pairs.any()
        assert every[0, 0, i, j] <= pairs.all()


def test_whole_tiles_are_bounded_exactly():
    axes = windows((32, 48), (9, 13))
    mask = attnx.masks.Neighborhood((32, 48), (9, 13), tile=(8, 8))
    some, every = (x[0, 0] for x in mask.bounds(Tiles.grid(1536, 1536, (64, 64))))
    seen = np.asarray(mask.to_dense(1536, 1536)[0, 0]).reshape(24, 64, 24, 64)
    np.testing.assert_array_equal(some, seen.any((1, 3)))
    np.testing.assert_array_equal(every, seen.all((1, 3)))
    assert len(axes) == 2


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tile_order_is_undone(case):
    shape, *rest = case
    axes = windows(shape, *rest)
    (x,) = normal(3, (2, *shape, 3, 4))
    tile = (4, 3, 2)[: len(shape)]
    tiled = to_tiles(x, axes, tile)
    chex.assert_trees_all_equal(from_tiles(tiled, axes, tile), x)
    assert tiled.shape[1] % math.prod(tile) == 0


def test_whole_axes_are_dense_attention():
    query, key, value = normal(4, *[(1, 6, 7, 2, 8)] * 3)
    got = attnx.neighborhood_attention(query, key, value, kernel_size=(6, 7))
    flat = [x.reshape(1, 42, 2, 8) for x in (query, key, value)]
    want = jax.nn.dot_product_attention(*flat).reshape(got.shape)
    assert relative_rms(got, want) < 1e-6


def test_causal_line_is_a_causal_window():
    query, key, value = normal(5, *[(1, 50, 2, 8)] * 3)
    got = attnx.neighborhood_attention(query, key, value, kernel_size=9, is_causal=True)
    want = jax.nn.dot_product_attention(
        query, key, value, is_causal=True, local_window_size=(8, 0)
    )
    assert relative_rms(got, want) < 1e-6


X = jnp.zeros((1, 8, 10, 2, 4))
BAD = {
    "rank": ((X[:, 0, 0],) * 3, {"kernel_size": 3}, r"query: expected \[B, \*space"),
    "space": ((X, X[:, :7], X), {"kernel_size": 3}, r"key: expected query's space"),
    "kernel": ((X,) * 3, {"kernel_size": 9}, r"kernel_size \* dilation: expected at"),
    "none": ((X,) * 3, {"kernel_size": 0}, "kernel_size: expected at least 1"),
    "dilated": ((X,) * 3, {"kernel_size": 3, "dilation": (3, 1)}, "at most the axis"),
    "stride": ((X,) * 3, {"kernel_size": 3, "stride": (1, 4)}, "stride: expected 1 to"),
    "axes": ((X,) * 3, {"kernel_size": (3, 3, 3)}, "kernel_size: expected one value"),
    "floats": ((X,) * 3, {"kernel_size": 3.0}, "kernel_size: expected Python integers"),
    "heads": ((X, X[..., :1, :], X), {"kernel_size": 3}, "value: expected shape"),
    "one extra": (
        (X,) * 3,
        {"kernel_size": 3, "extra_key": X[:, 0]},
        "extra_value: expected both",
    ),
    "extra": (
        (X,) * 3,
        {"kernel_size": 3, "extra_key": X[:, 0, :, :1], "extra_value": X[:, 0]},
        r"extra_key: expected \(1, E, 2, 4\)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    args, kwargs, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        attnx.neighborhood_attention(*args, **kwargs)


def golden_options(case):
    names = ("kernel_size", "stride", "dilation", "is_causal")
    return {name: tuple(case[name]) for name in names}
