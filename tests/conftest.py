"""What every test shares."""

import os

# Set before jax starts its backend. The tests compile far longer than they compute; and
# the threads of an interpreted kernel wait for one another in a pool that has a thread
# for each device, where too few would wait forever.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_backend_optimization_level=0 --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

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
