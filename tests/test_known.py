"""The gradient of a part of the keys where the result over all of them is known."""

import functools

import chex
import jax
import jax.numpy as jnp
import pytest
from helpers import normal, relative_rms

import attnx
from attnx import masks
from attnx.softmax import engine
from pallas_kernels import mosaic


@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas"])
def test_parts_of_the_keys_add_up_to_the_gradient_of_the_whole(implementation):
    query, key, value = (
        x.astype(jnp.float32)
        for x in normal(0, *[(1, 200, 1, 64)] * 3, dtype="bfloat16")
    )
    cotangents = normal(1, query.shape, query.shape[:3])

    hidden = ~masks.Prefix(1)
    whole = functools.partial(
        attnx.dot_product_attention,
        mask=hidden,
        return_residual=True,
        implementation="reference",
    )
    result, pull = jax.vjp(whole, query, key, value)
    want = pull(cotangents)
    dtype = jnp.bfloat16 if implementation == "pallas" else jnp.float32
    out, lse = result[0].astype(dtype), result[1]

    def part(query, key, value, mask):
        return engine.attend(
            "part",
            query,
            key,
            value,
            None,
            mask=mask,
            scale=None,
            implementation=implementation,
            known=(out, lse),
        )

    total = [jnp.zeros_like(x) for x in (query, key, value)]
    for keys, mask in ((slice(0, 90), hidden), (slice(90, 200), masks.Full())):
        tokens = [x.astype(dtype) for x in (query, key[:, keys], value[:, keys])]
        with mosaic.interpret():
            same, pull = jax.vjp(functools.partial(part, mask=mask), *tokens)
            grads = pull((cotangents[0].astype(dtype), cotangents[1]))
        chex.assert_trees_all_equal(same, (out, lse))
        total[0] += grads[0]
        for i, x in enumerate(grads[1:], 1):
            total[i] = total[i].at[:, keys].add(x.astype(jnp.float32))
    for got, x in zip(total, want, strict=True):
        assert relative_rms(got, x) < (8e-3 if implementation == "pallas" else 1e-5)
