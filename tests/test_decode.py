"""Merging parts of the keys, decoding against a cache, and the cache itself."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_matches, normal
from hypothesis import given
from hypothesis import strategies as st

import attnx
from attnx import KVCache, masks

B, S, N, K, H, V = 2, 40, 4, 2, 8, 12
IMPLEMENTATIONS = ("reference", "xla")


def attend(query, key, value, **options):
    return attnx.dot_product_attention(
        query, key, value, return_residual=True, **options
    )


@given(cuts=st.lists(st.sampled_from([0, 1, 7, 20, 39, 40]), min_size=1, max_size=3))
def test_any_split_of_the_keys_merges_exactly(cuts):
    query, key, value = normal(0, (B, 5, N, H), (B, S, K, H), (B, S, K, V))
    edges = [0, *sorted(cuts), S]
    parts = []
    for low, high in itertools.pairwise(edges):
        part = masks.Lengths(None, jnp.full(B, high))
        part &= ~masks.Prefix(low)
        parts.append(attend(query, key, value, mask=part, implementation="reference"))
    merged = attnx.merge_attention(*zip(*parts, strict=True))
    chex.assert_trees_all_close(merged, attend(query, key, value), atol=2e-6)


def test_merge_of_empty_parts_is_empty():
    out, lse = jnp.zeros((3, 4)), jnp.full(3, -jnp.inf)

    def fn(out, lse):
        return attnx.merge_attention((out, out), (lse, lse))

    (merged, merged_lse), pull = jax.vjp(fn, out, lse)
    chex.assert_trees_all_equal((merged, merged_lse), (out, lse))
    chex.assert_tree_all_finite(pull((out + 1, jnp.ones(3))))


def test_gradients_flow_through_a_merge():
    arrays = normal(1, (B, 5, N, H), (B, S, K, H), (B, S, K, V))

    def split(query, key, value):
        halves = (slice(0, 13), slice(13, S))
        parts = [attend(query, key[:, s], value[:, s]) for s in halves]
        return attnx.merge_attention(*zip(*parts, strict=True))

    def whole(query, key, value):
        return attend(query, key, value, implementation="reference")

    assert_matches(split, whole, arrays)


def test_bad_parts_are_named():
    out, lse = jnp.zeros((3, 4)), jnp.zeros(3)
    with pytest.raises(ValueError, match="outputs: expected at least one"):
        attnx.merge_attention((), ())
    with pytest.raises(ValueError, match="lses: expected 2 parts, got 1"):
        attnx.merge_attention((out, out), (lse,))
    with pytest.raises(ValueError, match=r"lses: expected shape \(3,\)"):
        attnx.merge_attention((out,), (out,))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("mask", [None, masks.Window(6, 0)], ids=["causal", "window"])
def test_decoding_equals_the_whole_sequence(implementation, tokens, mask):
    query, key, value = normal(2, (B, S, N, H), (B, S, K, H), (B, S, K, V))
    want = attend(query, key, value, mask=masks.Causal() if mask is None else mask)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(cache, query, key, value):
        cache = cache.append(key, value)
        out = attnx.decode_attention(
            query,
            *cache,
            mask=mask,
            implementation=implementation,
            return_residual=True,
        )
        return cache, out

    cache = KVCache.create(B, S, K, H, value_size=V)
    for start in range(0, 12, tokens):
        now = slice(start, start + tokens)
        cache, got = step(cache, query[:, now], key[:, now], value[:, now])
        want_now = tuple(x[:, now] for x in want)
        chex.assert_trees_all_close(got, want_now, atol=2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_have_their_own_lengths(implementation):
    query, key, value = normal(3, (3, 2, N, H), (3, S, K, H), (3, S, K, V))
    lengths = np.array([40, 9, 1])
    out, lse = attnx.decode_attention(
        query,
        key,
        value,
        jnp.asarray(lengths),
        implementation=implementation,
        return_residual=True,
    )
    for row, length in enumerate(lengths):
        # With one token the first of the two queries lies before the sequence.
        seen = masks.Offset(masks.Causal(), query=int(length) - 2)
        want = attend(query[row], key[row, :length], value[row, :length], mask=seen)
        chex.assert_trees_all_close((out[row], lse[row]), want, atol=2e-6)
    chex.assert_trees_all_equal(out[2, 0], jnp.zeros((N, V)))
    assert (lse[2, 0] == -jnp.inf).all()


def test_work_follows_the_longest_row():
    """Keys past every length are not read: a NaN there would show."""
    query, key, value = normal(4, (B, 1, N, H), (B, 1024, K, H), (B, 1024, K, V))
    key, value = (x.at[:, 128:].set(jnp.nan) for x in (key, value))
    out = attnx.decode_attention(
        query, key, value, jnp.array([3, 128]), implementation="xla"
    )
    chex.assert_tree_all_finite(out)


def test_cache_appends_each_row_at_its_length():
    cache = KVCache.create(2, 4, 1, 1)._replace(lengths=jnp.array([0, 2]))
    tokens = jnp.array([1.0, 2.0]).reshape(1, 2, 1, 1) * jnp.ones((2, 1, 1, 1))
    cache = cache.append(tokens, -tokens)
    np.testing.assert_array_equal(cache.key[..., 0, 0], [[1, 2, 0, 0], [0, 0, 1, 2]])
    np.testing.assert_array_equal(cache.value, -cache.key)
    np.testing.assert_array_equal(cache.lengths, [2, 4])


def test_a_full_cache_says_so():
    cache = KVCache.create(2, 4, 1, 1)
    tokens = jnp.ones((2, 3, 1, 1))
    cache = cache.append(tokens, tokens)
    with pytest.raises(ValueError, match="room for 6 tokens, got a capacity of 4"):
        cache.append(tokens, tokens)
    # Under jit lengths are not known: the first tokens stay and the length tells.
    late = jax.jit(KVCache.append)(cache, 2 * tokens, 2 * tokens)
    np.testing.assert_array_equal(late.key[0, :, 0, 0], [1, 1, 1, 2])
    np.testing.assert_array_equal(late.lengths, [6, 6])


def test_bad_input_is_named():
    query, key, value = normal(5, (B, 1, N, H), (B, S, K, H), (B, S, K, V))
    lengths = jnp.array([3, 4])
    with pytest.raises(ValueError, match=r"lengths: expected shape \(2,\)"):
        attnx.decode_attention(query, key, value, lengths[:1])
    with pytest.raises(ValueError, match="lengths: expected an integer"):
        attnx.decode_attention(query, key, value, lengths.astype(float))
    with pytest.raises(ValueError, match="mask: expected a Mask"):
        attnx.decode_attention(query, key, value, lengths, mask=np.ones((1, S), bool))
    with pytest.raises(ValueError, match="key: expected shape"):
        KVCache.create(B, S, K, H).append(key[..., :3], value)
