"""Blocks, their scores, and the choice among them."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_matches, normal
from hypothesis import given
from hypothesis import strategies as st

import attnx
from attnx import masks, select

B, T, N, K, H = 2, 24, 4, 2, 8
BLOCK, COUNT = 4, 6


def scores(seed=0):
    return normal(seed, (B, N, T, COUNT))[0]


def chosen(choice):
    return np.asarray(choice.to_tiles())


def test_blocks_of_a_sequence_with_padding():
    blocks = select.Blocks.regular(7, 3, lengths=jnp.array([7, 4]))
    np.testing.assert_array_equal(
        blocks.ids, [[0, 0, 0, 1, 1, 1, 2], [0] * 3 + [1] + [3] * 3]
    )
    np.testing.assert_array_equal(blocks.sizes(), [[3, 3, 1], [3, 1, 0]])
    np.testing.assert_array_equal(blocks.starts()[0], [0, 3, 6])


def test_blocks_beyond_the_count_join_the_last():
    starts = jnp.array([[False, True, False, True, True]])
    blocks = select.Blocks.from_starts(starts, 3)
    np.testing.assert_array_equal(blocks.ids, [[0, 1, 1, 2, 2]])


def test_pooling_is_per_block_in_float32_without_padding():
    (x,) = normal(0, (B, 7, K, H), dtype=jnp.bfloat16)
    blocks = select.Blocks.regular(7, 3, lengths=jnp.array([7, 4]))
    parts = [[(0, 3), (3, 6), (6, 7)], [(0, 3), (3, 4), (7, 7)]]
    wide = np.asarray(x, np.float32)

    def each(fn):
        return np.stack(
            [
                [fn(wide[b, i:j]) if i < j else np.zeros((K, H)) for i, j in row]
                for b, row in enumerate(parts)
            ]
        )

    for got, fn in (
        (select.pool_mean(x, blocks), lambda x: x.mean(0)),
        (select.pool_sqrt(x, blocks), lambda x: x.mean(0) * len(x) ** 0.5),
        (select.pool_bounds(x, blocks)[0], lambda x: x.min(0)),
        (select.pool_bounds(x, blocks)[1], lambda x: x.max(0)),
    ):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, each(fn), atol=1e-6)


def test_scores_group_heads_and_have_gradients():
    query, pooled = normal(0, (B, T, N, H), (B, COUNT, K, H))

    def oracle(query, pooled):
        return (jnp.einsum("btnh,bsnh->bnts", query, jnp.repeat(pooled, N // K, 2)),)

    assert_matches(lambda *x: (select.block_scores(*x),), oracle, (query, pooled))


def test_bound_scores_bound_every_key_and_are_reached_by_one():
    query, key = normal(0, (B, T, N, H), (B, T, K, H))
    low, high = select.pool_bounds(key, select.Blocks.regular(T, BLOCK))
    bound = select.bound_scores(query, low, high)
    exact = select.block_scores(query, key).reshape(B, N, T, COUNT, BLOCK)
    assert (bound[..., None] >= exact - 1e-5).all()
    one = select.Blocks.regular(T, 1)
    reached = select.bound_scores(query, *select.pool_bounds(key, one))
    np.testing.assert_allclose(reached, exact.reshape(B, N, T, T), atol=1e-5)


@given(k=st.sampled_from([1, 3, 9]), scope=st.sampled_from(select.choice.SCOPES))
def test_top_k_takes_the_best_of_the_scope(k, scope):
    x = np.asarray(scores())
    valid = np.tri(T, COUNT, dtype=bool)
    got = chosen(select.top_k_blocks(x, k, scope=scope, valid=valid))
    rows = {"row": (B, N, T), "head": (B, N), "layer": (B,)}[scope]
    masked = np.where(valid, x, -np.inf).reshape(*rows, -1)
    budget = min(k, COUNT) * B * N * T // int(np.prod(rows))
    cut = -np.sort(-masked)[..., budget - 1 : budget]
    want = (masked >= cut) & np.isfinite(masked)
    np.testing.assert_array_equal(got, want.reshape(x.shape))


def test_of_equal_scores_exactly_k_are_taken():
    got = chosen(select.top_k_blocks(jnp.zeros((1, 1, 3, 5)), 2))
    np.testing.assert_array_equal(got[0, 0], [[1, 1, 0, 0, 0]] * 3)


@pytest.mark.parametrize("scope", select.choice.SCOPES)
def test_forced_blocks_come_first_and_invalid_ones_never(scope):
    valid = masks.Causal().to_dense(COUNT, COUNT)
    forced = (masks.Window(0, 0) | masks.Prefix(1)).to_dense(COUNT, COUNT)
    x = scores()[:, :, :COUNT]
    for choice in (
        select.top_k_blocks(x, 3, scope=scope, valid=valid, forced=forced),
        select.threshold_blocks(
            jnp.exp(x), 0.5, scope=scope, valid=valid, forced=forced
        ),
    ):
        got = chosen(choice)
        assert not (got & ~valid).any()
        assert (got | ~(forced & valid)).all()


def cumulative_threshold(x, valid, forced, threshold):
    """VMoBA's rule on one list, literally."""
    x = np.where(valid, x, 0).astype(np.float64)
    total, own = x.sum(), x[forced & valid].sum()
    order = [i for i in np.argsort(-x, kind="stable") if valid[i] and not forced[i]]
    kept, mass = forced & valid, own
    for i in order:
        kept[i], mass = True, mass + x[i]
        if mass >= threshold * (total + 1e-6):
            break
    return kept


@pytest.mark.parametrize("scope", select.choice.SCOPES)
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.8, 1.01])
def test_threshold_is_the_cumulative_rule(scope, threshold):
    x = jnp.exp(scores())
    valid = np.tri(T, COUNT, 1, dtype=bool)
    forced = np.eye(T, COUNT, dtype=bool)
    got = chosen(
        select.threshold_blocks(x, threshold, scope=scope, valid=valid, forced=forced)
    )
    lists = {"row": (B * N * T, -1), "head": (B * N, -1), "layer": (B, -1)}[scope]
    flat = [np.broadcast_to(a, x.shape).reshape(lists) for a in (x, valid, forced)]
    want = [cumulative_threshold(*row, threshold) for row in zip(*flat, strict=True)]
    np.testing.assert_array_equal(got.reshape(lists), want)


def test_threshold_grows_and_is_capped():
    x = select.row_softmax(scores())
    sizes = [
        chosen(select.threshold_blocks(x, t, scope="layer")).mean()
        for t in (0.0, 0.2, 0.5, 0.9, 1.01)
    ]
    assert sizes == sorted(sizes)
    assert sizes[-1] == 1
    capped = select.threshold_blocks(x, 0.9, scope="layer", max_blocks=2)
    assert capped.rows.shape == (B, 1, 2 * N * T)
    np.testing.assert_array_equal(
        chosen(capped), chosen(select.top_k_blocks(x, 2, scope="layer"))
    )


def test_scopes_agree_where_rows_are_equal():
    x = jnp.broadcast_to(jnp.arange(COUNT, dtype=jnp.float32), (1, N, T, COUNT))
    row, head, layer = (
        chosen(select.top_k_blocks(x, 2, scope=scope)) for scope in select.choice.SCOPES
    )
    np.testing.assert_array_equal(row, head)
    np.testing.assert_array_equal(row, layer)


def test_normalized_scores():
    valid = np.tri(T, COUNT, dtype=bool)
    x = select.min_max(scores(), scope="head", valid=valid)
    assert (np.asarray(x)[..., ~valid] == 0).all()
    np.testing.assert_allclose(x.min((-2, -1)), 0)
    np.testing.assert_allclose(x.max((-2, -1)), 1, rtol=1e-6)
    np.testing.assert_array_equal(select.min_max(jnp.ones((1, 1, 1, 3))), 0)
    x = select.row_softmax(scores(), valid=valid)
    np.testing.assert_allclose(x.sum(-1), 1, rtol=1e-5)
    assert (np.asarray(x)[..., ~valid] == 0).all()


def test_choice_by_query_blocks_is_block_lists():
    query, key, value = normal(0, (B, 30, N, H), (B, 30, K, H), (B, 30, K, H))
    size = (8, 4)
    cuts = [select.Blocks.regular(30, n) for n in size]
    pooled = [select.pool_mean(x, c) for x, c in zip((query, key), cuts, strict=True)]
    valid = attnx.BlockMask.from_mask(masks.Causal(), 30, 30, block_size=size).tiles()
    choice = select.top_k_blocks(select.block_scores(*pooled), 3, valid=valid > 0)
    lists = choice.to_block_mask(30, 30, block_size=size, mask=masks.Causal())
    tiles = chosen(choice).repeat(8, 2).repeat(4, 3)[:, :, :30, :30]
    want = attnx.dot_product_attention(
        query,
        key,
        value,
        mask=jnp.asarray(tiles) & np.tri(30, dtype=bool),
        implementation="reference",
    )
    got = attnx.block_sparse_attention(query, key, value, lists)
    chex.assert_trees_all_close(got, want, atol=2e-6)


def routed(choice, implementation, beside=None):
    return lambda *arrays: select.routed_attention(
        *arrays,
        choice,
        select.Blocks.regular(T, BLOCK),
        block_size=BLOCK,
        beside=beside,
        scale=0.5,
        implementation=implementation,
        return_residual=True,
    )


CHOICES = {
    "top k": lambda x: select.top_k_blocks(x, 2, valid=np.tri(T, COUNT, -1, bool)),
    "head": lambda x: select.threshold_blocks(jnp.exp(x), 0.3, scope="head"),
    "layer": lambda x: select.top_k_blocks(x, 2, scope="layer"),
    "none": lambda x: select.top_k_blocks(x, 2, valid=False),
}


@pytest.mark.parametrize("name", CHOICES)
def test_routed_attention_is_attention_under_the_choice(name):
    arrays = normal(1, (B, T, N, H), (B, T, K, H), (B, T, K, H))
    choice = CHOICES[name](scores())
    assert_matches(routed(choice, "xla"), routed(choice, "reference"), arrays)


@pytest.mark.parametrize("name", ["top k", "head"])
def test_heads_may_be_routed_in_turn(name, monkeypatch):
    monkeypatch.setattr("attnx.select.turns._PAIRS", 1)
    monkeypatch.setattr("attnx.select.turns._RUNS", 2)
    arrays = normal(1, (B, T, N, H), (B, T, K, H), (B, T, K, H))
    choice = CHOICES[name](scores())
    assert_matches(routed(choice, "xla"), routed(choice, "reference"), arrays)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("scope", ["row", "layer"])
def test_what_is_seen_beside_is_merged(scope, traced, monkeypatch):
    """Earlier blocks are chosen, the own one is seen; the heads take turns."""
    monkeypatch.setattr("attnx.select.turns._PAIRS", 1)
    monkeypatch.setattr("attnx.select.turns._RUNS", 2)
    arrays = normal(1, (B, T, N, H), (B, T, K, H), (B, T, K, H))
    own = np.arange(T) // BLOCK
    valid = own[:, None] > np.arange(COUNT)
    choice = select.top_k_blocks(scores(), 2, valid=valid, scope=scope)

    def attend(implementation, *arrays):
        ids = jnp.asarray(own) + (0 * arrays[0][0, 0, 0, 0] if traced else 0)
        beside = masks.Segments(ids.astype(jnp.int32)) & masks.Causal()
        return routed(choice, implementation, beside)(*arrays)

    assert_matches(
        functools.partial(attend, "xla"), functools.partial(attend, "reference"), arrays
    )


def test_long_blocks_are_visited_in_steps():
    """300 tokens in steps of 128, of which the last is short; the last block too."""
    query, key, value = normal(1, (1, 20, 2, 8), *[(1, 700, 1, 8)] * 2)
    blocks = select.Blocks.regular(700, 300)
    scores = select.block_scores(query, select.pool_mean(key, blocks))
    choice = select.top_k_blocks(scores, 2)
    run = lambda implementation: select.routed_attention(
        query,
        key,
        value,
        choice,
        blocks,
        block_size=300,
        implementation=implementation,
        return_residual=True,
    )
    run = jax.jit(run, static_argnums=0)
    chex.assert_trees_all_close(run("xla"), run("reference"), atol=2e-6)


@pytest.mark.parametrize("scope", ["row", "layer"])
def test_blocks_of_any_length_are_routed(scope):
    """Ragged, shorter than the others, and with padding in none."""
    arrays = normal(1, (B, T, N, H), (B, T, K, H), (B, T, K, H))
    starts = jnp.zeros((1, T), bool).at[0, [3, 7, 8, 12, 16]].set(True)
    for blocks in (
        select.Blocks.from_starts(starts[:, :20].repeat(2, 0), COUNT),
        select.Blocks.regular(T - 1, BLOCK, lengths=jnp.array([23, 10])),
    ):
        key_len = blocks.ids.shape[1]
        query, key, value = (arrays[0], *(x[:, :key_len] for x in arrays[1:]))
        choice = select.top_k_blocks(scores(), 3, scope=scope)
        run = lambda implementation: select.routed_attention(
            query,  # noqa: B023
            key,  # noqa: B023
            value,  # noqa: B023
            choice,  # noqa: B023
            blocks,  # noqa: B023
            block_size=BLOCK,
            implementation=implementation,
            return_residual=True,
        )
        run = jax.jit(run, static_argnums=0)
        chex.assert_trees_all_close(run("xla"), run("reference"), atol=2e-6)


def test_union_lists_are_routed_attention():
    arrays = normal(1, (B, T, N, H), (B, T, K, H), (B, T, K, H))
    choice = CHOICES["layer"](scores())
    mask = select.Chosen(choice.to_tiles(), select.Blocks.regular(T, BLOCK).ids)
    lists = attnx.BlockMask.from_mask(mask, T, T, block_size=(3, 4), batch=B, heads=N)
    chex.assert_trees_all_equal(
        lists.to_dense(batch=B, heads=N), jnp.repeat(choice.to_tiles(), BLOCK, -1)
    )
    assert (lists.partial_counts < lists.counts).any()
    got = attnx.block_sparse_attention(*arrays, lists, scale=0.5)
    want = jax.jit(routed(choice, "xla"))(*arrays)[0]
    chex.assert_trees_all_close(got, want, atol=2e-6)


def test_counts_vary_without_another_program():
    arrays = normal(1, (B, T, N, H), (B, T, K, H), (B, T, K, H))

    @jax.jit
    @chex.assert_max_traces(n=1)
    def fn(x, threshold):
        choice = select.threshold_blocks(x, threshold, scope="head")
        return choice, routed(choice, "xla")(*arrays)[0]

    counts = set()
    for threshold in (0.1, 0.7):
        choice, got = fn(jnp.exp(scores()), threshold)
        counts.add(int(choice.to_tiles().sum()))
        want = routed(choice, "reference")(*arrays)[0]
        chex.assert_trees_all_close(got, want, atol=2e-6)
    assert len(counts) == 2


def test_mistakes_are_named():
    x = scores()
    with pytest.raises(ValueError, match="scope: expected one of 'row', 'head'"):
        select.top_k_blocks(x, 2, scope="global")
    with pytest.raises(ValueError, match="k: expected an integer of at least 1, got 0"):
        select.top_k_blocks(x, 0)
    with pytest.raises(ValueError, match="valid: expected broadcastable to"):
        select.top_k_blocks(x, 1, valid=np.ones((T, 5), bool))
    with pytest.raises(ValueError, match="forced: expected a boolean"):
        select.top_k_blocks(x, 1, forced=np.ones(COUNT))
    with pytest.raises(ValueError, match="max_blocks"):
        select.threshold_blocks(x, 0.5, max_blocks=0)
    with pytest.raises(ValueError, match="block_size"):
        select.Blocks.regular(8, 0)
    with pytest.raises(ValueError, match="blocks: expected a cut"):
        select.pool_mean(jnp.ones((1, 8, 1, 1)), select.Blocks.regular(9, 3))
    arrays = normal(1, (B, T, N, H), (B, T, K, H), (B, T, K, H))
    choice = select.top_k_blocks(x[:, :2], 2)
    with pytest.raises(ValueError, match="choice: expected the grid"):
        routed(choice, None)(*arrays)
