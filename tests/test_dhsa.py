"""Dynamic Hierarchical Sparse Attention."""

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
from attnx.select import boundary_ratio, chunk_starts, dhsa_mask
from attnx.softmax.mask import Tiles

B, T, N, K, H = 2, 29, 4, 2, 8
ARRAYS = normal(0, (B, T, N, H), (B, T, K, H), (B, T, K, H))
STARTS = np.zeros((B, T), bool)
STARTS[0, [3, 4, 11, 19, 20]] = STARTS[1, [7, 22]] = True
STARTS = jnp.asarray(STARTS)
CHUNKS, BUDGET = 8, 6


def dhsa(implementation=None, *, budget=BUDGET, **options):
    return functools.partial(
        attnx.dhsa_attention,
        max_chunks=CHUNKS,
        budget=budget,
        implementation=implementation,
        **options,
    )


def visible(query, key, starts, budget):
    """The definition, token by token, on one head: bool [T, T]."""
    edges = sorted({0, *np.flatnonzero(starts), len(query)})
    chunk = np.repeat(np.arange(len(edges) - 1), np.diff(edges))
    pooled = [
        np.stack([x[chunk == c].sum(0) / (chunk == c).sum() ** 0.5 for c in set(chunk)])
        for x in (query, key)
    ]
    scores = (pooled[0] @ pooled[1].T)[chunk][:, chunk]
    seen = np.zeros(scores.shape, bool)
    for i in range(len(query)):
        seen[i, np.argsort(-scores[i, : i + 1], kind="stable")[:budget]] = True
    return seen


def mask(budget, starts=STARTS, **options):
    return dhsa_mask(*ARRAYS[:2], starts, max_chunks=CHUNKS, budget=budget, **options)


@pytest.mark.parametrize("budget", [1, 6, 13])
def test_mask_is_the_definition(budget):
    got = np.asarray(mask(budget).to_dense(T, T, batch=B, heads=N))
    query, key = (np.asarray(x, np.float64) for x in ARRAYS[:2])
    for b in range(B):
        for n in range(N):
            want = visible(query[b, :, n], key[b, :, n // 2], STARTS[b], budget)
            np.testing.assert_array_equal(got[b, n], want)


def test_packed_documents_choose_as_alone():
    segments = jnp.array([[0] * 9 + [1] * 20, [0] * 25 + [1] * 4])
    got = mask(BUDGET, segment_ids=segments).to_dense(T, T, batch=B, heads=N)
    query, key = (np.asarray(x, np.float64) for x in ARRAYS[:2])
    for b, cut in enumerate((9, 25)):
        want = np.zeros((T, T), bool)
        for part in (slice(0, cut), slice(cut, T)):
            want[part, part] = visible(
                query[b, part, 0], key[b, part, 0], STARTS[b, part], BUDGET
            )
        np.testing.assert_array_equal(got[b, 0], want)


@pytest.mark.parametrize("size", [(8, 8), (29, 2)])
def test_bounds_never_miss_a_pair(size):
    bounded = mask(BUDGET)
    dense = np.asarray(bounded.to_dense(T, T, batch=B, heads=N))
    lists = attnx.BlockMask.from_mask(bounded, T, T, block_size=size, batch=B, heads=N)
    np.testing.assert_array_equal(lists.to_dense(batch=B, heads=N), dense)
    some, _ = bounded.bounds(Tiles.grid(T, T, size, batch=B, heads=N))
    blocks = -(-T // size[0]), -(-T // size[1])
    padded = np.zeros((B, N, blocks[0] * size[0], blocks[1] * size[1]), bool)
    padded[:, :, :T, :T] = dense
    padded = padded.reshape(B, N, blocks[0], size[0], blocks[1], size[1])
    # Hardly a block is visited for nothing.
    assert (some != padded.any((3, 5))).mean() < 0.05


def test_matches_the_reference():
    options = {"starts": STARTS, "scale": 0.5, "return_residual": True}
    assert_matches(dhsa("xla", **options), dhsa("reference", **options), ARRAYS)


def test_a_large_budget_is_causal_attention():
    want = attnx.dot_product_attention(*ARRAYS, is_causal=True)
    got = jax.jit(dhsa("xla", budget=T))(*ARRAYS, STARTS)
    chex.assert_trees_all_close(got, want, atol=2e-6)


def test_chunks_of_one_token_choose_the_best_tokens():
    query, key, _ = ARRAYS
    starts = jnp.ones((1, T), bool)
    one = dhsa_mask(query, key, starts, max_chunks=T, budget=BUDGET)
    got = np.asarray(one.to_dense(T, T, batch=B, heads=N))
    scores = jnp.einsum("btnh,bsnh->bnts", query, jnp.repeat(key, N // K, 2))
    scores = np.where(np.tri(T, dtype=bool), scores, -np.inf)
    cut = -np.sort(-scores)[..., BUDGET - 1 : BUDGET]
    np.testing.assert_array_equal(got, (scores >= cut) & np.isfinite(scores))


def test_room_for_more_chunks_changes_nothing():
    wide = dhsa_mask(*ARRAYS[:2], STARTS, max_chunks=20, budget=BUDGET)
    chex.assert_trees_all_equal(
        wide.to_dense(T, T, batch=B, heads=N),
        mask(BUDGET).to_dense(T, T, batch=B, heads=N),
    )


def test_the_choice_looks_to_the_end_of_the_chunk_and_no_further():
    """The method's definition: chunks are pooled whole."""
    fn = jax.jit(dhsa("xla"))
    before = fn(*ARRAYS, STARTS)[0]
    end_of_chunk, later = 11, 8
    for t, same_until in ((end_of_chunk, end_of_chunk), (later, 4)):
        changed = [x.at[:, t:].multiply(-7.0) for x in ARRAYS]
        after = fn(*changed, STARTS)[0]
        chex.assert_trees_all_equal(after[:same_until], before[:same_until])
    # Tokens 4 to 7 share a chunk with those changed: they chose otherwise.
    assert (after[4:8] != before[4:8]).any()


def test_values_come_from_the_past_only():
    query, key, value = ARRAYS
    fn = jax.jit(dhsa("xla"))
    after = fn(query, key, value.at[:, 8:].multiply(-7.0), STARTS)
    chex.assert_trees_all_equal(after[:, :8], fn(*ARRAYS, STARTS)[:, :8])


def test_other_chunks_reuse_the_program():
    @chex.assert_max_traces(n=1)
    def fn(starts):
        return dhsa("xla")(*ARRAYS, starts)

    mapped = jax.jit(jax.vmap(fn))
    for starts in (STARTS, STARTS[:, ::-1]):
        got = mapped(jnp.stack([starts, starts[::-1]]))
        for each, want in zip(got, (starts, starts[::-1]), strict=True):
            want = dhsa("reference")(*ARRAYS, want)
            chex.assert_trees_all_close(each, want, atol=2e-6)


@given(seed=st.integers(0, 99), distance=st.sampled_from([0, 2, 8]))
def test_starts_are_apart_and_the_greedy_best(seed, distance):
    scores = np.random.default_rng(seed).normal(size=(B, T))
    got = np.asarray(
        chunk_starts(jnp.asarray(scores), 5, distance=distance, threshold=0.3)
    )
    for b in range(B):
        left, want = {t: s for t, s in enumerate(scores[b]) if t and s > 0.3}, [0]
        while left and len(want) < 5:
            best = max(left, key=left.get)
            want.append(best)
            left = {t: s for t, s in left.items() if abs(t - best) > distance}
        np.testing.assert_array_equal(np.flatnonzero(got[b]), sorted(want))
        assert (np.diff(sorted(want[1:])) > distance).all()


def test_labels_by_brute_force():
    weights = np.random.default_rng(0).random((B, 14, 14)) * np.tri(14)
    got, w = boundary_ratio(jnp.asarray(weights), window=3), 3
    for t in range(14):
        want = np.ones(B)
        if w <= t < 14 - w:
            sides = [
                weights[:, t + w :, s : s + w].sum((1, 2)) + 1e-6 for s in (t - w, t)
            ]
            want = np.maximum(*sides) / np.minimum(*sides)
        np.testing.assert_allclose(got[:, t], want, rtol=1e-5)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"starts: expected shape \(2, 29\) or"):
        dhsa()(*ARRAYS, STARTS[:, 1:])
    with pytest.raises(ValueError, match="starts: expected a boolean array"):
        dhsa()(*ARRAYS, STARTS.astype(int))
    with pytest.raises(ValueError, match="budget: expected at least 1, got 0"):
        dhsa(budget=0)(*ARRAYS, STARTS)
    with pytest.raises(ValueError, match="distance"):
        chunk_starts(jnp.zeros((1, 4)), 2, distance=-1)
    with pytest.raises(NotImplementedError, match="looks up an array by query and"):
        dhsa("pallas")(*(x.repeat(4, -1).astype(jnp.bfloat16) for x in ARRAYS), STARTS)
