"""Mixture of Block Attention."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_matches, normal

import attnx
from attnx.select import moba_mask

B, T, N, K, H = 2, 29, 4, 2, 8
BLOCK = 4
ARRAYS = normal(0, (B, T, N, H), (B, T, K, H), (B, T, K, H))
# Documents of all kinds: ragged, of whole blocks, of one token, shorter than a block.
LENGTHS = ((9, 8, 1, 3, 8), (2, 27))
SEGMENTS = jnp.array([np.repeat(np.arange(len(n)), n) for n in LENGTHS])


def moba(implementation=None, *, block_size=BLOCK, top_k=3, **options):
    return functools.partial(
        attnx.moba_attention,
        block_size=block_size,
        top_k=top_k,
        implementation=implementation,
        **options,
    )


routed = jax.jit(moba("xla"))


@jax.jit
def causal(*arrays):
    return attnx.dot_product_attention(*arrays, is_causal=True)


def visible(query, key, top_k):
    """The paper's gate, token by token: bool [T, T] of one head."""
    length, blocks = len(query), -(-len(query) // BLOCK)
    means = [key[i * BLOCK : (i + 1) * BLOCK].mean(0) for i in range(blocks)]
    seen = np.zeros((length, length), bool)
    for t in range(length):
        own = t // BLOCK
        gate = [np.inf if i == own else query[t] @ means[i] for i in range(own + 1)]
        for i in np.argsort(-np.array(gate), kind="stable")[:top_k]:
            seen[t, i * BLOCK : min((i + 1) * BLOCK, t + 1)] = True
    return seen


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_mask_is_the_papers_gate(top_k):
    query, key, _ = ARRAYS
    mask = moba_mask(query, key, block_size=BLOCK, top_k=top_k)
    got = np.broadcast_to(mask.to_dense(T, T, batch=B, heads=N), (B, N, T, T))
    query, key = np.asarray(query, np.float64), np.asarray(key, np.float64)
    for b in range(B):
        for n in range(N):
            want = visible(query[b, :, n], key[b, :, n // (N // K)], top_k)
            np.testing.assert_array_equal(got[b, n], want)


@pytest.mark.parametrize("segment_ids", [None, SEGMENTS], ids=["one", "packed"])
def test_routed_matches_the_reference(segment_ids):
    options = {"segment_ids": segment_ids, "scale": 0.5, "return_residual": True}
    assert_matches(moba("xla", **options), moba("reference", **options), ARRAYS)


def test_heads_in_turn_are_merged_with_their_own_blocks(monkeypatch):
    grads = lambda fn: jax.jit(jax.grad(lambda *x: (fn(*x) ** 2).sum(), (0, 1, 2)))
    want = grads(moba("xla"))(*ARRAYS)
    monkeypatch.setattr("attnx.select.turns._PAIRS", 1)
    monkeypatch.setattr("attnx.select.turns._RUNS", 2)
    got = grads(moba("xla"))(*ARRAYS)
    chex.assert_trees_all_close(got, want, atol=2e-5)


@pytest.mark.parametrize("block_size", [4, 64])
def test_all_blocks_are_causal_attention(block_size):
    got = jax.jit(moba("xla", block_size=block_size, top_k=8))(*ARRAYS)
    chex.assert_trees_all_close(got, causal(*ARRAYS), atol=2e-6)


def test_one_block_is_block_diagonal():
    mask = attnx.masks.Causal() & attnx.masks.Segments(np.arange(T) // BLOCK)
    want = attnx.dot_product_attention(*ARRAYS, mask=mask)
    chex.assert_trees_all_close(moba(top_k=1)(*ARRAYS), want, atol=2e-6)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("packed", [False, True])
def test_no_token_looks_ahead(implementation, packed):
    """So padding on the right changes nothing either."""
    fn = jax.jit(moba(implementation, segment_ids=SEGMENTS if packed else None))
    before = fn(*ARRAYS)
    for t in (6, 16, 21):
        later = [x.at[:, t:].multiply(-7.0) for x in ARRAYS]
        chex.assert_trees_all_equal(fn(*later)[:, :t], before[:, :t])


def test_no_gradient_flows_to_the_future():
    def output(*arrays):
        return moba("xla")(*arrays)[:, 13].sum()

    d_query, d_key, d_value = jax.jit(jax.grad(output, (0, 1, 2)))(*ARRAYS)
    for d in (d_key, d_value):
        assert (d[:, 14:] == 0).all()
        assert (d[:, :14] != 0).any()
    assert (jnp.delete(d_query, 13, axis=1) == 0).all()


def test_packed_documents_choose_as_alone():
    query, key, _ = ARRAYS
    options = {"block_size": BLOCK, "top_k": 2, "segment_ids": SEGMENTS}
    got = moba_mask(query, key, **options).to_dense(T, T, batch=B, heads=N)
    for b, lengths in enumerate(LENGTHS):
        want, start = np.zeros((T, T), bool), 0
        for length in lengths:
            part = slice(start, start := start + length)
            want[part, part] = visible(query[b, part, 0], key[b, part, 0], 2)
        np.testing.assert_array_equal(got[b, 0], want)


def test_order_of_earlier_blocks_does_not_matter():
    query, key, value = ARRAYS
    order = np.r_[8:12, 0:4, 4:8, 12:T]
    got = routed(query, key[:, order], value[:, order])[:, 12:]
    chex.assert_trees_all_close(got, routed(*ARRAYS)[:, 12:], atol=2e-6)


def test_of_equal_blocks_the_first_is_taken():
    query, key = ARRAYS[0], jnp.ones_like(ARRAYS[1])
    mask = moba_mask(query, key, block_size=BLOCK, top_k=2)
    seen = np.asarray(mask.to_dense(T, T, batch=B, heads=N))
    assert seen[..., 12:, :BLOCK].all()
    assert not seen[..., 16:, BLOCK:16].any()


def test_other_choices_reuse_the_program():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def fn(segments, *arrays):
        return moba("xla", segment_ids=segments)(*arrays)

    for seed, segments in ((1, SEGMENTS), (2, SEGMENTS[::-1])):
        arrays = normal(seed, *(x.shape for x in ARRAYS))
        want = moba("reference", segment_ids=segments)(*arrays)
        chex.assert_trees_all_close(fn(segments, *arrays), want, atol=2e-6)


def test_vmap_and_half_precision():
    stacked = [jnp.stack([x, -x]).astype(jnp.bfloat16) for x in ARRAYS]
    got = jax.jit(jax.vmap(moba("xla")))(*stacked)
    want = [moba("reference")(*(x[i] for x in stacked)) for i in range(2)]
    assert got.dtype == jnp.bfloat16
    chex.assert_trees_all_close(
        got.astype(jnp.float32), jnp.stack(want).astype(jnp.float32), atol=2e-2
    )


def test_newest_queries_against_a_cache():
    query, key, value = ARRAYS
    want = moba("reference")(*ARRAYS)
    new = 3
    lengths = jnp.array([T, 17])
    starts = lengths - new
    newest = jnp.stack([query[b, s : s + new] for b, s in enumerate(starts.tolist())])
    mask = moba_mask(newest, key, block_size=BLOCK, top_k=3, query_start=starts)
    got = attnx.decode_attention(newest, key, value, lengths, mask=mask)
    for b, start in enumerate(starts.tolist()):
        chex.assert_trees_all_close(got[b], want[b, start : start + new], atol=2e-6)


def test_memory_follows_top_k_not_all_pairs():
    length = 4096
    arrays = [jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)] * 3
    fn = jax.jit(moba("xla", block_size=128, top_k=3))
    memory = fn.lower(*arrays).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * length**2 / 8


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="top_k: expected at least 1, got 0"):
        moba(top_k=0)(*ARRAYS)
    with pytest.raises(ValueError, match="block_size: expected an integer"):
        moba(block_size=0)(*ARRAYS)
    with pytest.raises(ValueError, match="key: expected query's length"):
        moba()(ARRAYS[0], *(x[:, 1:] for x in ARRAYS[1:]))
    with pytest.raises(ValueError, match=r"segment_ids: expected shape \(2, 29\)"):
        moba(segment_ids=SEGMENTS[0])(*ARRAYS)
    with pytest.raises(NotImplementedError, match="float32"):
        moba("pallas")(*ARRAYS)
