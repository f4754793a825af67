"""The GPU kernel of the generation step: interpreted, and lowered for CUDA."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import pytest
from helpers import assert_matches, normal

import attnx
from pallas_kernels import mosaic

B, N, K = 2, 2, 1
# key size, value size, shape of the decay, normalize
CASES = {
    "no decay": (64, 64, None, False),
    "per head": (64, 128, (N,), False),
    "per token, normalized": (128, 64, (B, N), True),
    "per channel": (64, 64, (B, N, 64), False),
    "per channel, normalized": (64, 128, (B, N, 64), True),
    "by columns": (256, 128, (B, N), False),
}
SINCE_0_11 = jax.__version_info__ >= (0, 11)
INTERPRETED = [name for name in CASES if SINCE_0_11 or name != "by columns"]
DTYPES = ["bfloat16", "float16", "float32"]


def arrays(name, dtype="bfloat16"):
    size, value_size, decay, normalize = CASES[name]
    shapes = [(B, N, size), (B, K, size), (B, K, value_size)]
    tokens = normal(0, *shapes, dtype=dtype)
    tokens = [jnp.abs(x) if normalize else x for x in tokens]
    shapes = [(B, N, size, value_size + normalize)] + [decay] * (decay is not None)
    state, *decays = normal(1, *shapes)
    state = jnp.abs(state) if normalize else state
    return *tokens, state, *(-jnp.abs(x) for x in decays)


def step(implementation, name):
    def fn(query, key, value, state, log_decay=None):
        return attnx.linear_attention_step(
            *(state, query, key, value),
            log_decay=log_decay,
            normalize=CASES[name][-1],
            implementation=implementation,
        )

    return fn


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, "bfloat16") for name in INTERPRETED),
        *(("per head", dtype) for dtype in DTYPES[1:]),
    ],
)
def test_matches_the_reference(name, dtype):
    with mosaic.interpret():
        assert_matches(
            step("pallas", name), step("reference", name), arrays(name, dtype)
        )


@pytest.mark.parametrize("name", ["per head", "per channel, normalized"])
def test_xla_matches_the_reference(name):
    inputs = arrays(name, "float32")
    assert_matches(step("xla", name), step("reference", name), inputs)


@pytest.mark.parametrize("name", ["per head", "per token, normalized"])
def test_a_mapped_axis_joins_the_batch(name):
    tokens = [jnp.stack([x, x / 2]) for x in arrays(name, "float32")]
    by_head = name == "per head"
    axes = [0, 0, 0, 0, None if by_head else 0]
    if by_head:
        tokens[-1] = tokens[-1][0]
    with mosaic.interpret():
        got = jax.vmap(step("pallas", name), axes)(*tokens)
    want = jax.vmap(step("reference", name), axes)(*tokens)
    chex.assert_trees_all_close(got, want, rtol=2e-5, atol=2e-5)


def test_a_loop_of_steps_is_the_sequence():
    """A scan carries the state, which the kernel updates where it is."""
    query, key, value = normal(2, (1, 3, N, 64), (1, 3, K, 64), (1, 3, K, 64))
    state = jnp.zeros((1, N, 64, 64))
    log_decay = -jnp.ones(N) / 3

    def generate(state, tokens):
        tokens = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), tokens)
        run = lambda state, token: step("pallas", "per head")(*token, state, log_decay)[
            ::-1
        ]
        state, out = jax.lax.scan(run, state, tokens)
        return jnp.swapaxes(out, 0, 1), state

    with mosaic.interpret():
        got = jax.jit(generate)(state, (query, key, value))
    want = attnx.linear_attention(
        *(query, key, value),
        log_decay=log_decay,
        implementation="reference",
        return_state=True,
    )
    chex.assert_trees_all_close(got, want, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_lowers_for_cuda_with_the_state_in_place(name, dtype):
    fn = jax.jit(step("pallas", name), donate_argnums=3)
    lowered = fn.trace(*arrays(name, dtype)).lower(lowering_platforms=("cuda",))
    calls = re.findall(r"custom_call @mosaic_gpu.*", lowered.as_text())
    assert len(calls) == 1
    assert "output_operand_alias" in calls[0]


def test_explain_tells_who_takes_the_gradient():
    def gradient(*inputs):
        loss = lambda *inputs: step("pallas", "per head")(*inputs)[0].sum()
        return jax.grad(loss)(*inputs)

    first, second = attnx.explain(gradient, *arrays("per head", "float32")).decisions
    assert (first.mechanism, first.runs) == ("linear_attention_step", "pallas")
    assert second.mechanism == "gradient of linear_attention_step"
    assert second.runs == "xla"


@pytest.mark.parametrize(
    ("reason", "sizes", "dtype", "normalize"),
    [
        ("takes head sizes .*, not 48", (48, 64), "float32", False),
        ("normalizes value sizes up to 128, not 256", (64, 256), "float32", True),
        ("states in float32, not bfloat16", (64, 64), "bfloat16", False),
    ],
)
def test_what_is_not_served_says_why(reason, sizes, dtype, normalize):
    size, value_size = sizes
    call = functools.partial(
        attnx.linear_attention_step, implementation="pallas", normalize=normalize
    )
    shapes = (B, N, size, value_size + normalize), (B, N, size), (B, N, value_size)
    state, query, value = (jnp.zeros(shape, dtype) for shape in shapes)
    with pytest.raises(NotImplementedError, match=reason):
        call(state, query, query, value)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_matches_the_reference_on_a_gpu(name, dtype):
    assert_matches(step("pallas", name), step("reference", name), arrays(name, dtype))
