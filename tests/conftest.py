"""What every test shares."""

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
