"""Queries that the attention kernel gathers, in Pallas' interpreter; places of rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SLOW, normal, relative_rms

from attnx import masks, select
from attnx.softmax import pallas
from pallas_kernels import mosaic
from pallas_kernels.rows import _in_tiles

T, S, BLOCK = 300, 384, 128


def routed(query, key, value, implementation, scope="head", block_size=BLOCK):
    blocks = select.Blocks.regular(S, block_size)
    scores = select.block_scores(query, select.pool_mean(key, blocks))
    return select.routed_attention(
        query,
        key,
        value,
        select.top_k_blocks(scores, 2, scope=scope),
        blocks,
        block_size=block_size,
        implementation=implementation,
        return_residual=True,
    )


@pytest.mark.parametrize(
    ("tiles", "block_size"),
    [*[pytest.param(n, BLOCK, marks=SLOW) for n in (1, 2)], (2, 192)],
)
def test_rows_of_each_block_are_gathered(tiles, block_size, monkeypatch):
    """Of blocks of 192 the first step has half as many keys."""
    monkeypatch.setattr(pallas, "tiles_in_turn", lambda *_, **__: (tiles, 0))
    run = functools.partial(routed, block_size=block_size)
    args = normal(0, (1, T, 2, 32), (1, S, 1, 32), (1, S, 1, 32), dtype="bfloat16")
    with mosaic.interpret():
        got = jax.jit(functools.partial(run, implementation="pallas"))(*args)
    # Float32 values of the same inputs, so that both choose the same blocks.
    wide = [x.astype(jnp.float32) for x in args]
    want = run(*wide, implementation="reference")
    np.testing.assert_allclose(got[1], want[1], atol=1e-2)
    assert relative_rms(got[0], want[0]) < 5e-3


@SLOW
@pytest.mark.parametrize("scope", ["row", "head"])
def test_gradients_of_gathered_rows(scope):
    args = normal(0, (1, T, 1, 32), (1, S, 1, 32), (1, S, 1, 32), dtype="bfloat16")

    def grads(implementation, *args):
        def loss(*args):
            out, lse = routed(*args, implementation, scope=scope)
            return (out.astype(jnp.float32) ** 2).sum() + lse.sum()

        return jax.grad(loss, (0, 1, 2))(*args)

    with mosaic.interpret():
        got = jax.jit(functools.partial(grads, "pallas"))(*args)
    want = grads("reference", *(x.astype(jnp.float32) for x in args))
    for found, right in zip(got, want, strict=True):
        assert relative_rms(found, right) < 1e-2


@SLOW
def test_runs_of_tiles_are_merged_with_what_is_beside(monkeypatch):
    monkeypatch.setattr("attnx.select.turns._PAIRS", 1)
    monkeypatch.setattr("attnx.select.turns._RUNS", 2)
    args = normal(1, (1, T, 2, 32), (1, S, 1, 32), (1, S, 1, 32), dtype="bfloat16")
    blocks = select.Blocks.regular(S, BLOCK)
    later = np.arange(T)[:, None] // BLOCK > np.arange(blocks.count)
    own = np.arange(S) // BLOCK
    scores = select.block_scores(*args[:1], select.pool_mean(args[1], blocks))
    choice = select.top_k_blocks(scores, 2, valid=later)

    def run(implementation, *args):
        return select.routed_attention(
            *args,
            choice,
            blocks,
            block_size=BLOCK,
            beside=masks.Causal() & masks.Segments(own[:T], own),
            implementation=implementation,
            return_residual=True,
        )

    with mosaic.interpret():
        got = jax.jit(functools.partial(run, "pallas"))(*args)
    want = run("reference", *(x.astype(jnp.float32) for x in args))
    np.testing.assert_allclose(got[1], want[1], atol=1e-2)
    assert relative_rms(got[0], want[0]) < 5e-3


@pytest.mark.parametrize("swizzle", [32, 64, 128])
def test_pieces_are_where_the_copy_engine_puts_them(swizzle):
    # Tiles of 8 rows, one swizzle wide; the bits from 2**7 change those from 2**4.
    rows, tiles = 64, 3
    pieces = tiles * swizzle // 16
    found = np.array(
        [
            [_in_tiles(row, piece, pieces, swizzle) for piece in range(pieces)]
            for row in range(rows)
        ]
    )
    row, byte = np.indices((rows, pieces)) * np.array([1, 16])[:, None, None]
    place = (row // 8 * tiles + byte // swizzle) * 8 * swizzle
    place += row % 8 * swizzle + byte % swizzle
    place ^= place >> 3 & swizzle - 16
    np.testing.assert_array_equal(16 * found, place)
    assert sorted(found.flat) == list(range(rows * pieces))
