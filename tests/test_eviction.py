"""Caches that forget: what stays, and attention to it."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import normal, relative_rms
from hypothesis import given
from hypothesis import strategies as st

import attnx
from attnx import masks
from attnx.cache import (
    KVCache,
    SparseCache,
    adaptive_budgets,
    dist_attention,
    evict,
    guikv_scores,
    key_norm_scores,
    redundancy,
    snapkv_scores,
    sparse_decode_attention,
    streaming_scores,
)
from attnx.nn import Rotary

B, S, N, K, H, V = 2, 40, 4, 2, 8, 6
LENGTHS = (33, 21)
WINDOW = 4
QUERY, KEY, VALUE = normal(0, (B, WINDOW, N, H), (B, S, K, H), (B, S, K, V))
CACHE = KVCache(KEY, VALUE, jnp.array(LENGTHS))
HIDDEN = normal(1, (B, S, 12))[0]
IMAGES = np.full((B, S), -1)
IMAGES[0, 2:10], IMAGES[0, 11:19], IMAGES[0, 20:28] = 0, 1, 2
IMAGES[1, :6], IMAGES[1, 7:13] = 3, 8
IMAGES = jnp.asarray(IMAGES)

snapkv = jax.jit(snapkv_scores)
ROOM = 16


@jax.jit
def _keep(cache, scores, budget):
    return evict(cache, scores, budget, capacity=ROOM)


def keep(scores, budget, cache=CACHE):
    """One program for all budgets."""
    return _keep(cache, scores, jnp.broadcast_to(jnp.asarray(budget), (B, K)))


def positions(cache, b, k):
    return [s for s in cache.positions[b, k].tolist() if s >= 0]


decode = jax.jit(sparse_decode_attention, static_argnames="return_residual")


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def attention_to(kept, query=QUERY, visible=lambda q, k: k <= q, key=KEY, value=VALUE):
    """Float64, token by token: `kept[b][k]` are positions. Output and log-sum-exp."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    tokens = query.shape[1]
    out, lse = np.zeros((B, tokens, N, V)), np.full((B, tokens, N), -np.inf)
    for b, t, n in np.ndindex(B, tokens, N):
        position, k = LENGTHS[b] - tokens + t, n // (N // K)
        seen = [s for s in kept[b][k] if s >= 0 and visible(position, s)]
        if seen:
            scores = key[b, seen, k] @ query[b, t, n] * H**-0.5
            out[b, t, n] = softmax(scores) @ value[b, seen, k]
            lse[b, t, n] = scores.max() + np.log(np.exp(scores - scores.max()).sum())
    return out, lse


def assert_attends(cache, **options):
    """Decoding from the cache is attention to the positions it says it keeps."""
    mask = options.pop("mask", None)
    got = decode(QUERY, cache, mask=mask, return_residual=True)
    want = attention_to(cache.positions.tolist(), **options)
    for x, y in zip(got, want, strict=True):
        assert relative_rms(x, y) < 1e-6


def snapkv_oracle(b, k, pool=5):
    length, group = LENGTHS[b], N // K
    query, key = (np.asarray(x[b], np.float64) for x in (QUERY, KEY))
    past = length - WINDOW
    total = np.zeros(past)
    for n in range(k * group, (k + 1) * group):
        for t in range(WINDOW):
            scores = key[: past + t + 1, k] @ query[t, n] * H**-0.5
            total += softmax(scores)[:past] / group
    return np.convolve(total, np.ones(pool) / pool, "same")


def guikv_oracle(b, k, budget, saliency=2.0, temperature=3.5, rank=3):
    scores, length = snapkv_oracle(b, k), LENGTHS[b]
    images = np.asarray(IMAGES[b, :length])
    new = images == images.max()
    norms = np.linalg.norm(np.asarray(HIDDEN[b, :length], np.float64)[new], axis=1)
    z = (norms - norms.mean()) / (norms.std(ddof=1) + 1e-8)
    scores[np.flatnonzero(new)] += saliency * softmax(z / temperature)
    key = np.asarray(KEY[b, :length, k], np.float64)
    basis = key[new][:rank].T
    old = np.flatnonzero((images >= 0) & ~new)
    rest = [np.linalg.norm(x - basis @ np.linalg.pinv(basis) @ x) for x in key[old]]
    dropped = len(old) * (length - budget) // length
    scores[old[np.argsort(rest)[:dropped]]] = 0
    return scores


def best(scores, budget, length):
    """The newest tokens and, of the others, the best: sorted positions."""
    first = np.argsort(-scores, kind="stable")[: budget - WINDOW]
    return sorted(first.tolist()) + list(range(length - WINDOW, length))


@functools.partial(jax.jit, static_argnums=2)
def guikv_of_three(query, cache, budget):
    return guikv(budget, query, cache, rank=3)


def guikv(budget, query=QUERY, cache=CACHE, **options):
    return guikv_scores(
        query, cache, hidden=HIDDEN, image_ids=IMAGES, budget=budget, **options
    )


@pytest.mark.parametrize("budget", [5, 12])
def test_snapkv_keeps_what_the_oracle_keeps(budget):
    small = keep(snapkv(QUERY, CACHE), budget)
    for b, k in np.ndindex(B, K):
        want = best(snapkv_oracle(b, k), budget, LENGTHS[b])
        got = small.positions[b, k]
        assert got.tolist() == want + [-1] * (ROOM - budget)
        np.testing.assert_array_equal(small.key[b, k, :budget], KEY[b, want, k])
        np.testing.assert_array_equal(small.value[b, k, :budget], VALUE[b, want, k])
    assert_attends(small)


@pytest.mark.parametrize("budget", [8, 12])
def test_guikv_keeps_what_the_oracle_keeps(budget):
    small = keep(guikv_of_three(QUERY, CACHE, budget), budget)
    for b, k in np.ndindex(B, K):
        want = best(guikv_oracle(b, k, budget), budget, LENGTHS[b])
        assert positions(small, b, k) == want
    assert_attends(small)


def test_guikv_without_saliency_or_earlier_images_is_snapkv():
    one = jnp.where(IMAGES.max(1, keepdims=True) == IMAGES, 0, -1)
    got = guikv_scores(
        QUERY, CACHE, hidden=HIDDEN, image_ids=one, budget=8, saliency=0.0
    )
    used = SparseCache.of(CACHE).positions >= 0
    want = snapkv_scores(QUERY, CACHE)
    np.testing.assert_array_equal(got[used], want[used])


def test_repeated_patches_go_first():
    """The newest screen repeats half of the one before it."""
    key = KEY.at[0, 20:24].set(KEY[0, 11:15])
    cache = CACHE._replace(key=key)
    is_new = jnp.broadcast_to((IMAGES == 2)[:, None], (B, K, S))
    rest = redundancy(SparseCache.of(cache).key, is_new, rank=4)[0]
    assert (rest[:, 11:15] < 1e-5).all()
    assert (rest[:, 15:19] > 0.1).all()
    budget = LENGTHS[0] * 3 // 4  # a quarter of 16 earlier patches goes
    scores = guikv(budget, cache=cache, rank=4)[0]
    assert (scores[:, 11:15] == 0).all()
    assert (scores[:, 15:19] > 0).all()


def test_a_full_basis_expresses_every_key():
    key = jnp.swapaxes(KEY, 1, 2)
    rest = redundancy(key, jnp.ones((B, K, S), bool))
    assert rest.max() < 1e-5
    # Repeated keys span less: no direction is made up of rounding.
    repeated = key.at[:, :, 1:H].set(key[:, :, :1])
    rest = redundancy(repeated, jnp.ones((B, K, S), bool))
    assert (rest[:, :, H:] > 0.1).all()


def test_streaming_keeps_sinks_and_a_window():
    small = keep(streaming_scores(QUERY, CACHE, sinks=3), 10)
    for b, length in enumerate(LENGTHS):
        want = [0, 1, 2, *range(length - 7, length)]
        assert [positions(small, b, k) for k in range(K)] == [want] * K
    assert_attends(small)
    # The same as a mask over the whole cache.
    mask = masks.Causal() & (masks.Window(6, 0) | masks.Prefix(3))
    got = decode(QUERY, small)
    want = attnx.decode_attention(QUERY, *CACHE, mask=mask)
    chex.assert_trees_all_close(got[:, -1], want[:, -1], atol=1e-6)


def test_small_keys_stay():
    small = keep(key_norm_scores(QUERY, CACHE), 6)
    for b, k in np.ndindex(B, K):
        norms = np.linalg.norm(KEY[b, : LENGTHS[b], k], axis=1)
        assert positions(small, b, k) == sorted(np.argsort(norms)[:6].tolist())


@pytest.mark.parametrize(
    "policy", [streaming_scores, snapkv_scores, key_norm_scores, guikv]
)
def test_a_full_budget_evicts_nothing(policy):
    scores = guikv(S) if policy is guikv else policy(QUERY, CACHE)
    whole = evict(CACHE, scores, S)
    used = SparseCache.of(CACHE).positions >= 0
    np.testing.assert_array_equal(whole.positions, SparseCache.of(CACHE).positions)
    for got, want in zip(whole[:2], SparseCache.of(CACHE)[:2], strict=True):
        np.testing.assert_array_equal(got[used], want[used])
    want = attnx.decode_attention(QUERY, *CACHE)
    chex.assert_trees_all_close(decode(QUERY, whole), want, atol=1e-6)


def test_masks_mean_positions_in_the_sequence():
    small = keep(snapkv(QUERY, CACHE), 14)
    assert_attends(
        small,
        mask=masks.Causal() & masks.Window(9, 0) & ~masks.Prefix(2),
        visible=lambda q, k: 2 <= k <= q <= k + 9,
    )
    # A mask may differ from head to head, and look into arrays by position.
    left = jnp.array([3, 30, 9, 20])
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 3, (B, S)))
    mask = masks.Window(left, 0) & masks.Segments(ids)
    got = decode(QUERY, small, mask=mask)
    whole = attnx.masks.Offset(mask, query=CACHE.lengths - WINDOW)
    seen = np.broadcast_to(whole.to_dense(WINDOW, S, batch=B, heads=N), (B, N, 4, S))
    kept = np.zeros((B, K, S), bool)
    for b, k in np.ndindex(B, K):
        kept[b, k, positions(small, b, k)] = True
    seen = seen & np.repeat(kept, N // K, 1)[:, :, None]
    want = attnx.dot_product_attention(QUERY, KEY, VALUE, mask=jnp.asarray(seen))
    chex.assert_trees_all_close(got, want, atol=1e-6)


def test_rotary_positions_survive_eviction():
    """Prefill, evict, decode: what the whole sequence gives with the rest hidden."""
    length, rotary = 24, Rotary()
    query, key, value = normal(
        2, (B, length, N, H), (B, length, K, H), (B, length, K, V)
    )
    position = jnp.arange(length)
    query, key = rotary(query, position), rotary(key, position)
    prompt = 20
    cache = KVCache.create(B, prompt, K, H, value_size=V)
    cache = cache.append(key[:, :prompt], value[:, :prompt])
    scores = snapkv_scores(query[:, prompt - 4 : prompt], cache)
    small = evict(cache, scores, 8, capacity=12)
    assert small.lengths.tolist() == [prompt] * B
    outputs = []
    for t in range(prompt, length):
        now = slice(t, t + 1)
        small = small.append(key[:, now], value[:, now])
        outputs.append(decode(query[:, now], small))
    assert small.counts().tolist() == [[12] * K] * B
    kept = np.zeros((B, K, length), bool)
    for b, k in np.ndindex(B, K):
        kept[b, k, small.positions[b, k]] = True
    seen = np.repeat(kept, N // K, 1)[:, :, None] & np.tri(length, dtype=bool)
    want = attnx.dot_product_attention(query, key, value, mask=jnp.asarray(seen))
    got = jnp.concatenate(outputs, 1)
    chex.assert_trees_all_close(got, want[:, prompt:], atol=1e-6)
    with pytest.raises(ValueError, match="cache: expected room for 13 tokens"):
        small.append(key[:, :1], value[:, :1])


def test_heads_may_have_budgets_of_their_own():
    scores = snapkv(QUERY, CACHE)
    budget = jnp.array([[3, 9], [12, 1]])
    small = keep(scores, budget)
    np.testing.assert_array_equal(small.counts(), budget)
    assert_attends(small)
    small = small.append(KEY[:, :1], VALUE[:, :1])
    np.testing.assert_array_equal(small.counts(), budget + 1)
    for b, k in np.ndindex(B, K):
        new = int(budget[b, k])
        np.testing.assert_array_equal(small.key[b, k, new], KEY[b, 0, k])
        assert small.positions[b, k, new] == LENGTHS[b]


def test_adaptive_budgets_keep_the_best_of_all_heads():
    scores = normal(3, (B, K, S))[0].at[:, 0].add(1.0)
    got = adaptive_budgets(scores, 9, safeguard=0.4)
    for b in range(B):
        ranked = -np.sort(-np.asarray(scores[b]), axis=1)
        rest = sorted(((x, k) for k in range(K) for x in ranked[k, 3:]), reverse=True)
        want = [3 + sum(k == n for _, k in rest[: 2 * 9 - 2 * 3]) for n in range(K)]
        assert got[b].tolist() == want
    assert adaptive_budgets(scores, 9, safeguard=1.0).tolist() == [[9] * K] * B
    assert adaptive_budgets(scores, 99).tolist() == [[S] * K] * B


def test_eviction_again_goes_by_what_is_left():
    once = keep(snapkv(QUERY, CACHE), 14)
    twice = keep(snapkv(QUERY, once), 7, once)
    for b, k in np.ndindex(B, K):
        assert set(positions(twice, b, k)) < set(positions(once, b, k))
    assert_attends(twice)


def test_one_program_for_all_lengths():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def fn(query, cache):
        small = evict(cache, snapkv_scores(query, cache), 6)
        return sparse_decode_attention(query, small)

    for lengths in (LENGTHS, (3, 0), (40, 7)):
        cache = CACHE._replace(lengths=jnp.array(lengths))
        got = fn(QUERY, cache)
        small = evict(cache, snapkv_scores(QUERY, cache), 6)
        want = sparse_decode_attention(QUERY, small, implementation="reference")
        chex.assert_tree_all_finite(got)
        chex.assert_trees_all_close(got, want, atol=1e-6)
    assert (fn(QUERY, CACHE._replace(lengths=jnp.array([3, 0])))[1] == 0).all()


def test_half_precision_chooses_in_float32():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (KEY, VALUE, QUERY))
    cache = KVCache(*half[:2], CACHE.lengths)
    wide = KVCache(*(x.astype(jnp.float32) for x in half[:2]), CACHE.lengths)
    got = snapkv_scores(half[2], cache)
    want = snapkv_scores(half[2].astype(jnp.float32), wide)
    assert got.dtype == jnp.float32
    used = SparseCache.of(CACHE).positions >= 0
    np.testing.assert_array_equal(got[used], want[used])


@given(
    sizes=st.sampled_from([(40,), (13, 0, 26, 1), (1, 13, 26)]),
    seed=st.integers(0, 9),
)
def test_any_segments_in_any_order_are_the_whole(sizes, seed):
    parts = list(SparseCache.of(CACHE).split(sizes))
    np.random.default_rng(seed).shuffle(parts)
    got = dist_attention(QUERY, parts, return_residual=True)
    want = attention_to([[range(n)] * K for n in LENGTHS])
    for x, y in zip(got, want, strict=True):
        assert relative_rms(x, y) < 1e-6


def test_segments_take_tokens_apart():
    """The long past stays where it is; one segment grows."""
    past = SparseCache.of(CACHE)
    recent = SparseCache.create(B, 8, K, H, value_size=V)
    recent = recent._replace(lengths=past.lengths)
    key, value = normal(5, (B, 3, K, H), (B, 3, K, V))
    recent = recent.append(key, value)
    grown = past.grow(3).append(key, value)
    want = decode(QUERY[:, :3], grown)
    for parts in ((past, recent), (recent, past)):
        got = dist_attention(QUERY[:, :3], parts)
        chex.assert_trees_all_close(got, want, atol=1e-6)


def test_segments_on_devices_are_the_whole():
    """What travels is an output and a log-sum-exp a segment."""
    mesh = jax.make_mesh((8,), ("keys",), (jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec(None, None, "keys")
    everywhere = jax.sharding.PartitionSpec()

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(everywhere, SparseCache(spec, spec, spec, everywhere)),
        out_specs=everywhere,
        check_vma=False,
    )
    def fn(query, segment):
        part = sparse_decode_attention(query, segment, return_residual=True)
        return attnx.merge_attention(*(jax.lax.all_gather(x, "keys") for x in part))[0]

    want = attnx.decode_attention(QUERY, *CACHE)
    chex.assert_trees_all_close(fn(QUERY, SparseCache.of(CACHE)), want, atol=1e-6)


def test_gradients_pass_segments():
    def loss(split):
        def fn(query, key, value):
            cache = SparseCache.of(KVCache(key, value, CACHE.lengths))
            parts = cache.split((15, 25)) if split else (cache,)
            return jnp.sin(dist_attention(query, parts)).sum()

        return jax.jit(jax.grad(fn, (0, 1, 2)))(QUERY, KEY, VALUE)

    chex.assert_trees_all_close(loss(True), loss(False), atol=1e-5)


def test_mistakes_are_named():
    scores = snapkv(QUERY, CACHE)
    with pytest.raises(ValueError, match=r"scores: expected shape \(2, 2, 40\)"):
        evict(CACHE, scores[:, :1], 4)
    with pytest.raises(ValueError, match="budget: expected at least 1, got 0"):
        evict(CACHE, scores, 0)
    with pytest.raises(ValueError, match="capacity: expected at least 8, got 4"):
        evict(CACHE, scores, 8, capacity=4)
    with pytest.raises(ValueError, match="capacity: expected the slots"):
        evict(CACHE, scores, jnp.array([4, 5]))
    with pytest.raises(ValueError, match="kernel_size: expected an odd number, got 4"):
        snapkv_scores(QUERY, CACHE, kernel_size=4)
    with pytest.raises(ValueError, match=r"query: expected \[2, W, a multiple of 2, 8"):
        snapkv_scores(QUERY[..., :4], CACHE)
    with pytest.raises(ValueError, match="sizes: expected sizes that add up to 40"):
        SparseCache.of(CACHE).split((20, 21))
    with pytest.raises(ValueError, match="segments: expected at least one, got 0"):
        dist_attention(QUERY, [])
    with pytest.raises(ValueError, match=r"hidden: expected shape \(2, 40, 12\)"):
        guikv_scores(QUERY, CACHE, hidden=HIDDEN[:1], image_ids=IMAGES, budget=8)
