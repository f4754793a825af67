"""Which implementation serves a call, and what `explain` says of it."""

import jax
import jax.numpy as jnp
import pytest

import attnx
from attnx._dispatch import dispatch

X = jnp.ones((1, 8, 2, 4))
CANDIDATES = {
    "reference": lambda x: x + 1,
    "xla": lambda x: x + 2,
    "pallas": lambda x: x + 3,
}


def run(x, *, implementation=None, candidates=CANDIDATES, reasons=()):
    return dispatch(
        "test",
        implementation,
        candidates,
        lambda name, x: dict(reasons).get(name),
        x,
    )


def test_the_platform_is_chosen_where_the_program_is_lowered():
    assert run(1.0) == 3  # xla, here
    lowered = jax.jit(run).trace(1.0).lower(lowering_platforms=("cuda",))
    assert "3.000000e+00" in lowered.as_text()
    assert "2.000000e+00" not in lowered.as_text()


@pytest.mark.parametrize(("name", "want"), [("reference", 2), ("xla", 3)])
def test_a_name_is_obeyed(name, want):
    assert run(1, implementation=name) == want


def test_a_name_that_cannot_serve_says_why():
    reasons = {"pallas": "head size 7 is not a multiple of 8"}
    with pytest.raises(NotImplementedError, match=r"implementation='pallas'\): head"):
        run(1, implementation="pallas", reasons=reasons)
    assert run(1, reasons=reasons) == 3
    some = {"reference": CANDIDATES["reference"]}
    with pytest.raises(NotImplementedError, match="not implemented in this version"):
        run(1, implementation="xla", candidates=some)
    assert run(1, candidates=some) == 2


def test_an_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match="'reference', 'xla', 'pallas', got 'triton'"):
        run(1, implementation="triton")


def test_explain_names_every_call_and_why():
    def model(x):
        y = attnx.dot_product_attention(x, x, x, is_causal=True)
        return attnx.linear_attention(y, x, x, implementation="reference")

    softmax, linear = attnx.explain(model, X).decisions
    assert (softmax.mechanism, softmax.runs) == ("dot_product_attention", "xla")
    assert softmax.why_not["reference"] == "xla is faster"
    assert softmax.why_not["pallas"].endswith("bfloat16 and float16, not float32")
    assert (linear.mechanism, linear.runs) == ("linear_attention", "reference")
    assert linear.why_not["xla"] == "not asked for"


def test_explain_knows_of_kernels():
    (decision,) = attnx.explain(run, X).decisions
    assert decision.runs == "pallas on CUDA, xla elsewhere"
    assert str(decision).startswith("test: pallas on CUDA, xla elsewhere\n  not ")


def test_explain_takes_shapes_and_runs_nothing():
    shape = jax.ShapeDtypeStruct((1, 1 << 20, 4, 64), jnp.bfloat16)
    report = attnx.explain(attnx.linear_attention, shape, shape, shape)
    assert report.decisions[0].runs == "pallas on CUDA, xla elsewhere"
    assert str(attnx.explain(jnp.sin, X)) == "no attnx call was traced"
