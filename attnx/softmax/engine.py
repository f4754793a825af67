"""What every softmax mechanism comes to: one checked call, one choice, two loops."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from attnx._checks import expect, expect_float, expect_shape
from attnx._dispatch import dispatch
from attnx.softmax import pallas, pallas_decode, reference, steps, xla
from attnx.softmax.block_mask import BlockMask
from attnx.softmax.mask import Mask
from attnx.softmax.merge import as_part
from attnx.softmax.pallas import KernelConfig
from attnx.softmax.pallas_rows import ROW_KERNELS, Rows
from attnx.softmax.tile_order import TileOrder


def attend(
    mechanism: str,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    *,
    mask: Mask | BlockMask,
    scale: float | jax.Array | None,
    implementation: str | KernelConfig | None,
    lists: Callable[[], BlockMask] | None = None,
    orders: Mapping[str, TileOrder] | None = None,
    decodes: bool = False,
    rows: Rows | None = None,
    rest: tuple[jax.Array, jax.Array] | None = None,
    known: tuple[jax.Array, jax.Array] | None = None,
    step: steps.Step | None = None,
) -> tuple[jax.Array, ...]:
    """Runs the engine on checked arrays: what every softmax mechanism comes to.

    Args:
      mechanism: the public function's name.
      query: `[B, T, N, H]`.
      key: `[B, S, K, H]`.
      value: `[B, S, K, V]`.
      bias: four axes, broadcastable to `[B, N, T, S]`, or None.
      mask: who sees whom.
      scale: factor on the scores; None for `H ** -0.5`.
      implementation: a name or None.
      lists: makes the block lists of `mask` where the usual ones would not do.
      orders: the order of tokens that an implementation wants, by name, if not as they
        come.
      decodes: few queries and a `Mask`; the GPU has a way of its own for these.
      rows: the rows of the query that attend, in the order of the mask's queries, if
        not all as they come. A row may do so more than once: its parts are merged.
      rest: with `rows`, one more part of every row of the query, as is returned.
      known: without them, the result over these keys and others, if there is one. Then
        nothing is attended: it is returned as it is, and its gradient is the part that
        goes by way of these keys.
      step: without rows and bias, the sums to which what these keys give is added.
        Those of gradients take what is known.

    Returns:
      The output `[B, T, N, V]` and the log-sum-exp `[B, T, N]`, or a step's sums.
    """
    batch, query_len, heads, head_size = query.shape
    if rows is not None:
        heads, query_len = rows.index.shape[1:]
    key_len = key.shape[1]
    if isinstance(mask, BlockMask):
        check_lists(mask, (batch, query_len, heads), key)
    if scale is None:
        scale = head_size**-0.5
    elif not isinstance(scale, int | float):
        # A traced scale has a gradient, which the query's gives.
        query, scale = query * jnp.asarray(scale, query.dtype), 1.0

    config = KernelConfig()
    if isinstance(implementation, KernelConfig):
        implementation, config = "pallas", implementation

    def block_mask(block_size):
        if isinstance(mask, BlockMask):
            return mask
        if lists is not None:
            return lists()
        return BlockMask.from_mask(
            mask,
            query_len,
            key_len,
            block_size=block_size,
            batch=batch,
            heads=heads,
        )

    def by_reference(query, key, value, bias, _, __, known):
        run = functools.partial(reference.attention, mask=mask, scale=float(scale))
        if known is not None:
            return as_part(run, known, query, key, value, bias)
        return run(query, key, value, bias)

    def by_xla(query, key, value, bias, rows, rest, known):
        if rows is None:
            return alone_by_xla(query, key, value, bias, known)
        # They are queries like any others.
        query, key, value = rows.heads_of(query, key, value)
        out, lse = alone_by_xla(rows.take(query), key, value, bias, rows.known_parts())
        return rows.merge(out, lse, rest)

    def alone_by_xla(query, key, value, bias, known):
        if orders is not None:
            order = orders["xla"]
            run = functools.partial(xla.attention, bias=None, scale=float(scale))
            return order.through(run, query, key, value, block_mask=order.lists())
        sizes = (min(256, query_len), min(128, key_len))
        if sizes == (query_len, key_len) and lists is None and isinstance(mask, Mask):
            # One block has all pairs. With a list for each row of the batch the rows
            # would take turns; the predicate can tell of all of them at once.
            one: Any = np.ones((1, 1, 1), np.int32)
            first: Any = np.zeros((1, 1, 1, 1), np.int32)
            blocks = BlockMask(first, one, one, mask, *sizes, sizes)
        else:
            blocks = block_mask(sizes)
        return xla.attention(
            query, key, value, bias, block_mask=blocks, scale=float(scale), known=known
        )

    def by_pallas(query, key, value, bias, rows, rest, known, step=None):
        if decodes and isinstance(mask, Mask):
            return pallas_decode.attention(
                query, key, value, mask=mask, scale=float(scale)
            )
        run = functools.partial(pallas.attention, scale=float(scale), config=config)
        if orders is not None:
            order = orders["pallas"]
            return run(query, key, value, block_mask=order.lists(), order=order)
        size, grad_size = pallas.block_sizes(query, value, config)
        blocks = block_mask(size)
        grad_blocks = blocks if size == grad_size else block_mask(grad_size)
        run = functools.partial(run, block_mask=blocks, grad_block_mask=grad_blocks)
        if rows is None:
            return run(query, key, value, known=known, step=step)
        # The kernel takes the rows itself.
        rows = rows.by(ROW_KERNELS)
        out, lse = run(query, key, value, rows=rows, known=rows.known_parts())
        return rows.merge(out, lse, rest)

    def in_steps(attend):
        """By an implementation that knows of no steps."""

        def run(query, key, value, bias, rows, rest, known, step):
            def alone(*tokens, known=None):
                return attend(*tokens, bias, rows, rest, known)

            if step is None:
                return alone(query, key, value, known=known)
            return steps.take(alone, step, known, query, key, value)

        return run

    takes = step is None or pallas.takes(step, query, key, value, config)
    candidates = {
        "reference": in_steps(by_reference),
        "xla": in_steps(by_xla),
        "pallas": by_pallas if takes else in_steps(by_pallas),
    }
    if rows is not None:  # Whose mask over all pairs is for the caller to write.
        del candidates["reference"]
    return dispatch(
        mechanism,
        implementation,
        candidates,
        functools.partial(
            unsupported,
            mask=orders["pallas"].mask if orders else mask,
            decodes=decodes,
        ),
        query,
        key,
        value,
        bias,
        rows,
        rest,
        known,
        step,
    )


def unsupported(
    implementation: str,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    rows: Rows | None = None,
    rest: tuple[jax.Array, jax.Array] | None = None,
    known: tuple[jax.Array, jax.Array] | None = None,
    step: steps.Step | None = None,
    *,
    mask: Mask | BlockMask,
    decodes: bool = False,
) -> str | None:
    """Why an implementation cannot serve a call, or None: the truth about support."""
    if implementation != "pallas":
        return None
    reason = pallas.unsupported(query, key, value, bias, mask)
    if reason is None and decodes:
        return pallas_decode.unsupported(query, key)
    return reason


def check_arrays(
    query: ArrayLike, key: ArrayLike, value: ArrayLike
) -> tuple[jax.Array, jax.Array, jax.Array, bool]:
    """Refuses arrays that do not fit; gives them with a batch axis, and if they had."""
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    expect(query.ndim in (3, 4), "query", "[B, T, N, H] or [T, N, H]", query.shape)
    names = ("query", "key", "value")
    for name, x in zip(names, (query, key, value), strict=True):
        expect(x.ndim == query.ndim, name, f"{query.ndim} axes like query", x.shape)
        expect_float(name, x)
        expect(x.dtype == query.dtype, name, f"query's dtype {query.dtype}", x.dtype)
        expect(x.shape[-3] >= 1, name, "at least one token", x.shape)
    batched = query.ndim == 4
    if not batched:
        query, key, value = query[None], key[None], value[None]
    batch, _, heads, head_size = query.shape
    key_len, key_heads = key.shape[1:3]
    expect_shape("key", key, (batch, key_len, key_heads, head_size))
    expect_shape("value", value, (batch, key_len, key_heads, value.shape[3]))
    expect(
        key_heads >= 1 and heads % key_heads == 0,
        "key",
        f"a number of heads that divides query's {heads}",
        key_heads,
    )
    return query, key, value, batched


def check_lists(
    lists: BlockMask, queries: tuple[int, int, int], key: jax.Array
) -> None:
    """Refuses block lists that do not fit `[B, T, N]` queries and the keys."""
    batch, query_len, heads = queries
    key_len, key_heads = key.shape[1:3]
    lengths = (lists.query_len, lists.key_len)
    expect(
        lengths == (query_len, key_len),
        "block_mask",
        f"lists for {query_len} queries and {key_len} keys",
        f"{lengths[0]} and {lengths[1]}",
    )
    blocks = -(-query_len // lists.block_size[0])
    shape = lists.indices.shape
    expect(
        len(shape) == 4
        and shape[0] in (1, batch)
        and shape[1] in (1, key_heads, heads)
        and shape[2] == blocks,
        "block_mask.indices",
        f"[{batch} or 1, {heads} or {key_heads} or 1, {blocks}, slots]",
        shape,
    )
    for name in ("counts", "partial_counts"):
        expect_shape(f"block_mask.{name}", getattr(lists, name), shape[:3])
