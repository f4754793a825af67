"""Keys that come in several steps, and gradients that are added up over steps."""

import functools

import jax
import jax.numpy as jnp
import pytest
from helpers import SLOW, normal, relative_rms

import attnx
from attnx import masks, parallel
from attnx.softmax import KernelConfig, engine
from attnx.softmax.steps import Step
from pallas_kernels import mosaic

# Implementation, tokens, heads, those of keys, and the sizes of keys and values.
CASES = {
    "reference": ("reference", 256, 2, 1, 64, 32),
    "xla": ("xla", 256, 2, 1, 64, 32),
    "narrow": ("pallas", 128, 1, 1, 64, 64),
    "wide, shared": ("pallas", 256, 2, 1, 128, 64),
    "fixed order": (KernelConfig(deterministic=True), 128, 1, 1, 64, 64),
    "no whole tiles": ("pallas", 100, 1, 1, 64, 64),
}


@pytest.mark.parametrize(
    "case", [*[*CASES][:2], *[pytest.param(x, marks=SLOW) for x in [*CASES][2:]]]
)
def test_steps_come_to_the_whole(case):
    implementation, length, heads, key_heads, head_size, value_size = CASES[case]
    # Query 0 sees nothing, and of two tiles the first nothing after the first step: in
    # the second it keeps what it has, which the last puts in rows all the same.
    seen = masks.Causal() & ~masks.Prefix(1)
    half, most = masks.Prefix(length // 2), masks.Prefix(length * 3 // 4)
    parts = (seen & half, seen & most & ~half, seen & ~most)
    exact = [
        x.astype(jnp.float32)
        for x in normal(
            0,
            (1, length, heads, head_size),
            (1, length, key_heads, head_size),
            (1, length, key_heads, value_size),
            dtype="bfloat16",
        )
    ]
    whole = functools.partial(
        attnx.dot_product_attention,
        mask=seen,
        return_residual=True,
        implementation="reference",
    )
    (out, lse), pull = jax.vjp(whole, *exact)
    cotangents = normal(1, out.shape, lse.shape)
    grads = pull(cotangents)
    by_kernels = implementation not in ("reference", "xla")
    tokens = [x.astype(jnp.bfloat16) for x in exact] if by_kernels else exact
    dtype = tokens[0].dtype

    def take(sums, **options):
        for mask in parts:
            assert {x.dtype for x in sums} == {jnp.dtype(jnp.float32)}
            sums = engine.attend(
                "steps",
                *tokens,
                None,
                mask=mask,
                scale=None,
                implementation=implementation,
                known=options.get("known"),
                step=Step(sums, options.get("cotangents"), mask is parts[-1]),
            )
        return sums

    with mosaic.interpret():
        got, got_lse = take((jnp.zeros(out.shape), jnp.full(lse.shape, -jnp.inf)))
        got_grads = take(
            tuple(jnp.zeros(x.shape) for x in tokens),
            known=(out.astype(dtype), lse),
            cotangents=(cotangents[0].astype(dtype), cotangents[1]),
        )
    finite = jnp.isfinite(lse)
    assert (finite == jnp.isfinite(got_lse)).all()
    assert not finite[:, 0].any()
    assert relative_rms(got_lse[finite], lse[finite]) < 1e-5
    tolerance = 8e-3 if by_kernels else 1e-5
    for x, want in zip((got, *got_grads), (out, *grads), strict=True):
        assert x.dtype == dtype
        assert relative_rms(x, want) < tolerance


@SLOW
def test_the_steps_of_a_ring_by_kernels():
    """Of three pieces side by side, each of one tile."""
    shapes = [(1, 3 * 128, 1, 64)] * 3
    exact = [x.astype(jnp.float32) for x in normal(0, *shapes, dtype="bfloat16")]
    (cotangent,) = normal(1, shapes[0], dtype="bfloat16")
    whole = functools.partial(
        attnx.dot_product_attention, is_causal=True, implementation="reference"
    )
    want, pull = jax.vjp(whole, *exact)
    wanted = want, *pull(cotangent.astype(jnp.float32))

    def piece(*arrays):
        attend = functools.partial(
            parallel.ring_attention,
            axis_name="pieces",
            is_causal=True,
            order="zigzag",
            implementation="pallas",
        )
        out, pull = jax.vjp(attend, *arrays[:3])
        return out, *pull(arrays[3])

    def pieces(*arrays):
        cut = (parallel.to_zigzag(x, 3) for x in arrays)
        cut = (x.reshape(1, 3, 128, *x.shape[2:]) for x in cut)
        results = jax.vmap(piece, 1, 1, axis_name="pieces")(*cut)
        results = (x.reshape(1, 3 * 128, *x.shape[3:]) for x in results)
        return tuple(parallel.from_zigzag(x, 3) for x in results)

    with mosaic.interpret():
        got = jax.jit(pieces)(*(x.astype(jnp.bfloat16) for x in exact), cotangent)
    for x, y in zip(got, wanted, strict=True):
        assert x.dtype == jnp.bfloat16
        assert relative_rms(x, y) < 8e-3
