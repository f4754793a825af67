"""Mixture of Block Attention for video."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_matches, normal

import attnx
from attnx.select import min_max, vmoba_block_sizes

B, SPACE, N, K, H = 2, (4, 2, 3), 4, 2, 8
T = 24
BOXES = vmoba_block_sizes(SPACE, temporal=1, spatial=(2, 1), spatiotemporal=(2, 1, 3))
ARRAYS = normal(0, (B, *SPACE, N, H), (B, *SPACE, K, H), (B, *SPACE, K, H))


def vmoba(implementation=None, **options):
    return functools.partial(
        attnx.vmoba_attention, implementation=implementation, **options
    )


def flat(x):
    return x.reshape(len(x), T, *x.shape[4:])


def boxes(size):
    """The box of each token, in row-major order of space."""
    grid = [n // s for n, s in zip(SPACE, size, strict=True)]
    where = np.indices(SPACE) // np.reshape(size, (3, 1, 1, 1))
    return np.ravel_multi_index(where, grid).ravel()


@pytest.mark.parametrize("size", BOXES, ids=["1-D", "2-D", "3-D"])
def test_is_attention_to_the_chosen_boxes_in_any_partition(size):
    """The tokens' order is the oracle's own: space is never permuted."""
    query, key, value = map(flat, ARRAYS)
    box, count = boxes(size), T // np.prod(size)
    means = jnp.stack([key[:, box == i].mean(1) for i in range(count)], 1)
    means = jnp.repeat(means, N // K, 2)
    scores = np.asarray(jnp.einsum("btnh,bcnh->bntc", query, means))
    own = box[:, None] == np.arange(count)
    ranked = np.where(own, np.inf, scores).reshape(B, N, -1)
    cut = -np.sort(-ranked)[..., 2 * T - 1 : 2 * T]
    chosen = (ranked >= cut).reshape(B, N, T, count)
    want = attnx.dot_product_attention(
        query,
        key,
        value,
        mask=jnp.asarray(chosen[..., box]),
        implementation="reference",
    )
    got = jax.jit(vmoba("xla", block_size=size, top_k=2))(*ARRAYS)
    chex.assert_trees_all_close(flat(got), want, atol=2e-6)


def test_matches_the_reference():
    options = {"block_size": BOXES[2], "threshold": 0.6, "max_blocks": 3}
    options |= {"scope": "layer", "normalize": "softmax", "return_residual": True}
    assert_matches(vmoba("xla", **options), vmoba("reference", **options), ARRAYS)


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 2},
        {"top_k": 2, "scope": "row"},
        {"threshold": 0.6, "max_blocks": 3},
        {"top_k": 2, "scope": "layer"},
    ],
    ids=str,
)
def test_heads_take_turns(options, monkeypatch):
    """They choose and attend in turn, or the choice of all is attended in runs."""
    take_turns(monkeypatch)
    options |= {"block_size": BOXES[2], "return_residual": True}
    assert_matches(vmoba("xla", **options), vmoba("reference", **options), ARRAYS)


def test_heads_with_keys_of_their_own_take_turns(monkeypatch):
    take_turns(monkeypatch)
    options = {"block_size": BOXES[2], "top_k": 2, "return_residual": True}
    arrays = normal(1, *[(B, *SPACE, 3, H)] * 3)
    assert_matches(vmoba("xla", **options), vmoba("reference", **options), arrays)


def take_turns(monkeypatch):
    monkeypatch.setattr("attnx.select.turns._PAIRS", 1)
    monkeypatch.setattr("attnx.select.turns._RUNS", 2)
    monkeypatch.setattr("attnx.select.boxes._SCORES", 1)


def test_a_scale_has_a_gradient():
    def grads(implementation):
        def loss(scale):
            options = {"block_size": BOXES[2], "top_k": 2, "scale": scale}
            return (vmoba(implementation, **options)(*ARRAYS) ** 2).sum()

        return jax.jit(jax.grad(loss))(0.3)

    chex.assert_trees_all_close(grads("xla"), grads("reference"), rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"block_size": BOXES[0], "top_k": 4},
        {"block_size": BOXES[1], "threshold": 1.1, "max_blocks": 3},
        {"block_size": SPACE, "top_k": 1},
    ],
)
def test_all_boxes_are_dense_attention(options):
    want = attnx.dot_product_attention(*map(flat, ARRAYS))
    got = jax.jit(vmoba("xla", **options))(*ARRAYS)
    chex.assert_trees_all_close(flat(got), want, atol=2e-6)


def test_one_box_is_the_own_one():
    segments = attnx.masks.Segments(boxes(BOXES[1])).to_dense(T, T)
    want = attnx.dot_product_attention(*map(flat, ARRAYS), mask=segments)
    got = jax.jit(vmoba(block_size=BOXES[1], top_k=1))(*ARRAYS)
    chex.assert_trees_all_close(flat(got), want, atol=2e-6)


def test_a_threshold_varies_without_another_program():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def fn(threshold):
        options = {"block_size": BOXES[2], "threshold": threshold, "max_blocks": 4}
        return vmoba("xla", **options)(*ARRAYS)

    for threshold in (0.0, 0.9):
        options = {"block_size": BOXES[2], "threshold": threshold, "max_blocks": 4}
        want = vmoba("reference", **options)(*ARRAYS)
        chex.assert_trees_all_close(fn(threshold), want, atol=2e-6)


def test_vmap():
    stacked = [jnp.stack([x, x[..., ::-1]]) for x in ARRAYS]
    options = {"block_size": BOXES[2], "top_k": 2, "scope": "layer"}
    got = jax.jit(jax.vmap(vmoba("xla", **options)))(*stacked)
    for i in range(2):
        want = vmoba("reference", **options)(*(x[i] for x in stacked))
        chex.assert_trees_all_close(got[i], want, atol=2e-6)


def test_softmax_keeps_more_attention_than_raw_scores_at_equal_cost():
    """Large queries eat the budget of raw scores; that of probabilities is fair."""
    random = np.random.default_rng(0)
    scores = random.normal(size=(1, 2, 64, 16)) * random.lognormal(size=(1, 2, 64, 1))
    mass = np.asarray(jax.nn.softmax(scores, -1))

    def kept(scores, scope):
        choice = attnx.select.top_k_blocks(jnp.asarray(scores), 2, scope=scope)
        return mass[np.asarray(choice.to_tiles())].sum() / mass.sum()

    raw = kept(min_max(jnp.asarray(scores), scope="head"), "head")
    assert raw < kept(scores, "row") < kept(mass, "head")


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"block_size: expected divisors of \(4, 2, 3"):
        vmoba(block_size=(3, 2, 2), top_k=1)(*ARRAYS)
    for options in ({}, {"threshold": 0.3}, {"top_k": 2, "max_blocks": 2}):
        with pytest.raises(ValueError, match="top_k: expected top_k alone or thresh"):
            vmoba(block_size=BOXES[2], **options)(*ARRAYS)
    with pytest.raises(ValueError, match="normalize: expected one of"):
        vmoba(block_size=BOXES[2], top_k=1, normalize="l2")(*ARRAYS)
    with pytest.raises(ValueError, match="value: expected query's space"):
        vmoba(block_size=BOXES[2], top_k=1)(*ARRAYS[:2], ARRAYS[2][:, 1:])
