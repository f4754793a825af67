"""Decoding by the GPU kernel: a few queries, many keys, split over the device.

The queries of all heads that share keys are the rows of one tile, so each key is read
once. The cache is cut into parts that are attended side by side and merged exactly.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from attnx.softmax import pallas
from attnx.softmax.block_mask import FULL, PARTIAL, SKIP, BlockMask, compact
from attnx.softmax.mask import Mask
from attnx.softmax.merge import merge_attention
from pallas_kernels.attention import attention as attention_kernel
from pallas_kernels.batching import mappable
from pallas_kernels.masking import ROWS, Lists, Masking
from pallas_kernels.mosaic import LOG2E
from pallas_kernels.predicate import trace

# Blocks of threads that fill an H100 twice over.
_PARTS = 264


def attention(
    query: jax.Array, key: jax.Array, value: jax.Array, *, mask: Mask, scale: float
) -> tuple[jax.Array, jax.Array]:
    """Attends a few queries to a long cache, as `reference.attention`."""
    if scale <= 0:  # The kernel takes a row's peak from unscaled scores.
        query, scale = query * jnp.asarray(scale, query.dtype), 1.0
    leaves, treedef = jax.tree.flatten(mask)
    return _attention(_Call(treedef, scale), query, key, value, leaves)


def unsupported(query: jax.Array, key: jax.Array) -> str | None:
    """Why decoding in particular cannot be served, or None."""
    rows = query.shape[1] * (query.shape[2] // key.shape[2])
    if rows > ROWS:
        return f"the kernel decodes {ROWS} queries for each key head, not {rows}"
    if key.shape[1] % 8:
        return f"the kernel takes caches of a multiple of 8 tokens, not {key.shape[1]}"
    return None


@dataclasses.dataclass(frozen=True, eq=False)
class _Call:
    """What of a call is not an array."""

    mask: jax.tree_util.PyTreeDef
    scale: float


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(call, query, key, value, leaves):
    mask = jax.tree.unflatten(call.mask, leaves)
    batch, query_len, heads, head_size = query.shape
    key_len, key_heads = key.shape[1:3]
    group = heads // key_heads
    blocks = -(-key_len // pallas.BLOCK)
    parts = max(1, min(_PARTS // (batch * key_heads), blocks // 4))
    rows = query.reshape(batch, query_len, key_heads, group, head_size)
    rows = jnp.moveaxis(rows, 3, 2).reshape(batch, -1, key_heads, head_size)
    rows = jnp.pad(rows, ((0, 0), (0, ROWS - rows.shape[1]), (0, 0), (0, 0)))

    def seen(batch, head, query_start, row, key_start, column):
        token, member = row // group, row % group
        head = head * group + member
        return mask(batch, head, token, key_start + column) & (
            key_start + column < key_len
        )

    predicate, looked_up = trace(
        seen, batch, key_heads, parts * ROWS, blocks * pallas.BLOCK
    )
    kernel = mappable(
        attention_kernel,
        Masking(ROWS, pallas.BLOCK, predicate),
        scale=call.scale,
        key_tile=pallas.key_tile(query, value),
        stages=2,
        warpgroups=1,
    )
    out, lse = kernel(
        (jnp.tile(rows, (1, parts, 1, 1)), key, value, None),
        (_lists(mask, query, key, parts), looked_up, None, None),
    )
    lse = jnp.swapaxes(lse, 1, 2) / LOG2E

    def of_parts(x):
        x = x.reshape(batch, parts, ROWS, key_heads, *x.shape[3:])
        x = x[:, :, : query_len * group]
        x = x.reshape(batch, parts, query_len, group, key_heads, *x.shape[4:])
        x = jnp.moveaxis(x, 3, 4)
        return jnp.moveaxis(x.reshape(*x.shape[:3], heads, *x.shape[5:]), 1, 0)

    return merge_attention(tuple(of_parts(out)), tuple(of_parts(lse)))


def _forward(call, query, key, value, leaves):
    return _attention(call, query, key, value, leaves), (query, key, value, leaves)


def _backward(call, residuals, cotangents):
    query, key, value, leaves = residuals
    mask = jax.tree.unflatten(call.mask, leaves)
    lists = BlockMask.from_mask(
        mask,
        query.shape[1],
        key.shape[1],
        block_size=(pallas.BLOCK, pallas.BLOCK),
        batch=query.shape[0],
        heads=query.shape[2],
    )
    run = functools.partial(pallas.attention, block_mask=lists, scale=call.scale)
    return *jax.vjp(run, query, key, value)[1](cotangents), None


_attention.defvjp(_forward, _backward)


def _lists(mask, query, key, parts) -> Lists:
    """For each part of the cache, the blocks of keys in it that any query sees."""
    batch, query_len, heads, _ = query.shape
    key_len, key_heads = key.shape[1:3]
    tiles = BlockMask.from_mask(
        mask,
        query_len,
        key_len,
        block_size=(query_len, pallas.BLOCK),
        batch=batch,
        heads=heads,
    ).tiles()[:, :, 0]
    if tiles.shape[1] == heads:
        tiles = tiles.reshape(tiles.shape[0], key_heads, -1, tiles.shape[-1])
    else:
        tiles = tiles[:, :, None]
    some, every = (tiles != SKIP).any(2), (tiles == FULL).all(2)
    tiles = jnp.where(some, jnp.where(every, FULL, PARTIAL), SKIP)
    size = math.ceil(tiles.shape[-1] / parts)
    part = jnp.arange(tiles.shape[-1]) // size
    mine = part == jnp.arange(parts)[:, None]
    return Lists(*compact(jnp.where(mine, tiles[:, :, None], SKIP)))
