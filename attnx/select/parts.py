"""Queries gathered by the block they chose, and their parts merged again.

For one row of a batch and one head; `jax.vmap` maps over the rest.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp


def plan_tiles(rows, blocks, *, num_rows, count, tile):
    """Sorts pairs by block and fills tiles with the rows of one block each.

    Returns:
      The row in each place of the tiles, `num_rows` where none; the place of each pair,
      the number of places where none; which block each tile attends to; and whether
      it is in use, 0 or 1.
    """
    pairs = rows.shape[0]
    dtype = jnp.uint16 if count < 1 << 16 else jnp.int32
    order = jnp.argsort(blocks.astype(dtype), stable=True).astype(jnp.int32)
    ordered = blocks[order]
    sizes = _run_lengths(ordered, count)
    first = jnp.cumsum(sizes) - sizes
    stops = jnp.cumsum(-(-sizes // tile))
    starts = stops + -sizes // tile
    # Each block leaves at most one tile unfilled.
    most = max(1, (pairs + count * (tile - 1)) // tile)

    index = jnp.arange(most)
    # In one pass, with no loop.
    block = jnp.minimum(
        jnp.searchsorted(stops, index, side="right", method="compare_all"), count - 1
    )
    used = (index < stops[-1]).astype(jnp.int32)
    offset = (index - starts[block]) * tile
    left = jnp.where(used > 0, sizes[block] - offset, 0)
    pair = (first[block] + offset)[:, None] + jnp.arange(tile)
    pair = order[jnp.clip(pair, 0, pairs - 1)]
    is_filled = jnp.arange(tile) < left[:, None]
    filled = jnp.where(is_filled, rows[pair], num_rows).reshape(-1)

    inside = jnp.minimum(ordered, count - 1)
    place = starts[inside] * tile + jnp.arange(pairs) - first[inside]
    place = jnp.where(ordered < count, place, most * tile).astype(jnp.int32)
    place = jnp.zeros(pairs, jnp.int32).at[order].set(place, unique_indices=True)
    return filled.astype(jnp.int32), place, block.astype(jnp.int32), used


def _run_lengths(ordered, count):
    """How often each of 0 ... count - 1 comes in numbers that are in order."""
    pairs = ordered.shape[0]
    is_first = jnp.concatenate([jnp.array([True]), ordered[1:] != ordered[:-1]])
    # A few thousand writes at most, where a sum of ones would add all pairs.
    number = jnp.where(is_first, ordered, count + 1)
    first = jnp.full(count + 1, pairs, jnp.int32)
    index = jnp.arange(pairs, dtype=jnp.int32)
    first = first.at[number].set(index, mode="drop", unique_indices=True)
    # A number that does not come begins where the next one does.
    return jnp.diff(jax.lax.cummin(first, reverse=True))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def gathered_rows(per_row, num_rows, x, rows, place):
    """The rows `[M]` of `[T, H]`: `[M, H]`."""
    return jnp.take(x, rows, 0, mode="clip")


def _rows_forward(per_row, num_rows, x, rows, place):
    return gathered_rows(per_row, num_rows, x, rows, place), (rows, place)


def _rows_backward(per_row, num_rows, residuals, grads):
    rows, place = residuals
    if per_row is None:
        dtype = jnp.promote_types(grads.dtype, jnp.float32)
        total = jax.ops.segment_sum(grads.astype(dtype), rows, num_rows)
    else:
        parts = _parts(grads, place, per_row)
        total = sum(part for _, part in parts)
    return total.astype(grads.dtype), None, None


gathered_rows.defvjp(_rows_forward, _rows_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def merged_parts(per_row, num_rows, out, lse, rows, place):
    """Merges the parts `[M, V]`, `[M]` of each row, as `merge_attention` would."""
    if per_row is None:
        total_of = functools.partial(jax.ops.segment_sum, num_segments=num_rows)
        peak = jax.ops.segment_max(lse, rows, num_rows)
        peak = jnp.where(jnp.isfinite(peak), peak, 0)
        weights = jnp.exp(lse - jnp.take(peak, rows, mode="clip"))
        total = total_of(weights, rows)
        merged = total_of(weights[:, None] * out.astype(lse.dtype), rows)
    else:
        each = jnp.take(lse, place, mode="fill", fill_value=-jnp.inf)
        each = each.reshape(num_rows, per_row)
        peak = each.max(1)
        peak = jnp.where(jnp.isfinite(peak), peak, 0)
        weights = jnp.exp(each - peak[:, None])
        total = weights.sum(1)
        parts = _parts(out, place, per_row)
        merged = sum(weights[:, j, None] * part for j, part in parts)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    merged = (merged / total[:, None]).astype(out.dtype)
    return merged, jnp.where(empty, -jnp.inf, peak + jnp.log(total))


def _parts_forward(per_row, num_rows, out, lse, rows, place):
    merged, total = merged_parts(per_row, num_rows, out, lse, rows, place)
    return (merged, total), (out, lse, rows, merged, total)


def _parts_backward(per_row, num_rows, residuals, grads):
    out, lse, rows, merged, total = residuals
    d_merged, d_total = grads
    take = functools.partial(jnp.take, indices=rows, axis=0, mode="clip")
    is_part = (rows < num_rows) & (lse > -jnp.inf)
    weights = jnp.where(is_part, jnp.exp(lse - take(total)), 0)
    change = d_total - jnp.sum(d_merged.astype(lse.dtype) * merged, -1)
    grad = take(d_merged).astype(lse.dtype)
    d_lse = weights * (jnp.sum(grad * out, -1) + take(change))
    return (weights[:, None] * grad).astype(out.dtype), d_lse, None, None


merged_parts.defvjp(_parts_forward, _parts_backward)


def _parts(x, place, per_row):
    """Each row's parts in turn, 0 where it has fewer: (j, float32 `[T, V]`)."""
    place = place.reshape(-1, per_row)
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    for j in range(per_row):
        part = jnp.take(x, place[:, j], 0, mode="fill", fill_value=0)
        yield j, part.astype(dtype)
