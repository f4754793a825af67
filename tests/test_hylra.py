"""Hybrid Layer Reuse Attention."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import normal
from hypothesis import given
from hypothesis import strategies as st

import attnx
from attnx.select import reuse_policy, selection_overlap, top_k_blocks

B, T, N, K, H = 2, 29, 4, 2, 8
BLOCK, COUNT = 4, 8
ARRAYS = normal(0, (B, T, N, H), (B, T, K, H), (B, T, K, H))
SEGMENTS = jnp.array([[0] * 9 + [1] * 20, [0] * 25 + [1] * 4])
SETTING = {"block_size": BLOCK, "top_k": 4}

full = jax.jit(functools.partial(attnx.hylra_attention, **SETTING))


@jax.jit
def causal(*arrays):
    return attnx.dot_product_attention(*arrays, is_causal=True)


def chosen_by_hand(b, segments=None, top_k=4, sinks=1, recent=2):
    """Bool [T, n], from attention weights in float64."""
    query, key = (np.asarray(x[b], np.float64) for x in ARRAYS[:2])
    seen = np.zeros((T, COUNT), bool)
    for t in range(T):
        mass, own = np.zeros(COUNT), t // BLOCK
        visible = np.arange(T) <= t
        if segments is not None:
            visible &= np.asarray(segments[b]) == int(segments[b, t])
        for n in range(N):
            s = np.where(visible, key[:, n // 2] @ query[t, n] * H**-0.5, -np.inf)
            weights = np.exp(s - s.max())
            weights /= weights.sum()
            mass += np.add.reduceat(weights, np.arange(0, T, BLOCK)) / N
        mass[:sinks] = mass[max(own - recent + 1, 0) : own + 1] = np.inf
        order = np.argsort(-mass[: own + 1], kind="stable")[:top_k]
        seen[t, order] = True
    return seen


@pytest.mark.parametrize("segment_ids", [None, SEGMENTS], ids=["one", "packed"])
def test_a_full_layer_attends_to_all_and_chooses_by_mass(segment_ids):
    out, choice = full(*ARRAYS, segment_ids=segment_ids)
    mask = attnx.masks.Causal()
    if segment_ids is not None:
        mask &= attnx.masks.Segments(segment_ids)
    want = attnx.dot_product_attention(*ARRAYS, mask=mask)
    chex.assert_trees_all_close(out, want, atol=2e-6)
    tiles = choice.to_tiles()
    for b in range(B):
        np.testing.assert_array_equal(tiles[b, 0], chosen_by_hand(b, segment_ids))


def test_a_layer_that_reuses_attends_to_the_choice():
    _, choice = full(*ARRAYS)
    other = normal(1, *(x.shape for x in ARRAYS))
    out, same = full(*other, choice)
    chex.assert_trees_all_equal(same, choice)
    seen = np.repeat(choice.to_tiles(), BLOCK, -1)[..., :T] & np.tri(T, dtype=bool)
    want = attnx.dot_product_attention(*other, mask=jnp.asarray(seen))
    chex.assert_trees_all_close(out, want, atol=2e-6)


def test_all_blocks_are_causal_attention():
    every = functools.partial(attnx.hylra_attention, block_size=BLOCK, top_k=99)
    every = jax.jit(every)
    _, choice = every(*ARRAYS)
    out, _ = every(*ARRAYS, choice)
    chex.assert_trees_all_close(out, causal(*ARRAYS), atol=2e-6)


def test_choice_and_values_come_from_the_past_only():
    before, choice = full(*ARRAYS)
    later = [x.at[:, 17:].multiply(-7.0) for x in ARRAYS]
    after, other = full(*later)
    chex.assert_trees_all_close(after[:, :17], before[:, :17], atol=1e-6)
    chex.assert_trees_all_equal(
        other.to_tiles()[:, :, :17], choice.to_tiles()[:, :, :17]
    )
    tiles = np.asarray(choice.to_tiles())
    assert not tiles[:, 0][:, np.arange(COUNT) * BLOCK > np.arange(T)[:, None]].any()


def test_newest_queries_against_a_cache():
    query, key, value = ARRAYS
    want, choice = full(*ARRAYS)
    again, _ = full(*ARRAYS, choice)
    starts = jnp.array([26, 15])
    newest = jnp.stack([query[b, s : s + 3] for b, s in enumerate(starts.tolist())])
    got, mine = full(newest, key, value, query_start=starts)
    reused, _ = full(newest, key, value, mine, query_start=starts)
    for b, start in enumerate(starts.tolist()):
        rows = slice(start, start + 3)
        chex.assert_trees_all_close(got[b], want[b, rows], atol=2e-6)
        chex.assert_trees_all_close(reused[b], again[b, rows], atol=2e-6)
        np.testing.assert_array_equal(mine.to_tiles()[b], choice.to_tiles()[b, :, rows])


@pytest.mark.parametrize("segment_ids", [None, SEGMENTS], ids=["one", "packed"])
def test_one_query_reads_what_was_chosen(segment_ids):
    """The same as a mask over the whole cache."""
    query, key, value = ARRAYS
    for starts in ([26, 15], [4, 0], [28, 8]):
        starts = jnp.array(starts)
        newest = jnp.take_along_axis(query, starts[:, None, None, None], 1)
        options = {"segment_ids": segment_ids, "query_start": starts}
        _, choice = full(newest, key, value, **options)
        got, _ = full(newest, -key, value, choice, **options)
        seen = np.repeat(choice.to_tiles(), BLOCK, -1)[..., :T]
        seen &= np.arange(T) <= starts[:, None, None, None]
        if segment_ids is not None:
            own = jnp.take_along_axis(segment_ids, starts[:, None], 1)
            seen &= (segment_ids == own)[:, None, None]
        want = attnx.dot_product_attention(newest, -key, value, mask=jnp.asarray(seen))
        chex.assert_trees_all_close(got, want, atol=2e-6)


def test_gradients_pass_attention_and_not_the_choice():
    def loss(attend):
        return jax.jit(jax.grad(lambda *a: jnp.sin(attend(*a)).sum(), (0, 1, 2)))

    got = loss(lambda *a: full(*a)[0])(*ARRAYS)
    want = loss(causal)(*ARRAYS)
    chex.assert_trees_all_close(got, want, atol=1e-5)


def test_overlap_is_the_share_of_what_the_later_layer_chose():
    scores = normal(2, *[(B, 1, 7, COUNT)] * 3)
    choices = [top_k_blocks(x, k) for x, k in zip(scores, (3, 3, 2), strict=True)]
    got = np.asarray(selection_overlap(choices))
    tiles = [np.asarray(c.to_tiles()) for c in choices]
    for i, j in np.ndindex(3, 3):
        want = ((tiles[i] & tiles[j]).sum(-1) / tiles[j].sum(-1)).mean()
        assert abs(got[i, j] - want) < 1e-6
    np.testing.assert_allclose(np.diag(got), 1)


def all_plans(overlap, sensitive):
    layers = len(overlap)
    for rest in itertools.product((True, False), repeat=layers - 1):
        plan, source = [], 0
        for layer, is_full in enumerate((True, *rest)):
            source = layer if is_full or layer in sensitive else source
            plan.append(source)
        kept = [overlap[s, j] for j, s in enumerate(plan) if s != j]
        yield tuple(plan), kept


@given(
    seed=st.integers(0, 999),
    layers=st.integers(1, 8),
    threshold=st.sampled_from([0.0, 0.3, 0.6, 0.9]),
)
def test_policy_is_the_best_of_all(seed, layers, threshold):
    random = np.random.default_rng(seed)
    overlap = random.random((layers, layers)).round(1)
    sensitive = {int(random.integers(layers))}

    def full_count(plan):
        return len(set(plan))

    got = reuse_policy(overlap, threshold=threshold, full_layers=sensitive)
    plans = dict(all_plans(overlap, sensitive))
    assert got in plans
    allowed = {p: k for p, k in plans.items() if min(k, default=1) >= threshold}
    want = min((full_count(p), -sum(k)) for p, k in allowed.items())
    assert got in allowed
    np.testing.assert_allclose((full_count(got), -sum(allowed[got])), want)

    most = full_count(got)
    got = reuse_policy(overlap, max_full=most, full_layers=sensitive)
    few = {p: k for p, k in plans.items() if full_count(p) <= most}
    want = max((min(k, default=np.inf), sum(k)) for k in few.values())
    assert got in few
    np.testing.assert_allclose((min(few[got], default=np.inf), sum(few[got])), want)


def test_policies_at_the_ends():
    same, apart = np.ones((6, 6)), np.eye(6)
    assert reuse_policy(same, threshold=0.9) == (0,) * 6
    assert reuse_policy(same, threshold=1.1) == tuple(range(6))
    assert reuse_policy(apart, threshold=0.1) == tuple(range(6))
    assert reuse_policy(apart, max_full=6) == tuple(range(6))
    counts = [
        len(set(reuse_policy(np.random.default_rng(0).random((8, 8)), threshold=x)))
        for x in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    ]
    assert counts == sorted(counts)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="threshold: expected threshold or max_full"):
        reuse_policy(np.eye(3))
    with pytest.raises(ValueError, match="max_full: expected at least 2, got 1"):
        reuse_policy(np.eye(3), max_full=1, full_layers=[2])
    with pytest.raises(ValueError, match="full_layers: expected layers below 3"):
        reuse_policy(np.eye(3), max_full=2, full_layers=[3])
    _, choice = full(*ARRAYS)
    with pytest.raises(ValueError, match=r"choice: expected the grid \(1, 29, 15\)"):
        attnx.hylra_attention(*ARRAYS, choice, block_size=2, top_k=4)
    with pytest.raises(ValueError, match="choices: expected at least one layer"):
        selection_overlap([])
