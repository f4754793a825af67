"""Comparison of outputs and every gradient with float64; models with noise."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

# Relative root mean square: rounding of the inputs' dtype, not of a sloppy sum.
OUTPUT_ERROR = {"float32": 2e-6, "bfloat16": 4e-3, "float16": 1e-3}
GRADIENT_ERROR = {"float32": 5e-6, "bfloat16": 8e-3, "float16": 2e-3}

SINCE_0_11 = jax.__version_info__ >= (0, 11)
# Of kernels that are interpreted.
SLOW = pytest.mark.skipif(not SINCE_0_11, reason="takes long before jax 0.11")


def normal(seed, *shapes, dtype=jnp.float32):
    """Standard normal arrays, one a shape, of NumPy: nothing to compile."""
    random = np.random.default_rng(seed)
    return tuple(
        jnp.asarray(random.standard_normal(shape, np.float32)).astype(dtype)
        for shape in shapes
    )


def shaken(model, scale=0.1):
    """The same with noise on its parameters, since output layers start from 0."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [
        x + scale * jax.random.normal(k, x.shape)
        for k, x in zip(keys, leaves, strict=True)
    ]
    return nnx.merge(graph, jax.tree.unflatten(tree, moved), rest)


def relative_rms(got, want):
    """||got - want|| / ||want||, and 0 for two empty or zero arrays."""
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    chex.assert_equal_shape([got, want])
    seen = np.isfinite(want)
    np.testing.assert_array_equal(np.isfinite(got), seen)
    error, norm = np.linalg.norm(got[seen] - want[seen]), np.linalg.norm(want[seen])
    return error / norm if norm else error


def assert_matches(fn, oracle, arrays, *, output_error=None, gradient_error=None):
    """`fn` gives what `oracle` gives in float64, gradients of all arrays included.

    Both return a tuple of arrays. The gradient is of a fixed random combination of
    them, infinite entries (the log-sum-exp of an empty row) left out.
    """
    dtype = str(arrays[0].dtype)
    output_error = output_error or OUTPUT_ERROR[dtype]
    gradient_error = gradient_error or GRADIENT_ERROR[dtype]
    outputs, gradients = jax.jit(lambda *a: _with_gradients(fn, a))(*arrays)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in arrays]
        wanted, wanted_gradients = jax.jit(lambda *a: _with_gradients(oracle, a))(*wide)
    for i, (got, want) in enumerate(zip(outputs, wanted, strict=True)):
        error = relative_rms(got, want)
        assert error <= output_error, f"output {i}: {error:.2e} > {output_error:.0e}"
    for i, (got, want) in enumerate(zip(gradients, wanted_gradients, strict=True)):
        chex.assert_tree_all_finite(got)
        error = relative_rms(got, want)
        assert error <= gradient_error, f"gradient {i}: {error:.2e}"


def _with_gradients(fn, arrays):
    outputs, pull = jax.vjp(lambda *a: tuple(fn(*a)), *arrays)
    cotangents = []
    for i, out in enumerate(outputs):
        weights = np.random.default_rng(i).standard_normal(out.shape)
        cotangents.append(jnp.where(jnp.isfinite(out), weights, 0).astype(out.dtype))
    return outputs, pull(tuple(cotangents))
