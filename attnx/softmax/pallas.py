"""Softmax attention over block lists by the GPU kernels of `pallas_kernels`."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from attnx._groups import sum_of_groups
from attnx.softmax.block_mask import BlockMask, transpose
from attnx.softmax.mask import Mask
from attnx.softmax.masks import Full
from attnx.softmax.pallas_rows import Rows
from attnx.softmax.pallas_turns import tile_costs, tiles_in_turn
from attnx.softmax.steps import Step
from attnx.softmax.tile_order import TileOrder
from pallas_kernels.attention import attention as attention_kernel
from pallas_kernels.attention_grad import attention_grad as grad_kernel
from pallas_kernels.attention_grad_ordered import (
    attention_grad_ordered as ordered_kernel,
)
from pallas_kernels.batching import mappable
from pallas_kernels.masking import ROWS, Lists, Masking
from pallas_kernels.mosaic import LOG2E, wrong_device
from pallas_kernels.predicate import Untraceable, trace

BLOCK = 128
HEAD_SIZES = (32, 64, 96, 128, 256)
# Wider heads leave registers for one gradient at a time.
_WIDEST_FUSED = 128
# And narrower ones for a third warpgroup that computes, or for two query tiles a step.
_NARROW = 64


@dataclasses.dataclass(frozen=True)
class KernelConfig:
    """How the GPU kernels serve a call: pass it as `implementation`.

    Attributes:
      deterministic: the backward sums in a fixed order, for 8 products a tile in place
        of 5. By default gradients of queries are summed as they come, in float32. Head
        sizes above 128 are always summed in a fixed order.
    """

    deterministic: bool = False


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    block_mask: BlockMask,
    scale: float,
    grad_block_mask: BlockMask | None = None,
    order: TileOrder | None = None,
    config: KernelConfig = KernelConfig(),
    rows: Rows | None = None,
    known: tuple[jax.Array, jax.Array] | None = None,
    step: Step | None = None,
) -> tuple[jax.Array, ...]:
    """Attends over the listed blocks, as `reference.attention` over its mask.

    The backward walks the blocks of `grad_block_mask`, by default `block_mask`. With an
    `order` the lists are for tokens in that order, those of `order.lists`. With `rows`
    the lists are for these rows of the query, which the forward kernel gathers itself.
    `known` is as in `engine.attend`, of the rows if these are given; `step` too, one
    that `takes` says is served.
    """
    grad_block_mask = grad_block_mask or block_mask
    batch, query_len, heads, _ = query.shape
    if rows is not None:
        heads, query_len = rows.index.shape[1:]
    key_len = key.shape[1]
    if order is not None:  # In which all tiles are whole.
        query_len, key_len = block_mask.query_len, block_mask.key_len
    if scale <= 0:  # The kernels take a row's peak from unscaled scores.
        query, scale = query * jnp.asarray(scale, query.dtype), 1.0
    block = block_mask.block_size
    key_pad = -key_len % block[1]
    predicate, looked_up = None, []
    if key_pad or not isinstance(block_mask.mask, Full):
        predicate, looked_up = trace(
            _predicate(block_mask.mask, key_len, block[1]),
            batch,
            heads,
            query_len + (-query_len % block[0]),
            key_len + key_pad,
        )
    call = _Call(
        Masking(*block, predicate),
        Masking(*grad_block_mask.block_size, predicate),
        scale,
        order,
        block_mask,
        grad_block_mask,
        config,
    )
    if rows is None:
        query = _pad(query, -query_len % ROWS)
    padded = (query, _pad(key, key_pad), _pad(value, key_pad))
    lists, grad_lists = (
        Lists(blocks.indices, blocks.counts, blocks.partial_counts)
        for blocks in (block_mask, grad_block_mask)
    )
    if known is not None and rows is None:
        out, lse = known
        rest = padded[0].shape[1] - query_len
        lse = jnp.pad(lse, ((0, 0), (0, rest), (0, 0)), constant_values=-jnp.inf)
        known = _pad(out, rest), lse
    operands = *padded, lists, grad_lists, looked_up, rows, known
    if step is not None:
        return _take(call, step, *operands)
    out, lse = _attention(call, *operands)
    return out[:, :query_len], lse[:, :query_len]


def takes(
    step: Step, query: jax.Array, key: jax.Array, value: jax.Array, config: KernelConfig
) -> bool:
    """Whether the kernels add to a step's sums themselves: of whole tiles, in float32.

    Gradients in no fixed order.
    """
    if query.shape[1] % BLOCK or key.shape[1] % BLOCK:
        return False
    return step.cotangents is None or _fused(query, value, config)


def unsupported(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    mask: Mask | BlockMask,
) -> str | None:
    """Why the kernels cannot serve a call, or None."""
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"the kernel takes bfloat16 and float16, not {query.dtype}"
    for size in (query.shape[-1], value.shape[-1]):
        if size not in HEAD_SIZES:
            return f"the kernel takes head sizes {HEAD_SIZES}, not {size}"
    if bias is not None:
        return "the kernel takes no bias"
    if isinstance(mask, BlockMask):
        if any(size % BLOCK for size in mask.block_size):
            return f"the kernel takes blocks of multiples of {BLOCK}"
        mask = mask.mask
    try:
        lengths = query.shape[1], key.shape[1]
        fn = _predicate(mask, lengths[1], BLOCK)
        jax.eval_shape(lambda: trace(fn, query.shape[0], query.shape[2], *lengths)[1])
    except Untraceable as why:
        return str(why)
    return wrong_device()


def block_sizes(
    query: jax.Array, value: jax.Array, config: KernelConfig
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Queries and keys of the blocks that serve a mask best, forward and backward."""
    # The third warpgroup hides exponentials. The backward has two, and one that keeps
    # an order reads the forward's lists as well.
    small = max(query.shape[-1], value.shape[-1]) <= _NARROW
    queries = 3 * ROWS if small and not config.deterministic else BLOCK
    return (queries, BLOCK), (BLOCK, BLOCK)


def key_tile(query: jax.Array, value: jax.Array) -> int:
    """Keys of one step of the forward kernel."""
    size = max(query.shape[-1], value.shape[-1])
    return BLOCK if size <= _WIDEST_FUSED else BLOCK // 2


@dataclasses.dataclass(frozen=True, eq=False)
class _Call:
    """What of a call is not an array."""

    masking: Masking
    grad_masking: Masking
    scale: float
    order: TileOrder | None
    block_mask: BlockMask
    grad_block_mask: BlockMask
    config: KernelConfig


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(call, *operands):
    return _forward(call, *operands)[0]


def _forward(call, query, key, value, lists, grad_lists, looked_up, rows, known):
    if known is not None:
        out, lse = known
        lse = jnp.swapaxes(lse, 1, 2) * LOG2E
        return known, (query, key, value, grad_lists, looked_up, rows, out, lse)
    order = call.order
    if order is not None:
        query, key, value = map(order.tiled, (query, key, value))
    out, lse = _attend(call, query, key, value, lists, looked_up, rows)
    residuals = query, key, value, grad_lists, looked_up, rows, out, lse
    result = out, jnp.swapaxes(lse, 1, 2) / LOG2E
    return result if order is None else tuple(map(order.flat, result)), residuals


def _attend(
    call, query, key, value, lists, looked_up, rows, so_far=None, *, goes_on=False
):
    batch, length, heads, _ = query.shape
    index = head = None
    if rows is not None:
        index, head = rows.index, rows.head
        heads, length = index.shape[1:]
    size = max(query.shape[-1], value.shape[-1])
    small = size <= _NARROW
    divides = call.masking.query_block % (3 * ROWS) == 0
    warpgroups = 3 if small and divides else 2
    tile = warpgroups * ROWS
    in_block = call.masking.query_block // tile
    tiles, late = 1, 0
    if size <= _WIDEST_FUSED:
        tiles, late = tiles_in_turn(
            tile_costs(call.block_mask.counts, (batch, heads), in_block),
            batch * heads * -(-length // tile),
            slots=lists.indices.shape[-1],
            # Gathered rows attend to blocks of about the same length.
            alike=rows is not None,
        )
    masking, keys = call.masking, key_tile(query, value)
    first_keys = call.block_mask.first_keys
    if first_keys is not None and 2 * first_keys == keys == masking.key_block:
        masking = dataclasses.replace(masking, predicate=None)
        looked_up = []
    else:
        first_keys = None
    kernel = mappable(
        attention_kernel,
        masking,
        scale=call.scale,
        key_tile=keys,
        stages=3 if small else 2,
        warpgroups=warpgroups,
        tiles=tiles,
        late=late,
        first_keys=first_keys,
        goes_on=goes_on,
    )
    first = None if head is None else head[None]
    return kernel((query, key, value, so_far), (lists, looked_up, index, first))


def _backward(call, residuals, cotangents):
    query, *others, rows, out, lse = residuals
    if call.order is not None:
        cotangents = tuple(map(call.order.tiled, cotangents))
    pull = lambda d_query: (d_query,)
    if rows is not None:
        query, pull = jax.vjp(rows.take, query)
    d_query, *grads = _gradients(call, (query, *others, out, lse), cotangents)
    return *pull(d_query), *grads, *[None] * 5


def _gradients(call, residuals, cotangents, so_far=None, *, goes_on=False):
    query, key, value, lists, looked_up, out, lse = residuals
    d_out, d_lse = cotangents
    # A score's gradient is p (dp - delta); the log-sum-exp's own adds p d_lse to it.
    delta = jnp.einsum("btnv,btnv->bnt", out, d_out, preferred_element_type=jnp.float32)
    delta -= jnp.swapaxes(d_lse, 1, 2)
    order = call.order
    if order is not None:
        by_key = Lists(*order.transposed())
    else:
        # Their arrays come as arguments: those of `call` may be another trace's.
        same = dataclasses.replace(call.grad_block_mask, **lists._asdict())
        by_key = Lists(*transpose(same))
    # A query that saw nothing gets the weight exp(-inf) everywhere.
    lse = jnp.where(jnp.isfinite(lse), lse, jnp.inf)
    query_len = query.shape[1]
    rest = -query_len % call.grad_masking.query_block
    arrays = _pad(query, rest), key, value, _pad(d_out, rest)
    at_end = ((0, 0), (0, 0), (0, rest))
    arrays += jnp.pad(lse, at_end, constant_values=jnp.inf), jnp.pad(delta, at_end)
    size = max(query.shape[-1], value.shape[-1])
    if not _fused(query, value, call.config):
        stages = 1 if size > _WIDEST_FUSED else 2
        grads = []
        for by in ("query", "key", "value"):
            kernel = mappable(
                functools.partial(ordered_kernel, by),
                call.grad_masking,
                scale=call.scale,
                stages=stages,
            )
            visited = lists if by == "query" else by_key
            grads.append(kernel(arrays, (visited, looked_up)))
        if order is not None:
            return tuple(map(order.flat, grads))
        d_query, d_key, d_value = grads
        return d_query[:, :query_len], d_key, d_value
    kernel = mappable(
        grad_kernel,
        call.grad_masking,
        scale=call.scale,
        query_tile=2 * ROWS if size <= _NARROW else ROWS,
        stages=2 if size <= _NARROW else 3,
        length=None if order is None else order.length,
        goes_on=goes_on,
    )
    # The kernel puts gradients where their tokens were before they were put in order.
    places = None if order is None else order.places()
    d_query, d_key, d_value = kernel((*arrays, so_far), (by_key, looked_up, places))
    if so_far is not None:  # All are summed, and nothing was added to whole tiles.
        return d_query, d_key, d_value
    d_key, d_value = sum_of_groups(d_key, key), sum_of_groups(d_value, value)
    return d_query[:, :query_len], d_key, d_value


_attention.defvjp(_forward, _backward)


def _fused(query, value, config):
    """Whether one kernel makes all gradients."""
    size = max(query.shape[-1], value.shape[-1])
    return size <= _WIDEST_FUSED and not config.deterministic


def _take(call, step, query, key, value, lists, grad_lists, looked_up, _, known):
    goes_on = not step.is_last
    if step.cotangents is None:
        out, lse = step.sums
        batch, length, heads = lse.shape
        so_far = _tiles(out), lse.reshape(batch, heads, length)
        after = _attend(
            call, query, key, value, lists, looked_up, None, so_far, goes_on=goes_on
        )
        if not goes_on:
            out, lse = after
            return out, jnp.swapaxes(lse, 1, 2) / LOG2E
    else:
        out, lse = known
        lse = jnp.swapaxes(lse, 1, 2) * LOG2E
        residuals = query, key, value, grad_lists, looked_up, out, lse
        so_far = tuple(_tiles(x) for x in step.sums)
        after = _gradients(call, residuals, step.cotangents, so_far, goes_on=goes_on)
        if not goes_on:
            return after
    return tuple(x.reshape(y.shape) for x, y in zip(after, step.sums, strict=True))


def _tiles(sums):
    """`[B, T, N, H]` in the kernels' own order, `[B, N, T / 64, 64 H]`."""
    batch, length, heads, size = sums.shape
    return sums.reshape(batch, heads, length // ROWS, ROWS * size)


def _predicate(mask, key_len, block):
    def fn(batch, head, query_start, row, key_start, column):
        seen = mask.at(batch, head, query_start, row, key_start, column)
        # Keys past the end are zeros that fill the last block.
        return seen & (key_start + column < key_len) if key_len % block else seen

    return fn


def _pad(x, count):
    return jnp.pad(x, ((0, 0), (0, count), (0, 0), (0, 0))) if count else x
