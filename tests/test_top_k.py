"""The best blocks of each query: without all scores, by heads, and by the kernel."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SLOW, normal

from attnx import select
from attnx.select import top_k
from pallas_kernels import mosaic


def operands(length, count, heads, key_heads, size=64):
    """A query in bfloat16 and pooled keys in float32, whose products are exact.

    So many scores are equal, in whatever order they are summed.
    """
    query, pooled = normal(0, (1, length, heads, size), (1, count, key_heads, size))
    query, pooled = (jnp.round(2 * x) for x in (query, pooled))
    # More precise than bfloat16, as means are.
    return query.astype(jnp.bfloat16), pooled.astype(jnp.float32) * (1 + 2**-10)


def chosen(implementation, *arrays, k=3, **options):
    choice = select.top_k_pooled_blocks(
        *arrays, k, implementation=implementation, **options
    )
    assert choice.per_row == k
    return choice.to_tiles()


def test_is_top_k_of_the_scores():
    query, pooled = operands(20, 9, 4, 2)
    first = jnp.arange(20)[None] // 4
    stop = first + jnp.arange(20)[None] % 6
    block = jnp.arange(9)
    valid = (first[..., None] <= block) & (block < stop[..., None])
    scores = select.block_scores(query, pooled)
    want = select.top_k_blocks(scores, 3, valid=valid[:, None]).to_tiles()
    for name in ("reference", "xla"):
        got = chosen(name, query, pooled, first=first, stop=stop)
        chex.assert_trees_all_equal(got, want)
    assert {0, 1, 2, 3} == set(np.unique(want.sum(-1)).tolist())


def test_heads_may_be_scored_in_turn(monkeypatch):
    arrays = operands(20, 9, 4, 2)
    want = chosen("reference", *arrays)
    monkeypatch.setattr(top_k, "_SCORES", 1)
    chex.assert_trees_all_equal(chosen("xla", *arrays), want)


@SLOW
def test_the_kernel_chooses_the_same():
    query, pooled = operands(200, 300, 2, 1)
    stop = jnp.arange(200)[None] * 2
    first = jnp.maximum(stop - 290, 0)
    options = {"k": 5, "first": first, "stop": stop}
    with mosaic.interpret():
        got = chosen("pallas", query, pooled, **options)
    want = chosen("reference", query, pooled, **options)
    chex.assert_trees_all_equal(got, want)


def test_the_kernel_lowers_and_says_what_it_does_not_serve():
    query, pooled = operands(256, 128, 2, 1)
    fn = lambda *arrays: chosen("pallas", *arrays)
    lowered = jax.jit(fn).trace(query, pooled).lower(lowering_platforms=("cuda",))
    assert len(re.findall(r"custom_call @mosaic_gpu", lowered.as_text())) == 1
    with pytest.raises(NotImplementedError, match="bfloat16 queries, not float32"):
        chosen("pallas", query.astype(jnp.float32), pooled)
    with pytest.raises(NotImplementedError, match="up to 16 blocks, not 17"):
        chosen("pallas", query, pooled, k=17)


def test_mistakes_are_named():
    query, pooled = operands(8, 4, 2, 1)
    with pytest.raises(ValueError, match="k: expected an integer of at least 1, got 0"):
        select.top_k_pooled_blocks(query, pooled, 0)
    with pytest.raises(ValueError, match="stop"):
        select.top_k_pooled_blocks(query, pooled, 1, stop=jnp.zeros((1, 7), int))
