"""The parts of rows: where they are, and their sums, by XLA and by kernels."""

import contextlib
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import normal, relative_rms

from attnx import select
from attnx.select import parts, tiles
from attnx.softmax.pallas_rows import ROW_KERNELS
from pallas_kernels import mosaic

B, N, T, COUNT, V, TILE = 2, 2, 70, 30, 32, 4
SCORES = normal(0, (B, N, T, COUNT))[0]
# Some rows have no parts, some more than XLA reads in a pass; and slots stay empty.
VALID = (np.arange(COUNT) < np.arange(T)[:, None] - 5).astype(bool)
CHOICES = {
    "head": lambda: select.threshold_blocks(
        jnp.exp(SCORES), 0.6, scope="head", max_blocks=20, valid=VALID
    ),
    "row": lambda: select.top_k_blocks(SCORES, 3, valid=VALID),
}
IMPLEMENTATIONS = {"xla": jnp.float32, "pallas": jnp.bfloat16}


def planned(choice):
    return tiles.plan_tiles(choice.rows, choice.blocks, count=COUNT, tile=TILE)


def runs(plan, choice, implementation, shares):
    """`Rows` of each run of tiles, as the implementation has them."""
    split = plan.runs(shares, num_rows=T, per_row=choice.per_row)
    for run in split:
        rows = parts.Rows(*run[:4], None, T, choice.per_row)
        yield rows.by(ROW_KERNELS) if implementation == "pallas" else rows


def interpreted(implementation):
    if implementation == "pallas" and jax.default_backend() != "gpu":
        return mosaic.interpret()
    return contextlib.nullcontext()


def pairs(plan):
    """`(batch, head, row, place)` of all that are there."""
    for (b, n, p), place in np.ndenumerate(np.asarray(plan.places())):
        if place < plan.pair.shape[2]:
            yield b, n, int(plan.owner[b, n, p]), place


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("name", "shares", "has_rest"),
    [("head", (1,), False), ("head", (3, 1, 4), True), ("row", (1,), True)],
)
def test_parts_of_rows_are_merged(name, shares, has_rest, implementation):
    choice = CHOICES[name]()
    plan = planned(choice)
    size, dtype = plan.pair.shape[2], IMPLEMENTATIONS[implementation]
    out, own = normal(1, (B, size, N, V), (B, T, N, V), dtype=dtype)
    lse, own_lse = normal(2, (B, size, N), (B, T, N))
    lse = jnp.where(jnp.arange(size)[:, None] % 7 == 0, -jnp.inf, 30 * lse)
    rest = (own, own_lse.at[:, 2].set(-jnp.inf)) if has_rest else None

    @jax.jit
    def merged(out, lse, rest):
        start = 0
        for rows in runs(plan, choice, implementation, shares):
            stop = start + rows.index.shape[2]
            rest = rows.merge(out[:, start:stop], lse[:, start:stop], rest)
            start = stop
        return rest

    with interpreted(implementation):
        got = merged(out, lse, rest)
    weights = np.full((B, N, T, size + 1), -np.inf)
    for b, n, row, place in pairs(plan):
        weights[b, n, row, place] = lse[b, place, n]
    if has_rest:
        weights[..., -1] = jnp.swapaxes(rest[1], 1, 2)
    total = np.logaddexp.reduce(weights, -1)
    weights = np.exp(weights - np.where(np.isfinite(total), total, 0)[..., None])
    want = np.einsum("bntm,bmnv->btnv", weights[..., :-1], np.asarray(out, float))
    want += np.einsum("bnt,btnv->btnv", weights[..., -1], np.asarray(own, float))
    np.testing.assert_allclose(got[1], total.swapaxes(1, 2), rtol=1e-5, atol=1e-5)
    # Where several runs are merged the sum is rounded after each.
    assert relative_rms(got[0], want) < {"xla": 1e-6, "pallas": 4e-3}[implementation]
    assert np.isneginf(total).any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", CHOICES)
def test_gradients_of_rows_are_added_up(name, implementation):
    choice = CHOICES[name]()
    plan, dtype = planned(choice), IMPLEMENTATIONS[implementation]
    [rows] = runs(plan, choice, implementation, (1,))
    x, grads = normal(0, (B, T, N, V), (B, plan.pair.shape[2], N, V), dtype=dtype)

    @jax.jit
    def pulled(x, grads):
        taken, pull = jax.vjp(rows.take, x)
        return taken, *pull(grads)

    with interpreted(implementation):
        taken, got = pulled(x, grads)
    want = np.zeros((B, T, N, V))
    for b, n, row, place in pairs(plan):
        want[b, row, n] += np.asarray(grads[b, place, n], float)
        np.testing.assert_array_equal(taken[b, place, n], x[b, row, n])
    assert relative_rms(got, want) < {"xla": 1e-6, "pallas": 3e-3}[implementation]


def test_mapped_parts_are_merged():
    choice = CHOICES["head"]()
    plan = planned(choice)
    [rows] = runs(plan, choice, "pallas", (1,))
    size = plan.pair.shape[2]
    out, lse = normal(0, (2, B, size, N, V), (2, B, size, N))
    out = out.astype(jnp.bfloat16)
    with interpreted("pallas"):
        got = jax.jit(jax.vmap(lambda *x: rows.merge(*x, None)))(out, lse)
        want = [jax.jit(rows.merge)(*x, None) for x in zip(out, lse, strict=True)]
    chex.assert_trees_all_close(got, jax.tree.map(lambda *x: jnp.stack(x), *want))


@pytest.mark.parametrize("size", [32, 64, 96, 128, 256])
def test_kernels_lower_for_cuda(size):
    choice = CHOICES["head"]()
    plan = planned(choice)
    [rows] = runs(plan, choice, "pallas", (1,))
    places = plan.pair.shape[2]

    def merged_and_pulled(x, lse):
        taken, pull = jax.vjp(rows.take, x)
        return rows.merge(taken, lse, (x, lse[:, :T])), pull(taken)

    structs = (
        jax.ShapeDtypeStruct((B, T, N, size), jnp.float16),
        jax.ShapeDtypeStruct((B, places, N), jnp.float32),
    )
    run = jax.jit(merged_and_pulled).trace(*structs)
    text = run.lower(lowering_platforms=("cuda",)).as_text()
    assert len(re.findall(r"custom_call @mosaic_gpu\w*\(", text)) == 2


@pytest.mark.parametrize("scope", select.choice.SCOPES)
def test_lists_have_the_rows_in_order(scope):
    for choose in (
        functools.partial(select.top_k_blocks, k=3),
        functools.partial(select.threshold_blocks, threshold=0.05, max_blocks=4),
    ):
        choice = choose(jnp.exp(SCORES), scope=scope, valid=VALID)
        rows, blocks = np.asarray(choice.rows), np.asarray(choice.blocks)
        length = choice.grid[0] // rows.shape[1] * T
        empty = rows == length
        np.testing.assert_array_equal(empty, blocks == COUNT)
        if scope == "row":
            slots = np.arange(rows.shape[2]) // choice.per_row
            assert (empty | (rows == slots)).all()
        else:
            assert choice.per_row is None
            order = np.where(empty, length * COUNT, rows * COUNT + blocks)
            steps = np.diff(order)
            assert ((steps > 0) | empty[..., 1:]).all()
            assert (steps >= 0).all()
    assert empty.any()
