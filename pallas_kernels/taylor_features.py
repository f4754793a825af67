"""Features of the second order of exp, in registers, as products with linear forms.

    feature_f(x) = (left_f . x + [f = 0]) (right_f . x + [f <= SIZE])

Two matrix products make both factors of as many features as there are registers for,
and, the other way, what gradients of features are to the token.
"""

from __future__ import annotations

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
import numpy as np

from pallas_kernels import mosaic, products
from pallas_kernels.chunks import ROWS

SIZE = 16
FEATURES = 1 + SIZE + SIZE * (SIZE + 1) // 2
# Rows of the state, in tiles of a product's height; those beyond FEATURES stay 0.
TILES = tuple(pl.ds(row, ROWS) for row in range(0, FEATURES, ROWS))
STATE_ROWS = ROWS * len(TILES)
# Features of queries are made so many at a time.
PART = 32
PARTS = -(-FEATURES // PART)
# Features of queries and keys differ where x_i^2 would need a root of 2.
_LEFT, _OF_QUERY, _OF_KEY = range(3)
_SQUARES = slice(1 + SIZE, 1 + 2 * SIZE)
# A feature of keys is that of `attnx.feature_maps.taylor` times this.
KEY_FACTORS = np.ones(FEATURES, np.float32)
KEY_FACTORS[_SQUARES] = 2**0.5


class Forms:
    """Features in registers, of tokens in shared memory, as products with the forms."""

    def __init__(self, ref):
        self._ref = ref

    def of_queries(self, tokens, part):
        """Both factors of part of the features, a row a token."""
        left, right = (
            (tokens, mosaic.transposed(self._ref.at[form, part]))
            for form in (_LEFT, _OF_QUERY)
        )
        return self._factors(left, right, part, axis=1)

    def of_keys(self, tokens, part):
        """Part of the features, a column a token."""
        tokens = mosaic.transposed(tokens)
        left, right = ((self._ref.at[form, part], tokens) for form in (_LEFT, _OF_KEY))
        left, right = self._factors(left, right, part, axis=0)
        return left * right

    def back(self, out, factors, part):
        """`out` with gradients of tokens added, given those of queries' factors."""
        for form, factor in zip((_LEFT, _OF_QUERY), factors, strict=True):
            rows = self._ref.at[form, part]
            out = products.accumulated(out, factor.astype(rows.dtype), rows)
        return out

    @staticmethod
    def _factors(left, right, part, axis):
        def ones(x, count):
            index = part.start + mosaic.iota(x.shape[axis], axis)
            return x + mosaic.along((index < count).astype(x.dtype), axis, x.shape)

        left, right = products.two_products(left, right, lambda x: ones(x, 1))
        return left, ones(right, 1 + SIZE)


def coefficients(dtype) -> jax.Array:
    """Coefficients `[3, STATE_ROWS, SIZE]`, all exact in bfloat16."""
    forms = np.zeros((3, STATE_ROWS, SIZE), np.float32)
    row, column = np.triu_indices(SIZE, 1)
    each = np.arange(SIZE)
    first = np.concatenate([each, each, row])
    second = np.concatenate([each, column])
    forms[_LEFT, 1 + np.arange(len(first)), first] = 0.5
    forms[_OF_QUERY:, 1 + SIZE + np.arange(len(second)), second] = 0.5
    forms[_OF_QUERY, _SQUARES] /= 2
    return jnp.asarray(forms, dtype)
