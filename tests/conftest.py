"""What every test shares."""

import os

# The tests compile far longer than they compute. Set before jax starts its backend.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
)

import chex
import hypothesis
import jax
import pytest

# Every new shape compiles, so few examples, no deadline, and the same ones each run.
hypothesis.settings.register_profile(
    "attnx", deadline=None, derandomize=True, max_examples=10
)
hypothesis.settings.load_profile("attnx")


@pytest.fixture
def float64():
    """Lets float64 arrays be made for the length of one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True)
def _fresh_trace_counts():
    """`chex.assert_max_traces` counts by name, and tests define functions anew."""
    chex.clear_trace_counter()
