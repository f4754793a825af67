"""The denominator of kernel attention, carried as one more column of the values.

Every implementation and the generation step share these two functions: a column of
ones appended to the values makes the recurrence accumulate z, the decayed sum of the
keys, in the state's last column, and makes it put q·z in the output's last column.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Keeps a quotient finite where the denominator is a rounding error away from 0. Small
# enough to be invisible beside any denominator that a float32 sum of features gives.
EPS = 1e-12


def append_ones(value: jax.Array) -> jax.Array:
    """Values `[..., V]` with the column that counts: `[..., V + 1]`."""
    return jnp.concatenate([value, jnp.ones_like(value[..., :1])], axis=-1)


def divide_by_last(out: jax.Array) -> jax.Array:
    """Outputs `[..., V + 1]` to `[..., V]`; where the denominator is 0, 0."""
    denominator = out[..., -1:]
    empty = denominator == 0
    # The inner `where` keeps the division, hence its gradient, away from 0.
    quotient = out[..., :-1] / (jnp.where(empty, 1, denominator) + EPS)
    return jnp.where(empty, 0, quotient)
