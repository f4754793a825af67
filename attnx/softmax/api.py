"""Softmax attention: the public functions, their checks, and what serves them."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from attnx._checks import expect, expect_float, expect_shape
from attnx.softmax.block_mask import BlockMask
from attnx.softmax.engine import attend, check_arrays
from attnx.softmax.mask import Mask
from attnx.softmax.masks import Causal, Dense, Full, Lengths, Window
from attnx.softmax.merge import merge_attention
from attnx.softmax.neighborhood import Neighborhood, choose_tile, windows
from attnx.softmax.pallas import BLOCK, KernelConfig
from attnx.softmax.simulate import best_tile
from attnx.softmax.tile_order import TileOrder


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
    implementation: str | KernelConfig | None = None,
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
        the call where the program is lowered; a `KernelConfig` is "pallas" as it says.
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
    extra: list[Mask] = []
    if is_causal:
        extra.append(Causal())
    if local_window_size is not None:
        window = _window(local_window_size)
        # What a causal mask hides already costs no comparison.
        extra.append(Window(window.left, None) if is_causal else window)
    if query_seq_lengths is not None or key_value_seq_lengths is not None:
        lengths = (
            _lengths("query_seq_lengths", query_seq_lengths, sizes[0]),
            _lengths("key_value_seq_lengths", key_value_seq_lengths, sizes[0]),
        )
        extra.append(Lengths(*lengths))
    if extra:
        further = functools.reduce(Mask.__and__, extra)
        if isinstance(mask, BlockMask):
            mask = mask.refine(further, batch=sizes[0], heads=sizes[2])
        else:
            mask = further if isinstance(mask, Full) else mask & further
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
    implementation: str | KernelConfig | None = None,
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


def neighborhood_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    kernel_size: int | tuple[int, ...],
    stride: int | tuple[int, ...] = 1,
    dilation: int | tuple[int, ...] = 1,
    is_causal: bool | tuple[bool, ...] = False,
    scale: float | jax.Array | None = None,
    extra_key: jax.Array | None = None,
    extra_value: jax.Array | None = None,
    implementation: str | KernelConfig | None = None,
    return_residual: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attends to the `kernel_size` nearest tokens along each axis of space.

    Generalized Neighborhood Attention (arXiv 2504.16922) with NATTEN's exact windows:
    shifted inward at the edges, never truncated. Each option is one value, or one an
    axis.

    Args:
      query: `[B, *space, N, H]`, space having 1, 2 or 3 axes.
      key: `[B, *space, K, H]`; K divides N.
      value: `[B, *space, K, V]`.
      kernel_size: keys attended along each axis; times dilation at most the axis.
      stride: queries in a row that share a window, at most `kernel_size`.
      dilation: distance between the keys of a window.
      is_causal: whether later keys along the axis are hidden.
      scale: factor on the scores, by default `H ** -0.5`.
      extra_key: `[B, E, K, H]`, keys that every query sees beside its neighborhood.
      extra_value: `[B, E, K, V]`, their values; given with `extra_key` or not at all.
      implementation: as in `dot_product_attention`.
      return_residual: as in `dot_product_attention`.

    Returns:
      The output `[B, *space, N, V]`; with `return_residual` also the natural
      log-sum-exp, float32 `[B, *space, N]`.

    Raises:
      ValueError: shapes or options that do not fit.
      NotImplementedError: an `implementation` that does not serve the call.

    Example:
      FreeSwim's inward window (arXiv 2511.14712) for a video model trained at 480 x 832
      is all of time and 31 x 53 tokens of space; here on a small video:

      >>> import jax, attnx
      >>> video = jax.random.normal(jax.random.key(0), (1, 3, 34, 60, 2, 16))
      >>> attnx.neighborhood_attention(
      ...     video, video, video, kernel_size=(3, 31, 53)
      ... ).shape
      (1, 3, 34, 60, 2, 16)
    """
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    expect(query.ndim in (4, 5, 6), "query", "[B, *space, N, H]", query.shape)
    for name, x in (("key", key), ("value", value)):
        fits = x.ndim == query.ndim and x.shape[1:-2] == query.shape[1:-2]
        expect(fits, name, f"query's space {query.shape[1:-2]}", x.shape)
    space = query.shape[1:-2]
    axes = windows(space, kernel_size, stride, dilation, is_causal)
    mask = Neighborhood(space, kernel_size, stride, dilation, is_causal)

    def flat(x):
        return x.reshape(x.shape[0], -1, *x.shape[-2:])

    check_arrays(flat(query), flat(key), flat(value))
    extra = _extra(extra_key, extra_value, key, value)
    run = functools.partial(
        attend,
        "neighborhood_attention",
        bias=None,
        scale=scale,
        implementation=implementation,
    )
    # In tile order a block of the score matrix is a box against a box.
    orders = {
        "xla": TileOrder.of(axes, choose_tile(axes)),
        "pallas": TileOrder.of(axes, _whole_block(best_tile(axes))),
    }
    out, lse = run(flat(query), flat(key), flat(value), mask=mask, orders=orders)
    out, lse = (x.reshape(*query.shape[:-1], *x.shape[3:]) for x in (out, lse))
    if extra is not None:
        more, more_lse = run(flat(query), *extra, mask=Full())
        more = more.reshape(out.shape)
        out, lse = merge_attention((out, more), (lse, more_lse.reshape(lse.shape)))
    return (out, lse) if return_residual else out


def _whole_block(tile):
    """A tile as large as the kernel's block, filled up with padding if need be."""
    return *tile[:-1], tile[-1] * (BLOCK // math.prod(tile))


def _extra(extra_key, extra_value, key, value):
    if extra_key is None and extra_value is None:
        return None
    for name, x, like in (
        ("extra_key", extra_key, key),
        ("extra_value", extra_value, value),
    ):
        expect(x is not None, name, "both extra_key and extra_value", None)
        fits = x.ndim == 4 and (x.shape[0], *x.shape[2:]) == (
            like.shape[0],
            *like.shape[-2:],
        )
        wanted = f"({like.shape[0]}, E, {like.shape[-2]}, {like.shape[-1]})"
        expect(fits, name, wanted, x.shape)
    return extra_key, extra_value


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
