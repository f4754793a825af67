"""Which implementation serves which call, for the README: `-m benchmarks.support`."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

import attnx

IMPLEMENTATIONS = ("reference", "xla", "pallas")


def markdown() -> str:
    """The table, asked of the library itself."""
    lines = ["| function | " + " | ".join(IMPLEMENTATIONS) + " |", "|---|---|---|---|"]
    for name, (fn, shapes) in _calls().items():
        cells = (_cell(fn, shapes, each) for each in IMPLEMENTATIONS)
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _calls():
    tokens = ((2, 256, 4, 64), (2, 256, 2, 64), (2, 256, 2, 64))
    lists = attnx.BlockMask.from_mask(
        attnx.masks.Causal(), 256, 256, block_size=(128, 128)
    )
    return {
        "dot_product_attention": (attnx.dot_product_attention, tokens),
        "block_sparse_attention": (
            functools.partial(attnx.block_sparse_attention, block_mask=lists),
            tokens,
        ),
        "neighborhood_attention": (
            functools.partial(attnx.neighborhood_attention, kernel_size=3),
            tuple((2, 16, 16, *shape[2:]) for shape in tokens),
        ),
        "decode_attention": (
            functools.partial(attnx.decode_attention, lengths=jnp.array([256, 9])),
            ((2, 1, 4, 64), *tokens[1:]),
        ),
        "linear_attention": (attnx.linear_attention, tokens),
        "taylor_attention": (
            attnx.taylor_attention,
            ((2, 256, 4, 16), (2, 256, 2, 16), tokens[2]),
        ),
    }


def _cell(fn, shapes, implementation):
    """The dtypes that are served, or why none is."""
    call = functools.partial(fn, implementation=implementation)
    served, reason = [], ""
    for dtype in ("float32", "bfloat16", "float16"):
        arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
        try:
            jax.eval_shape(call, *arrays)
        except NotImplementedError as error:
            reason = str(error).split(": ", 1)[1]
        else:
            served.append(dtype)
    return ", ".join(served) or reason


if __name__ == "__main__":
    print(markdown())
