"""Sums of gradients that other heads' blocks of threads fill and put in rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import normal

import attnx
from pallas_kernels import fragments, mosaic
from pallas_kernels.relay import Relay
from pallas_kernels.turns import PROCESSORS


def relay(batch, heads, blocks):
    return Relay(
        (batch, heads, 2 * blocks, 1, 64 * 32), blocks, 0.5, jnp.bfloat16, 128 * blocks
    )


@pytest.mark.parametrize(("heads", "blocks"), [(16, 128), (64, 32), (5, 1024)])
def test_what_runs_at_once_lies_between_a_head_and_those_it_serves(heads, blocks):
    it = relay(1, heads, blocks)
    # Blocks that serve a head begin a whole turn before those that need it, and those
    # that it needs have ended when it serves them.
    assert it.ahead * blocks >= PROCESSORS
    assert (it.behind - 1) * blocks >= PROCESSORS
    assert it.pays == (heads > 2 * it.behind)


def test_few_heads_do_without():
    assert not relay(1, 6, 128).pays
    assert not relay(3, 4, 8).pays


def test_the_first_heads_begin_as_zeros():
    it = relay(2, 5, 128)
    sums, rows, marks = it.begin()
    first = sums.reshape(10, -1)[: it.ahead]
    assert not np.any(first)
    assert rows.shape == (2, 2 * 128 * 64, 5, 32)
    assert marks[0].tolist() == [128] * it.ahead + [0] * (10 - it.ahead)
    assert not np.any(marks[1])


def test_the_last_heads_are_put_in_rows_and_no_others():
    (sums,) = normal(0, (2, 3, 2, 2, 64 * 32))
    rows = jnp.full((2, 128, 3, 64), 7, jnp.bfloat16)
    with mosaic.interpret():
        found = fragments.in_rows(sums, 0.5, jnp.bfloat16, rows, last=4)
    want = halved_rows(sums)
    heads = jnp.arange(6).reshape(2, 1, 3, 1)
    want = jnp.where(heads >= 2, want, rows)
    np.testing.assert_array_equal(*jax.tree.map(np.asarray, (found, want)))


def test_rows_are_put_where_they_belong():
    (sums,) = normal(0, (1, 2, 2, 2, 64 * 32))
    places = np.random.default_rng(0).permutation(128) - 28  # The least go nowhere.
    rows = jnp.full((1, 110, 2, 64), 7, jnp.bfloat16)
    with mosaic.interpret():
        found = fragments.in_rows(
            sums, 0.5, jnp.bfloat16, rows, places=jnp.asarray(places[None], jnp.int32)
        )
    want = rows.at[:, places[places >= 0]].set(halved_rows(sums)[:, places >= 0])
    assert np.all(want[:, 100:] == 7)
    np.testing.assert_array_equal(*jax.tree.map(np.asarray, (found, want)))


def test_many_heads_lower_where_numbers_have_64_bits():
    # Only the first heads' sums are filled before the kernel.
    tokens = jax.ShapeDtypeStruct((3, 1024, 16, 128), jnp.bfloat16)
    attention = functools.partial(attnx.dot_product_attention, implementation="pallas")
    assert "tensor<17x16x2x4096xf32>" in lowered_gradient(attention, tokens)


def test_many_heads_of_a_neighborhood_lower():
    image = jax.ShapeDtypeStruct((1, 31, 60, 24, 128), jnp.bfloat16)
    attention = functools.partial(
        attnx.neighborhood_attention, kernel_size=(9, 20), implementation="pallas"
    )
    text = lowered_gradient(attention, image)
    # Of 2048 places in tiles, 188 are padding.
    assert "tensor<9x32x2x4096xf32>" in text
    assert "tensor<1x1860x24x128xbf16>" in text


def halved_rows(sums):
    """Of 32 columns a part; the interpreter has a tile's sums row by row."""
    batch, heads, tiles, parts, _ = sums.shape
    rows = sums.reshape(*sums.shape[:-1], 64, 32).transpose(0, 2, 4, 1, 3, 5)
    rows = rows.reshape(batch, 64 * tiles, heads, 32 * parts)
    return (rows * 0.5).astype(jnp.bfloat16)


def lowered_gradient(attention, tokens):
    def loss(*tokens):
        return attention(*tokens).astype(jnp.float32).sum()

    with jax.enable_x64(True):
        traced = jax.jit(jax.grad(loss)).trace(tokens, tokens, tokens)
        return traced.lower(lowering_platforms=("cuda",)).as_text()
