"""Tiles of queries that a block of threads serves one after the other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SLOW, normal, relative_rms

from attnx import dot_product_attention, masks
from attnx.softmax import pallas
from attnx.softmax.pallas_turns import tiles_in_turn
from pallas_kernels import mosaic
from pallas_kernels.turns import in_order, place


@SLOW
@pytest.mark.parametrize(("tiles", "late"), [(2, 0), (4, 1)])
def test_a_block_of_threads_serves_several_tiles(tiles, late, monkeypatch):
    monkeypatch.setattr(pallas, "tiles_in_turn", lambda *_, **__: (tiles, late))

    def both(*args, implementation):
        call = functools.partial(
            dot_product_attention,
            mask=masks.Causal() & ~masks.Prefix(40),
            return_residual=True,
            implementation=implementation,
        )
        (out, lse), pull = jax.vjp(call, *args)
        return out, lse, pull((args[0], jnp.where(jnp.isfinite(lse), 1, 0) / 8))

    args = normal(0, *[(1, 600, 1, 128)] * 3, dtype="bfloat16")
    with mosaic.interpret():
        got = jax.jit(functools.partial(both, implementation="pallas"))(*args)
    wide = [x.astype(jnp.float32) for x in args]
    want = both(*wide, implementation="reference")
    np.testing.assert_allclose(got[1], want[1], atol=1e-2)
    assert relative_rms(got[0], want[0]) < 4e-3
    for x, y in zip(got[2], want[2], strict=True):
        assert relative_rms(x, y) < 8e-3


@pytest.mark.parametrize(
    ("tiles", "late", "options"),
    [
        (16, 0, {}),
        # The first eight tiles of a head list fewer keys: they come last.
        (16, 8, {"local_window_size": (1023, 0)}),
        (1, 0, {"is_causal": True}),
        # Each block of threads meets the head that sees far once.
        (16, 8, {"mask": masks.Window(jnp.array([*[70] * 15, 900]), 0)}),
    ],
)
def test_known_lists_may_leave_one_block_of_threads_a_multiprocessor(
    tiles, late, options, monkeypatch
):
    found = []

    def kernel(query, *_, tiles, late, **rest):
        found.append((tiles, late))
        batch, length, heads, _ = query.shape
        return query, jnp.zeros((batch, heads, length))

    monkeypatch.setattr(pallas, "attention_kernel", kernel)
    call = functools.partial(dot_product_attention, implementation="pallas", **options)
    tokens = jax.ShapeDtypeStruct((1, 16384, 16, 128), jnp.bfloat16)
    jax.eval_shape(jax.jit(call), tokens, tokens, tokens)
    assert found == [(tiles, late)]


@pytest.mark.parametrize("late", [0, 3])
def test_tiles_have_a_number_each(late):
    costs = np.arange(2 * 3 * 10).reshape(2, 3, 10)
    ordered = in_order(costs, late)
    assert sorted(ordered) == list(range(60))
    for number, wanted in enumerate(ordered):
        assert costs[place(jnp.int32(number), costs.shape, late)] == wanted
    if late:  # The first of each head come after all others.
        assert (ordered[-2 * 3 * late :] % 10 < late).all()


@pytest.mark.parametrize(("total", "tiles"), [(100, 1), (4000, 31), (4307, 17)])
def test_tiles_that_are_alike_leave_a_few_blocks_of_threads(total, tiles):
    assert tiles_in_turn(None, total, slots=13, alike=True) == (tiles, 0)
