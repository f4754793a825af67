"""Neighborhoods in tile order: their lists, and their predicate on a pair of tiles."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import normal
from jax.extend.core import Literal

import attnx
from attnx.softmax.block_mask import BlockMask
from attnx.softmax.neighborhood import (
    TiledNeighborhood,
    from_tiles,
    to_tiles,
    windows,
)
from attnx.softmax.tile_lists import tile_lists, transposed_tile_lists
from attnx.softmax.tile_order import TileOrder

# shape, kernel_size, stride, dilation, is_causal, tile
CASES = [
    ((60,), 7, 1, 1, False, (8,)),
    ((61,), 8, 3, 4, True, (4,)),
    ((9,), 3, 3, 2, True, (1,)),
    ((13, 22), (5, 7), (2, 3), (2, 3), (False, True), (4, 2)),
    ((20, 9), (20, 9), 1, 1, False, (4, 8)),
    ((32, 48), (9, 13), 1, 1, False, (8, 8)),
    ((24, 24), (16, 8), (4, 8), 1, False, (4, 4)),
    ((12, 18), 3, 1, (2, 3), False, (2, 2)),
    ((17, 17), 3, 3, 5, False, (2, 3)),
    ((9, 9), 3, 1, 1, (True, False), (16, 2)),
    ((5, 7, 9), (2, 3, 4), (1, 2, 2), (2, 1, 2), (True, False, False), (2, 2, 4)),
    ((4, 10, 10), (4, 5, 3), 1, 1, False, (2, 1, 4)),
    ((6, 12, 8), (4, 8, 8), (2, 4, 1), 1, False, (2, 4, 2)),
]


def mask_of(case):
    *arguments, tile = case
    return attnx.masks.Neighborhood(*arguments, tile=tile), windows(*arguments), tile


def padding(shape, axes, tile):
    """Which tokens in tile order are padding."""
    real = to_tiles(jnp.ones((1, *shape, 1, 1)), axes, tile)
    return np.asarray(real).ravel() == 0


@pytest.mark.parametrize("case", CASES, ids=str)
def test_lists_are_those_of_the_mask(case):
    mask, axes, tile = mask_of(case)
    tokens, padded = math.prod(tile), padding(case[0], axes, tile)
    got = tile_lists(axes, tile)
    want = BlockMask.from_mask(mask, *[padded.size] * 2, block_size=(tokens, tokens))
    assert (got.query_len, got.key_len) == (padded.size, padded.size)
    assert got.block_size == (tokens, tokens)
    real = ~padded.reshape(-1, tokens).all(-1)
    slots = got.indices.shape[-1]
    for name in ("counts", "partial_counts", "indices"):
        mine, theirs = (np.asarray(getattr(x, name))[:, :, real] for x in (got, want))
        assert mine.dtype == np.int32
        if name == "indices":
            theirs = theirs[..., :slots]
            assert slots == got.counts.max()
        np.testing.assert_array_equal(mine, theirs, name)
    assert not np.asarray(got.counts)[:, :, ~real].any()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_full_tiles_are_seen_whole_and_no_pair_is_missed(case):
    mask, axes, tile = mask_of(case)
    tokens, padded = math.prod(tile), padding(case[0], axes, tile)
    seen = np.asarray(mask.to_dense(padded.size, padded.size)[0, 0])
    blocks = padded.size // tokens
    # Queries of padding do not count: they neither touch a tile nor leave a gap in it.
    pairs = (blocks, tokens, blocks, tokens)
    some = (seen & ~padded[:, None] & ~padded).reshape(pairs).any((1, 3))
    every = (seen & ~padded | padded[:, None]).reshape(pairs).all((1, 3)) & some
    want = np.where(some, np.where(every, 2, 1), 0)
    np.testing.assert_array_equal(tile_lists(axes, tile).tiles()[0, 0], want)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_order_says_which_token_is_where_and_is_undone(case):
    shape, *_, tile = case
    order = TileOrder.of(windows(*case[:-1]), tile)
    tokens = np.asarray(order.places())[0]
    real = tokens >= 0
    assert sorted(tokens[real]) == list(range(math.prod(shape)))
    (x,) = normal(0, (2, math.prod(shape), 3))
    tiled = order.tiled(x)
    np.testing.assert_array_equal(tiled[:, real], x[:, tokens[real]])
    assert not np.any(tiled[:, ~real])
    np.testing.assert_array_equal(order.flat(tiled), x)


def test_tiles_are_counted_across_the_axis_that_windows_cover_least():
    order = TileOrder.of(windows((30, 48, 80), (18, 24, 24)), (2, 16, 4))
    assert [axis.length for axis in order.axes] == [80, 48, 30]
    assert (order.tile, order.in_array) == ((4, 16, 2), (2, 1, 0))
    # A run of tiles of the first column and row goes through time.
    of_tiles = np.asarray(order.places())[0].reshape(-1, 128)
    time, height, width = np.unravel_index(of_tiles[:15], (30, 48, 80))
    assert width.max() < 4
    assert height.max() < 16
    assert time.min(1).tolist() == list(range(0, 30, 2))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_transposed_lists_are_the_transpose(case):
    _, axes, tile = mask_of(case)
    states = np.asarray(tile_lists(axes, tile).tiles())[0, 0]
    indices, counts, partial_counts = (
        np.asarray(x)[0, 0] for x in transposed_tile_lists(axes, tile)
    )
    assert indices.shape[-1] == max(1, counts.max())
    for key, column in enumerate(states.T):
        want = [*np.flatnonzero(column == 1), *np.flatnonzero(column == 2)]
        assert indices[key, : counts[key]].tolist() == want
        assert partial_counts[key] == (column == 1).sum()


def test_lists_of_a_large_volume_are_made_inside_the_program():
    axes, tile = windows((121, 256, 256), 11), (4, 4, 8)
    tiles = 31 * 64 * 32
    make = jax.jit(lambda: tile_lists(axes, tile))
    # But for how long they are, which deals out the tiles: in hexadecimal, two lists.
    assert len(make.lower().as_text()) < 100_000 + 2 * tiles * 8
    lists = make()
    assert lists.indices.shape == (1, 1, tiles, 5 * 5 * 3)
    # As NATTEN's tiles would be visited, by a simulation apart from this library.
    assert abs(lists.counts.mean() - 69.7) < 0.05
    last = np.asarray(lists.indices[0, 0, -1, : int(lists.counts[0, 0, -1])])
    assert sorted(last)[-1] == 31 * 64 * 32 - 1


@pytest.mark.parametrize("case", CASES, ids=str)
def test_predicate_on_a_pair_of_tiles(case):
    *arguments, tile = case
    plain = attnx.masks.Neighborhood(*arguments, tile=tile)
    tiled = TiledNeighborhood(*arguments, tile=tile)
    tokens = math.prod(tile)
    size = padding(case[0], windows(*arguments), tile).size
    starts, inside = np.arange(0, size, tokens), np.arange(tokens)
    queries = (starts[:, None, None], inside[:, None])

    @jax.jit
    @jax.vmap
    def at(key_start):
        return tiled.at(0, 0, *queries, key_start, inside)

    got = np.asarray(at(starts)).transpose(1, 2, 0, 3).reshape(size, size)
    np.testing.assert_array_equal(got, plain.to_dense(size, size)[0, 0])


# A kernel evaluates these alone.
KERNELS_HAVE = {
    *("add", "sub", "mul", "div", "rem", "max", "min", "sign"),
    *("and", "or", "not", "xor", "eq", "ne", "lt", "le", "gt", "ge", "select_n"),
    *("shift_left", "shift_right_arithmetic", "convert_element_type"),
    "broadcast_in_dim",
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_predicate_is_traced_to_what_kernels_have(case):
    mask = TiledNeighborhood(*case[:-1], tile=case[-1])
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    for combined in (mask, ~mask, mask & attnx.masks.Causal(), mask | mask):
        jaxpr = jax.make_jaxpr(combined.at)(*[scalar] * 6).jaxpr
        assert set(primitives(jaxpr)) <= KERNELS_HAVE


def test_a_pair_costs_an_and_and_a_comparison():
    mask = TiledNeighborhood((20, 40, 40), (5, 9, 11), 2, 2, tile=(4, 4, 8))
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    jaxpr = jax.make_jaxpr(mask.at)(*[scalar] * 6).jaxpr
    _, _, _, row, _, column = jaxpr.invars
    on = {row: {"row"}, column: {"column"}}
    pairs = []
    for eqn in jaxpr.eqns:
        inputs = [x for x in eqn.invars if not isinstance(x, Literal)]
        both = set().union(*(on.get(x, set()) for x in inputs))
        on |= dict.fromkeys(eqn.outvars, both)
        if len(both) == 2:
            pairs.append(eqn.primitive.name)
    assert pairs == ["and", "eq"]


@pytest.mark.usefixtures("float64")
def test_indices_stay_int32():
    mask = TiledNeighborhood((13, 22), (5, 7), 3, 2, tile=(4, 2))
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    jaxpr = jax.make_jaxpr(mask.at)(*[scalar] * 6).jaxpr
    dtypes = {x.aval.dtype for eqn in jaxpr.eqns for x in eqn.outvars}
    assert dtypes == {np.dtype(bool), np.dtype(np.int32)}
    lists = tile_lists(mask.axes, mask.tile)
    assert lists.indices.dtype == lists.counts.dtype == jnp.int32


def primitives(jaxpr):
    for eqn in jaxpr.eqns:
        inner = eqn.params.get("jaxpr")
        if inner is None:
            yield eqn.primitive.name
        else:
            yield from primitives(inner.jaxpr)


def test_masks_combine_on_pairs_of_tiles():
    tiled = TiledNeighborhood((16, 16), 5, tile=(4, 4))
    other = attnx.masks.from_fn(lambda batch, head, query, key: (query + key) % 3 == 0)
    mask = (tiled | ~other) & ~attnx.masks.Causal()
    inside = np.arange(16)
    got = mask.at(0, 0, 32, inside[:, None], 48, inside)
    want = mask.to_dense(256, 256)[0, 0, 32:48, 48:64]
    np.testing.assert_array_equal(got.reshape(16, 16), want)


def test_attention_over_tile_lists():
    shape, kernel_size, tile = (10, 21), (5, 7), (4, 8)
    axes = windows(shape, kernel_size, dilation=2)
    arrays = normal(0, *[(2, *shape, 2, 8)] * 3)
    got = attnx.dot_product_attention(
        *(to_tiles(x, axes, tile) for x in arrays), mask=tile_lists(axes, tile)
    )
    want = attnx.neighborhood_attention(
        *arrays, kernel_size=kernel_size, dilation=2, implementation="reference"
    )
    np.testing.assert_allclose(from_tiles(got, axes, tile), want, atol=1e-5)
