"""Routing Transformer."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_matches, normal

import attnx
from attnx.select import Centroids, cluster_members, unit_variance

B, T, N, K, H = 2, 30, 4, 2, 8
ARRAYS = normal(0, (B, T, N, H), (B, T, K, H), (B, T, K, H))
QUERY, KEY, VALUE = ARRAYS
(CENTROIDS,) = normal(1, (N, 5, H))
LENGTHS = jnp.array([30, 17])


def routing(implementation=None, *, cluster_size=6, **options):
    return functools.partial(
        attnx.routing_attention,
        cluster_size=cluster_size,
        implementation=implementation,
        **options,
    )


causal = jax.jit(routing(is_causal=True))


def layer_norm(x):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def definition(query, key, value, centroids, size, length, is_causal):
    """One head in float64, cluster by cluster."""
    query, key = layer_norm(query), layer_norm(key)
    total, count = np.zeros((len(query), value.shape[1])), np.zeros(len(query))
    for centroid in centroids:
        queries, keys = (
            np.sort(np.argsort(-x[:length] @ centroid, kind="stable")[:size])
            for x in (query, key)
        )
        for i in queries:
            count[i] += 1
            seen = [j for j in keys if j <= i or not is_causal]
            if seen:
                s = key[seen] @ query[i] * query.shape[1] ** -0.5
                weights = np.exp(s - s.max())
                total[i] += weights @ value[seen] / weights.sum()
    return total / np.maximum(count, 1)[:, None], count


@pytest.mark.parametrize("is_causal", [True, False])
def test_is_the_definition(is_causal):
    fn = causal if is_causal else jax.jit(routing(lengths=LENGTHS))
    lengths = (T, T) if is_causal else LENGTHS.tolist()
    got = fn(*ARRAYS, CENTROIDS)
    wide = [np.asarray(x, np.float64) for x in ARRAYS]
    orphans = 0
    for b, n in np.ndindex(B, N):
        arrays = [x[b, :, i] for x, i in zip(wide, (n, n // 2, n // 2), strict=True)]
        want, count = definition(*arrays, CENTROIDS[n], 6, lengths[b], is_causal)
        np.testing.assert_allclose(got[b, :, n], want, atol=2e-6)
        orphans += (count == 0).sum()
        assert (got[b, count == 0, n] == 0).all()
    assert orphans > 0


def test_matches_the_reference_gradients_included():
    def fn(implementation):
        run = routing(implementation, is_causal=True, lengths=LENGTHS, scale=0.5)
        return lambda *arrays: (run(*arrays, jnp.asarray(CENTROIDS, arrays[0].dtype)),)

    assert_matches(fn("xla"), fn("reference"), ARRAYS)


def test_one_cluster_is_attention_of_normalized_queries_and_keys():
    one = jax.jit(routing(cluster_size=99, is_causal=True))
    got = one(*ARRAYS, CENTROIDS[:, :1])
    want = attnx.dot_product_attention(
        unit_variance(QUERY), unit_variance(KEY), VALUE, is_causal=True
    )
    chex.assert_trees_all_close(got, want, atol=2e-6)


def test_clusters_that_are_apart_attend_apart():
    """Tokens of three topics: block-diagonal attention once they are in order."""
    topics = unit_variance(jnp.asarray(np.random.default_rng(0).normal(size=(3, H))))
    topic = jnp.arange(T) % 3
    near = [topics[topic][None, :, None] + 0.1 * x for x in (QUERY, KEY)]
    centroids = jnp.broadcast_to(topics, (N, 3, H))
    got = jax.jit(routing(cluster_size=10, is_causal=True))(*near, VALUE, centroids)
    want = attnx.dot_product_attention(
        *(unit_variance(x) for x in near),
        VALUE,
        mask=attnx.masks.Causal() & attnx.masks.Segments(topic),
    )
    chex.assert_trees_all_close(got, want, atol=2e-6)


def test_members_are_counted_and_in_order():
    members = np.asarray(cluster_members(KEY, CENTROIDS, 6, lengths=jnp.array([30, 4])))
    assert members.shape == (B, N, 5, 6)
    assert (np.diff(members, axis=-1) >= 0).all()
    assert (members[1, ..., 4:] == T).all()
    for n, c in np.ndindex(N, 5):
        best = np.argsort(-KEY[0, :, n // 2] @ CENTROIDS[n, c])[:6]
        assert members[0, n, c].tolist() == sorted(best.tolist())
        assert set(members[1, n, c, :4]) == {0, 1, 2, 3}


def test_a_token_in_two_equal_clusters_is_in_one():
    twice = jnp.repeat(CENTROIDS, 2, 1)
    chex.assert_trees_all_close(
        causal(*ARRAYS, twice), causal(*ARRAYS, CENTROIDS), atol=2e-6
    )


def test_values_come_from_the_past_but_membership_looks_ahead():
    """The method's definition: tokens compete with those after them."""
    before = causal(*ARRAYS, CENTROIDS)
    after = causal(QUERY, KEY, VALUE.at[:, 20:].multiply(-7.0), CENTROIDS)
    chex.assert_trees_all_equal(after[:, :20], before[:, :20])
    later = [x.at[:, 20:].multiply(-7.0) for x in ARRAYS]
    assert (causal(*later, CENTROIDS)[:, :20] != before[:, :20]).any()


def test_padding_changes_nothing():
    fn = jax.jit(routing(is_causal=True, lengths=LENGTHS))
    got = fn(*ARRAYS, CENTROIDS)
    noise = [x.at[1, 17:].multiply(-7.0) for x in ARRAYS]
    after = fn(*noise, CENTROIDS)
    chex.assert_trees_all_equal(after[1, :17], got[1, :17])
    assert (got[1, 17:] == 0).all()


def test_the_moving_average_is_the_formula():
    query, key = unit_variance(QUERY), unit_variance(KEY)
    start = Centroids(CENTROIDS * 2, jnp.full((N, 5), 2.0))
    got = start.update(query, key, decay=0.9, lengths=LENGTHS)
    for n in range(N):
        tokens = [
            np.asarray(x[b, : LENGTHS[b], i], np.float64)
            for x, i in ((query, n), (key, n // 2))
            for b in range(B)
        ]
        tokens = np.concatenate(tokens)
        means = np.asarray(start.means()[n], np.float64)
        nearest = ((tokens[:, None] - means) ** 2).sum(-1).argmin(1)
        for c in range(5):
            mine = tokens[nearest == c]
            want = 0.9 * 2 * CENTROIDS[n, c] + 0.05 * mine.sum(0)
            np.testing.assert_allclose(got.sums[n, c], want, atol=1e-5)
            assert abs(got.counts[n, c] - (0.9 * 2 + 0.05 * len(mine))) < 1e-5
    np.testing.assert_allclose(got.means(), got.sums / got.counts[..., None], rtol=1e-4)


def test_centroids_converge_to_the_means_of_clusters():
    topics = unit_variance(jnp.asarray(np.random.default_rng(0).normal(size=(3, H))))
    x = topics[jnp.arange(T) % 3][None, :, None] + 0.1 * QUERY
    centroids = Centroids(jnp.broadcast_to(topics + 0.3, (N, 3, H)), jnp.ones((N, 3)))
    step = jax.jit(functools.partial(Centroids.update, decay=0.5))
    for _ in range(40):
        centroids = step(centroids, x, x)
    want = jnp.stack([x[:, c::3].mean((0, 1)) for c in range(3)], 1)
    chex.assert_trees_all_close(centroids.means(), want, atol=1e-4)
    spread = jnp.stack([x[:, c::3] - want[:, c] for c in range(3)])
    chex.assert_trees_all_close(centroids.distance(x), (spread**2).mean(), atol=1e-4)
    d_x = jax.grad(centroids.distance)(x)
    assert jnp.abs(d_x).max() > 0
    d_centroids = jax.grad(lambda c: c.distance(x))(centroids)
    chex.assert_trees_all_equal(d_centroids, jax.tree.map(jnp.zeros_like, centroids))


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"centroids: expected \[N, c, 8\]"):
        routing()(*ARRAYS, CENTROIDS[..., :4])
    with pytest.raises(ValueError, match="cluster_size: expected at least 1, got 0"):
        routing(cluster_size=0)(*ARRAYS, CENTROIDS)
    with pytest.raises(ValueError, match=r"lengths: expected shape \(2,\)"):
        routing(lengths=LENGTHS[:1])(*ARRAYS, CENTROIDS)
    with pytest.raises(NotImplementedError, match="float32"):
        routing("pallas")(*ARRAYS, CENTROIDS)
