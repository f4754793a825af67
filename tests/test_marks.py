"""Tiles made of bits, and how bits are packed, ranked and counted."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SLOW, normal
from hypothesis import given
from hypothesis import strategies as st

from attnx import select
from attnx.select import bits, marks, scores, tiles, turns
from pallas_kernels import mosaic

B, N, T, TILE = 2, 2, 70, 4


def marked(count, share=0.4):
    return normal(0, (B, N, T, count))[0] < share


@given(count=st.sampled_from([1, 32, 33, 72]))
def test_bits_are_packed_ranked_and_counted(count):
    x = marked(count)
    words = bits.pack(x)
    assert words.shape == (B, N, T, -(-count // 32))
    chex.assert_trees_all_equal(bits.unpack(words, count), x)
    chex.assert_trees_all_equal(bits.ranks(words, count), jnp.cumsum(x, -1) - x)
    chex.assert_trees_all_equal(bits.counts(words), x.sum(-1))
    ranks, sums = bits.ranks_in_columns(x)
    chex.assert_trees_all_equal(ranks, jnp.cumsum(x, -2) - x)
    chex.assert_trees_all_equal(sums, x.sum(-2))
    first = bits.first_marks(words, jnp.arange(T) % 4, count)
    want = x & (jnp.cumsum(x, -1) <= jnp.arange(T)[:, None] % 4)
    chex.assert_trees_all_equal(bits.unpack(first, count), want)


@pytest.mark.parametrize("shares", [(1,), (3, 1, 4)])
@pytest.mark.parametrize("share", [-9.0, 0.4])
def test_runs_are_those_of_sorted_pairs(shares, share):
    count, slots = 30, T * 25
    x = marked(count, share)
    choice = select.top_k_blocks(x * 1.0, 25, scope="head", valid=x)
    plan = tiles.plan_tiles(choice.rows, choice.blocks, count=count, tile=TILE)
    made = marks.Marks(bits.pack(x), count, slots, TILE)
    split = lambda of: list(of.runs(shares, num_rows=T, per_row=None))
    found = jax.tree.map(np.asarray, [jax.jit(split)(x) for x in (made, plan)])
    for got, want in zip(*found, strict=True):
        chex.assert_trees_all_equal(got[0], want[0])
        chex.assert_trees_all_equal(got[4:], want[4:])
        sizes = want.stop - want.first
        np.testing.assert_array_equal(got.stop - got.first, sizes)
        for b, n, row in np.ndindex(B, N, T):
            of_row = [
                run.place[b, n, run.first[b, n, row] :][: sizes[b, n, row]]
                for run in (got, want)
            ]
            np.testing.assert_array_equal(*of_row)


@given(
    shares=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    count=st.integers(1, 20_000),
    even=st.sampled_from([1, 264]),
)
def test_runs_are_cut_about_where_their_shares_end(shares, count, even):
    bounds = tiles.bounds_of(shares, count, even)
    assert bounds == sorted({0, *bounds, count})
    ends = [count * sum(shares[: i + 1]) // sum(shares) for i in range(len(shares))]
    if count * min(shares) >= 8 * even * sum(shares):
        assert len(bounds) == len(shares) + 1
        assert all(bound % even == 0 for bound in bounds[:-1])
        apart = np.subtract(ends, bounds[1:])
        assert set(apart) <= set(range(even))
    else:  # Short ones may be empty.
        assert set(bounds) == {0, *ends}


@pytest.mark.parametrize("count", [12, pytest.param(130, marks=SLOW)])
def test_the_kernel_scores_the_heads_whose_turn_it_is(count):
    query, means = normal(0, (2, 128, 4, 32), (2, count, 2, 32))
    query = query.astype(jnp.bfloat16)
    own = jnp.arange(128, dtype=jnp.int32) % count
    turn = turns.Turn(jnp.int32(1), 2)

    def run(implementation, own):
        return jax.jit(
            functools.partial(
                scores.scores_in_turn, turn=turn, implementation=implementation
            )
        )(query, means, own=own)

    for given_own in (own, None):
        with mosaic.interpret():
            got = run("pallas", given_own)
        want = run("xla", given_own)
        assert got.shape == (2, 2, 128, count)
        np.testing.assert_array_equal(np.isinf(got), np.isinf(want))
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
