"""Block lists and attention over them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_matches, normal
from hypothesis import given
from hypothesis import strategies as st

import attnx
from attnx import BlockMask, masks

B, T, S, N, K, H = 2, 70, 90, 4, 2, 16
BLOCK = (16, 32)
GRID = (5, 3)
RANDOM = np.random.default_rng(1)


def arrays():
    return normal(0, (B, T, N, H), (B, S, K, H), (B, S, K, H))


def attention(implementation, block_mask):
    def fn(query, key, value):
        return attnx.block_sparse_attention(
            query,
            key,
            value,
            block_mask,
            implementation=implementation,
            return_residual=True,
        )

    return fn


def random_lists(batch, heads, mask=None):
    tiles = RANDOM.random((batch, heads, *GRID)) < 0.4
    tiles[:, :, 0] = False  # a query block that visits nothing
    return BlockMask.from_tiles(tiles, T, S, block_size=BLOCK, mask=mask)


@pytest.mark.parametrize("heads", [1, K, N])
@pytest.mark.parametrize("batch", [1, B])
@pytest.mark.parametrize("mask", [None, masks.Causal()], ids=["full", "causal"])
def test_xla_matches_the_reference(batch, heads, mask):
    lists = random_lists(batch, heads, mask)
    assert_matches(attention("xla", lists), attention("reference", lists), arrays())


def test_traced_lists_reuse_one_program():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def fn(arrays, tiles):
        lists = BlockMask.from_tiles(tiles, T, S, block_size=BLOCK)
        return attention("xla", lists)(*arrays)

    for density in (0.1, 0.9):
        tiles = jnp.asarray(RANDOM.random((B, N, *GRID)) < density)
        lists = BlockMask.from_tiles(tiles, T, S, block_size=BLOCK)
        want = attention("reference", lists)(*arrays())
        chex.assert_trees_all_close(fn(arrays(), tiles), want, atol=2e-6)


def test_lists_may_be_an_argument():
    lists = random_lists(B, N, masks.Causal())
    got = jax.jit(lambda lists: attention("xla", lists)(*arrays()))(lists)
    chex.assert_trees_all_close(got, attention("xla", lists)(*arrays()), atol=1e-6)


@given(
    block=st.sampled_from([(16, 32), (7, 9), (70, 13)]),
    left=st.integers(0, 50),
    prefix=st.integers(0, 90),
)
def test_lists_of_a_mask_show_what_it_shows(block, left, prefix):
    mask = masks.Causal() & masks.Window(left, 0) | masks.Prefix(prefix)
    lists = BlockMask.from_mask(mask, T, S, block_size=block)
    chex.assert_trees_all_equal(lists.to_dense(), mask.to_dense(T, S))
    slots = np.arange(lists.indices.shape[-1])
    listed = np.asarray(lists.indices)[slots < np.asarray(lists.counts)[..., None]]
    assert (listed < -(-S // block[1])).all()


def test_partial_blocks_come_first_and_full_ones_are_full():
    lists = BlockMask.from_mask(masks.Causal(), 64, 64, block_size=(16, 16))
    np.testing.assert_array_equal(lists.counts[0, 0], [1, 2, 3, 4])
    np.testing.assert_array_equal(lists.partial_counts[0, 0], [1, 1, 1, 1])
    np.testing.assert_array_equal(lists.indices[0, 0, 3], [3, 0, 1, 2])
    np.testing.assert_array_equal(
        lists.tiles()[0, 0],
        [[1, 0, 0, 0], [2, 1, 0, 0], [2, 2, 1, 0], [2, 2, 2, 1]],
    )


def test_a_ragged_last_key_block_is_partial():
    lists = BlockMask.from_mask(masks.Full(), T, S, block_size=BLOCK)
    assert (lists.tiles()[..., -1] == 1).all()
    assert (lists.tiles()[..., :-1] == 2).all()


def test_lists_known_at_trace_time_are_short():
    @jax.jit
    def slots(left):
        known, unknown = (
            BlockMask.from_mask(masks.Window(n, 0), 1024, 1024, block_size=(16, 16))
            for n in (31, left)
        )
        return jnp.zeros((known.indices.shape[-1], unknown.indices.shape[-1]))

    assert slots(31).shape == (3, 64)


def test_refined_lists_show_both():
    lists = random_lists(B, K)
    segments = np.sort(RANDOM.integers(0, 4, (B, 90)))
    further = masks.Window(jnp.array([3, 9, 27, 81]), 5) & masks.Segments(segments)
    refined = lists.refine(further, batch=B, heads=N)
    want = lists.to_dense(batch=B, heads=N) & further.to_dense(T, S, batch=B, heads=N)
    chex.assert_trees_all_equal(refined.to_dense(batch=B, heads=N), want)
    query, key, value = arrays()
    got = attnx.dot_product_attention(
        query, key, value, mask=lists, is_causal=True, implementation="xla"
    )
    want = attnx.dot_product_attention(
        query, key, value, mask=lists.to_dense(batch=B, heads=N), is_causal=True
    )
    chex.assert_trees_all_close(got, want, atol=2e-6)


def test_all_blocks_equal_dense():
    query, key, value = arrays()
    lists = BlockMask.from_tiles(np.ones(GRID, bool), T, S, block_size=BLOCK)
    got = attnx.block_sparse_attention(query, key, value, lists)
    want = jax.nn.dot_product_attention(query, key, value)
    chex.assert_trees_all_close(got, want, atol=2e-6)


def test_bad_lists_are_named():
    query, key, value = arrays()
    ones = np.ones(GRID, bool)
    with pytest.raises(ValueError, match=r"tiles: expected \[..., \(5, 3\)\]"):
        BlockMask.from_tiles(ones[:4], T, S, block_size=BLOCK)
    with pytest.raises(ValueError, match="boolean or integer"):
        BlockMask.from_tiles(ones.astype(float), T, S, block_size=BLOCK)
    with pytest.raises(ValueError, match="block_size"):
        BlockMask.from_tiles(ones, T, S, block_size=(0, 32))
    longer = BlockMask.from_tiles(ones, 80, S, block_size=BLOCK)
    with pytest.raises(ValueError, match="lists for 70 queries and 90 keys, got 80"):
        attnx.block_sparse_attention(query, key, value, longer)
    three = BlockMask.from_tiles(np.ones((3, *GRID), bool), T, S, block_size=BLOCK)
    with pytest.raises(ValueError, match=r"block_mask\.indices: expected \[2 or 1, 4"):
        attnx.block_sparse_attention(query, key, value, three)
    with pytest.raises(ValueError, match="block_mask: expected a BlockMask"):
        attnx.block_sparse_attention(query, key, value, masks.Causal())
