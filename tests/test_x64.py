"""`jax_enable_x64` makes constants longer, and changes nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import normal

import attnx
from attnx import BlockMask, masks, select

T = 48


def dot_product(q):
    return attnx.dot_product_attention(q, q, q, local_window_size=(9, 0))


def with_a_bias(q):
    bias = jnp.ones((1, 1, T, T))  # A float64 one in x64 mode.
    return attnx.dot_product_attention(q, q, q, bias=bias, is_causal=True)


def blocks(q):
    block_mask = BlockMask.from_mask(masks.Causal(), T, T, block_size=(16, 16))
    return attnx.block_sparse_attention(q, q, q, block_mask=block_mask)


def neighborhood(q):
    return attnx.neighborhood_attention(q, q, q, kernel_size=7)


def decode(q):
    return attnx.decode_attention(q[:, -1:], q, q, jnp.array([40]))


def linear(q):
    log_decay = -jnp.abs(q[..., 0])
    return attnx.linear_attention(q, q, q, log_decay=log_decay)


def taylor(q):
    return attnx.taylor_attention(q, q, q)


def moba(q):
    return select.moba_attention(q, q, q, block_size=16, top_k=2)


def superlinear(q):
    return select.superlinear_attention(q, q, q, q)


@pytest.mark.parametrize(
    "fn",
    [
        dot_product,
        with_a_bias,
        blocks,
        neighborhood,
        decode,
        linear,
        taylor,
        moba,
        superlinear,
    ],
)
def test_results_are_those_without_x64(fn):
    (q,) = normal(0, (1, T, 2, 16))

    def run(q):
        out, pull = jax.vjp(fn, q)
        return out, *pull(out)

    want = jax.jit(run)(q)
    with jax.enable_x64(True):
        got = jax.jit(run)(q)
    for x, y in zip(got, want, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
