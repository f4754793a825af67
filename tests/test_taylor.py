"""taylor_attention: against its reference, and against its features written out."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import GRADIENT_ERROR, SINCE_0_11, SLOW, assert_matches, normal

import attnx
from attnx import feature_maps
from attnx.linear import pallas_taylor
from pallas_kernels import mosaic

B, T, N, K, H, V = 2, 150, 4, 2, 4, 6
SEGMENTS = np.repeat(np.arange(4), [50, 14, 1, 85])
SEGMENTS = np.stack([SEGMENTS, SEGMENTS[::-1] + 7])
# Sums of both signs are divided, and what is left of gradients of states is less.
ERROR = 1.5 * GRADIENT_ERROR["bfloat16"]


def attention(implementation, **options):
    def fn(query, key, value, state):
        return attnx.taylor_attention(
            query,
            key,
            value,
            initial_state=jnp.abs(state),
            implementation=implementation,
            return_state=True,
            **options,
        )

    return fn


def of_features(query, key, value, state):
    """The same by linear attention, features and all."""
    query, key = (feature_maps.taylor(x) for x in (query, key))
    return attnx.linear_attention(
        query,
        key,
        value,
        scale=1.0,
        initial_state=jnp.abs(state),
        normalize=True,
        implementation="reference",
        return_state=True,
    )


def arrays(length=T, size=H, value_size=V, heads=(B, N, K), dtype="float32"):
    batch, num_heads, key_heads = heads
    tokens = normal(
        0,
        (batch, length, num_heads, size),
        (batch, length, key_heads, size),
        (batch, length, key_heads, value_size),
        dtype=dtype,
    )
    rows = 1 + size + size * (size + 1) // 2
    return *tokens, *normal(1, (batch, num_heads, rows, value_size + 1))


def for_kernel(length=200, value_size=64):
    return arrays(length, 16, value_size, (1, 2, 1), "bfloat16")


@pytest.mark.parametrize("options", [{}, {"segment_ids": SEGMENTS}])
def test_xla_matches_the_reference(options):
    fns = (attention(name, **options) for name in ("xla", "reference"))
    assert_matches(*fns, arrays())


@pytest.mark.parametrize("length", [1, 64])
def test_any_length(length):
    assert_matches(attention("xla"), attention("reference"), arrays(length))


def test_the_reference_is_linear_attention_of_features():
    assert_matches(of_features, attention("reference"), arrays(20))


def test_without_a_state_and_a_batch():
    query, key, value, _ = arrays(70)
    whole = attnx.taylor_attention(query, key, value)
    one = attnx.taylor_attention(query[1], key[1], value[1])
    chex.assert_trees_all_close(one, whole[1], atol=1e-6)


def test_a_step_goes_on_from_the_state():
    query, key, value, _ = arrays(70)
    call = functools.partial(attnx.taylor_attention, return_state=True)
    want, last = call(query, key, value)
    _, state = call(query[:, :-1], key[:, :-1], value[:, :-1])
    out, state = attnx.linear_attention_step(
        state,
        *(feature_maps.taylor(x[:, -1]) for x in (query, key)),
        value[:, -1],
        scale=1.0,
        normalize=True,
    )
    chex.assert_trees_all_close(out, want[:, -1], atol=1e-5)
    chex.assert_trees_all_close(state, last, atol=1e-4)


def test_features_of_all_tokens_are_never_in_memory():
    tokens = [jax.ShapeDtypeStruct((1, 4096, 1, 16), jnp.float32)] * 3

    def gradients(*tokens):
        out, pull = jax.vjp(attnx.taylor_attention, *tokens)
        return pull(out)

    shapes = re.findall(r"f32\[([\d,]+)\]", str(jax.make_jaxpr(gradients)(*tokens)))
    sizes = [np.prod([int(n) for n in shape.split(",")]) for shape in shapes]
    assert max(sizes) < 4096 * 153


@SLOW
def test_the_kernel_matches_the_reference():
    with mosaic.interpret():
        assert_matches(
            attention("pallas"),
            attention("reference"),
            for_kernel(),
            gradient_error=ERROR,
        )


@SLOW
def test_a_sequence_in_pieces_is_the_whole(monkeypatch):
    monkeypatch.setattr(pallas_taylor, "number_of_pieces", lambda *_: 2)
    with mosaic.interpret():
        assert_matches(
            attention("pallas"),
            attention("reference"),
            for_kernel(),
            gradient_error=ERROR,
        )


@pytest.mark.skipif(not SINCE_0_11, reason="the detector came with jax 0.11")
def test_no_memory_is_raced_for():
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    def gradients(*arrays):
        out, pull = jax.vjp(attention("pallas"), *arrays)
        return pull(out)

    with mosaic.interpret(detect_races=True):
        tokens = arrays(256, 16, 64, (1, 1, 1), "bfloat16")
        jax.block_until_ready(jax.jit(gradients)(*tokens))
        assert not gpu_callbacks.get_races().races_found


@pytest.mark.parametrize("value_size", pallas_taylor.VALUE_SIZES)
def test_lowers_for_cuda(value_size):
    shapes = (2, 8192, 2, 16), (2, 8192, 1, 16), (2, 8192, 1, value_size)
    tokens = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]

    def gradients(*tokens):
        fn = functools.partial(attnx.taylor_attention, implementation="pallas")
        out, pull = jax.vjp(fn, *tokens)
        return pull(out)

    lowered = jax.jit(gradients).trace(*tokens).lower(lowering_platforms=("cuda",))
    calls = re.findall(r"custom_call @mosaic_gpu", lowered.as_text())
    # Both directions sum the pieces' states first; then outputs, dq, and dk with dv.
    assert len(calls) == 5


@pytest.mark.parametrize(
    ("reason", "dtype", "size", "value_size", "options"),
    [
        ("takes bfloat16, not float16", "float16", 16, 64, {}),
        ("takes queries and keys of 16, not 8", "bfloat16", 8, 64, {}),
        ("takes values of .*, not 48", "bfloat16", 16, 48, {}),
        ("one document", "bfloat16", 16, 64, {"segment_ids": jnp.zeros((1, 9), int)}),
    ],
)
def test_what_is_not_served_says_why(reason, dtype, size, value_size, options):
    shapes = (1, 9, 2, size), (1, 9, 2, size), (1, 9, 2, value_size)
    tokens = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    call = functools.partial(attnx.taylor_attention, implementation="pallas", **options)
    with pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(call, *tokens)


def test_bad_arguments_are_named():
    query, key, value, state = arrays(9)
    with pytest.raises(ValueError, match=r"initial_state: expected shape .*15, 7"):
        attnx.taylor_attention(query, key, value, initial_state=state[:, :, :-1])
    with pytest.raises(ValueError, match="key: expected shape"):
        attnx.taylor_attention(query, key[..., :-1], value)
    with pytest.raises(ValueError, match="query: expected rank 3 or 4"):
        attnx.taylor_attention(query[0, 0], key, value)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("value_size", pallas_taylor.VALUE_SIZES)
def test_matches_the_reference_on_a_gpu(value_size):
    assert_matches(
        attention("pallas"),
        attention("reference"),
        for_kernel(1000, value_size),
        gradient_error=ERROR,
    )
