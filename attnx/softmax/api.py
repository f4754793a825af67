"""Softmax attention: the public functions, their checks, and what serves them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from attnx._checks import expect, expect_float, expect_shape
from attnx._dispatch import dispatch
from attnx.softmax import reference, xla
from attnx.softmax.block_mask import BlockMask
from attnx.softmax.masks import Causal, Dense, Full, Lengths, Mask, Window


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | Mask | BlockMask | None = None,
    *,
    scale: float | jax.Array | None = None,
    is_causal: bool = False,
    query_seq_lengths: jax.Array | None = None,
    key_value_seq_lengths: jax.Array | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Computes softmax(query key^T scale + bias) value where the mask allows.

    A superset of `jax.nn.dot_product_attention`: what works there works here and gives
    the same result, except that a query that sees no key gives 0 instead of the mean of
    all values. All restrictions given hold together.

    Args:
      query: `[B, T, N, H]` or `[T, N, H]`.
      key: `[B, S, K, H]` or `[S, K, H]`; K divides N (grouped-query attention).
      value: `[B, S, K, V]` or `[S, K, V]`; V may differ from H.
      bias: added to the scaled scores, broadcastable to `[B, N, T, S]`.
      mask: a boolean array broadcastable to `[B, N, T, S]`, True where a query sees a
        key; a `Mask`; or a `BlockMask`.
      scale: factor on the scores, by default `H ** -0.5`.
      is_causal: query i sees keys 0 to i.
      query_seq_lengths: int `[B]`, queries that count; the others give 0.
      key_value_seq_lengths: int `[B]`, keys that count.
      local_window_size: `(left, right)` keys seen beside the query's own index, or one
        number for both.
      implementation: "reference", "xla", "pallas", or None for the fastest that serves
        the call where the program is lowered.
      return_residual: also return the log-sum-exp.

    Returns:
      The output, query's shape with value's last axis, in query's dtype. With
      `return_residual` also the natural log-sum-exp of the scores, float32 `[B, T, N]`
      or `[T, N]`, -inf for a query that sees no key. Both are differentiable.

    Raises:
      ValueError: shapes, dtypes or options that do not fit.
      NotImplementedError: an `implementation` that does not serve the call.

    Example:
      >>> import jax, attnx
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 64, 4, 32))
      >>> attnx.dot_product_attention(q, k, v, is_causal=True).shape
      (2, 64, 4, 32)
      >>> from attnx import masks
      >>> prefix_lm = masks.Causal() | masks.Prefix(16)
      >>> attnx.dot_product_attention(q, k, v, mask=prefix_lm).shape
      (2, 64, 4, 32)
    """
    query, key, value, batched = check_arrays(query, key, value)
    sizes = (*query.shape[:3], key.shape[1])
    mask = _mask(mask, sizes)
    extra = []
    if is_causal:
        extra.append(Causal())
    if local_window_size is not None:
        extra.append(_window(local_window_size))
    if query_seq_lengths is not None or key_value_seq_lengths is not None:
        lengths = (
            _lengths("query_seq_lengths", query_seq_lengths, sizes[0]),
            _lengths("key_value_seq_lengths", key_value_seq_lengths, sizes[0]),
        )
        extra.append(Lengths(*lengths))
    if isinstance(mask, BlockMask) and extra:
        further = functools.reduce(Mask.__and__, extra)
        mask = mask.refine(further, batch=sizes[0], heads=sizes[2])
    elif extra:
        given = [] if isinstance(mask, Full) else [mask]
        mask = functools.reduce(Mask.__and__, [*given, *extra])
    out, lse = attend(
        "dot_product_attention",
        query,
        key,
        value,
        _bias(bias, sizes),
        mask=mask,
        scale=scale,
        implementation=implementation,
    )
    if not batched:
        out, lse = out[0], lse[0]
    return (out, lse) if return_residual else out


def block_sparse_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    block_mask: BlockMask,
    *,
    bias: jax.Array | None = None,
    scale: float | jax.Array | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attends to the key blocks that each query block lists.

    Args:
      query: `[B, T, N, H]` or `[T, N, H]`.
      key: `[B, S, K, H]` or `[S, K, H]`; K divides N.
      value: `[B, S, K, V]` or `[S, K, V]`.
      block_mask: the lists, shared or one a batch row and head, fixed or traced. Make
        them with `BlockMask.from_mask` or `BlockMask.from_tiles`.
      bias: as in `dot_product_attention`.
      scale: as in `dot_product_attention`.
      implementation: as in `dot_product_attention`.
      return_residual: as in `dot_product_attention`.

    Returns:
      As `dot_product_attention`.

    Raises:
      ValueError: shapes that do not fit, the lists' among them.
      NotImplementedError: an `implementation` that does not serve the call.

    Example:
      >>> import jax, jax.numpy as jnp, attnx
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 256, 2, 32))
      >>> chosen = jnp.array([[True, False], [True, True]])
      >>> lists = attnx.BlockMask.from_tiles(chosen, 256, 256)
      >>> attnx.block_sparse_attention(q, k, v, lists).shape
      (1, 256, 2, 32)
    """
    query, key, value, batched = check_arrays(query, key, value)
    sizes = (*query.shape[:3], key.shape[1])
    expect(
        isinstance(block_mask, BlockMask), "block_mask", "a BlockMask", type(block_mask)
    )
    out, lse = attend(
        "block_sparse_attention",
        query,
        key,
        value,
        _bias(bias, sizes),
        mask=block_mask,
        scale=scale,
        implementation=implementation,
    )
    if not batched:
        out, lse = out[0], lse[0]
    return (out, lse) if return_residual else out


def attend(
    mechanism: str,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    *,
    mask: Mask | BlockMask,
    scale: float | jax.Array | None,
    implementation: str | None,
    block_size: tuple[int, int] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Runs the engine on checked arrays: what every softmax mechanism comes to."""
    batch, query_len, heads, head_size = query.shape
    key_len = key.shape[1]
    if isinstance(mask, BlockMask):
        check_lists(mask, query, key)
    if scale is None:
        scale = head_size**-0.5
    elif not isinstance(scale, int | float):
        # A traced scale has a gradient, which the query's gives.
        query, scale = query * jnp.asarray(scale, query.dtype), 1.0

    def block_mask():
        if isinstance(mask, BlockMask):
            return mask
        return BlockMask.from_mask(
            mask,
            query_len,
            key_len,
            block_size=block_size or (min(128, query_len), min(128, key_len)),
            batch=batch,
            heads=heads,
        )

    return dispatch(
        mechanism,
        implementation,
        {
            "reference": functools.partial(
                reference.attention, mask=mask, scale=float(scale)
            ),
            "xla": lambda *arrays: xla.attention(
                *arrays, block_mask=block_mask(), scale=float(scale)
            ),
        },
        unsupported,
        query,
        key,
        value,
        bias,
    )


def unsupported(
    implementation: str,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
) -> str | None:
    """Why an implementation cannot serve a call, or None: the truth about support."""
    return None


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


def check_lists(lists: BlockMask, query: jax.Array, key: jax.Array) -> None:
    """Refuses block lists that do not fit the arrays."""
    batch, query_len, heads, _ = query.shape
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


def _mask(mask, sizes) -> Mask | BlockMask:
    if mask is None:
        return Full()
    if isinstance(mask, Mask | BlockMask):
        return mask
    mask = jnp.asarray(mask)
    expect(mask.dtype == bool, "mask", "a boolean array or a Mask", mask.dtype)
    return Dense(_broadcastable("mask", mask, sizes))


def _bias(bias, sizes):
    if bias is None:
        return None
    bias = jnp.asarray(bias)
    expect_float("bias", bias)
    return _broadcastable("bias", bias, sizes)


def _broadcastable(name, x, sizes):
    batch, query_len, heads, key_len = sizes
    full = (batch, heads, query_len, key_len)
    expect(x.ndim <= 4, name, "at most 4 axes", x.shape)
    shape = (1,) * (4 - x.ndim) + x.shape
    fits = all(n in (1, m) for n, m in zip(shape, full, strict=True))
    expect(fits, name, f"broadcastable to {full}", x.shape)
    return x.reshape(shape)


def _lengths(name, lengths, batch):
    if lengths is None:
        return None
    lengths = jnp.asarray(lengths)
    expect_shape(name, lengths, (batch,))
    expect(
        jnp.issubdtype(lengths.dtype, jnp.integer),
        name,
        "an integer dtype",
        lengths.dtype,
    )
    return lengths


def _window(size):
    left, right = (size, size) if isinstance(size, int) else size
    for n in (left, right):
        expect(
            isinstance(n, int) and n >= 0,
            "local_window_size",
            "integers of at least 0",
            size,
        )
    return Window(left, right)
