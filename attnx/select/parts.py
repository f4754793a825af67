"""Queries gathered by the block they chose, and their parts merged again."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp


def plan_tiles(rows, blocks, *, num_rows, count, tile):
    """Sorts the pairs of `[B, N, P]` by block and fills tiles with rows of one each.

    Returns:
      The row in each place of the tiles, `num_rows` where none; the place of each pair,
      the number of places where none; which block each tile attends to; and whether
      it is in use, 0 or 1.
    """
    fill = functools.partial(_fill_tiles, num_rows=num_rows, count=count, tile=tile)
    order = jax.vmap(functools.partial(_order, count=count))(blocks)
    return jax.vmap(jax.vmap(fill))(rows, blocks, order)


def _order(blocks, *, count):
    """What sorts each list of `[N, P]`, stably."""
    lists, pairs = blocks.shape
    # As one list: the device sorts one long list faster than many short ones.
    dtype = jnp.uint16 if lists * (count + 1) <= 1 << 16 else jnp.int32
    each = jnp.arange(lists, dtype=jnp.int32)[:, None]
    number = (blocks + each * (count + 1)).astype(dtype)
    order = jnp.argsort(number.reshape(-1), stable=True).astype(jnp.int32)
    return order.reshape(lists, pairs) - each * pairs


def _fill_tiles(rows, blocks, order, *, num_rows, count, tile):
    pairs = rows.shape[0]
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
def merged_parts(per_row, num_rows, out, lse, rows, place, rest):
    """Merges the parts `[M, V]`, `[M]` of each row, as `merge_attention` would.

    `rest` is one more part of every row, `[T, V]` and `[T]`, or None.
    """
    if per_row is None:
        peak = jax.ops.segment_max(lse, rows, num_rows)
    else:
        each = jnp.take(lse, place, mode="fill", fill_value=-jnp.inf)
        each = each.reshape(num_rows, per_row)
        peak = each.max(1)
    if rest is not None:
        peak = jnp.maximum(peak, rest[1])
    peak = jnp.where(jnp.isfinite(peak), peak, 0)
    if per_row is None:
        total_of = functools.partial(jax.ops.segment_sum, num_segments=num_rows)
        weights = jnp.exp(lse - jnp.take(peak, rows, mode="clip"))
        total = total_of(weights, rows)
        merged = total_of(weights[:, None] * out.astype(lse.dtype), rows)
    else:
        weights = jnp.exp(each - peak[:, None])
        total = weights.sum(1)
        parts = _parts(out, place, per_row)
        merged = sum(weights[:, j, None] * part for j, part in parts)
    if rest is not None:
        weights = jnp.exp(rest[1] - peak)
        total += weights
        merged += weights[:, None] * rest[0].astype(lse.dtype)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    merged = (merged / total[:, None]).astype(out.dtype)
    return merged, jnp.where(empty, -jnp.inf, peak + jnp.log(total))


def _parts_forward(per_row, num_rows, out, lse, rows, place, rest):
    merged, total = merged_parts(per_row, num_rows, out, lse, rows, place, rest)
    return (merged, total), (out, lse, rows, rest, merged, total)


def _parts_backward(per_row, num_rows, residuals, grads):
    out, lse, rows, rest, merged, total = residuals
    d_merged, d_total = grads
    change = d_total - jnp.sum(d_merged.astype(lse.dtype) * merged, -1)

    def grads_of(out, lse, is_part, of_part):
        is_part &= lse > -jnp.inf
        weights = jnp.where(is_part, jnp.exp(lse - of_part(total)), 0)
        grad = of_part(d_merged).astype(lse.dtype)
        d_lse = weights * (jnp.sum(grad * out, -1) + of_part(change))
        return (weights[:, None] * grad).astype(out.dtype), d_lse

    take = functools.partial(jnp.take, indices=rows, axis=0, mode="clip")
    of_parts = grads_of(out, lse, rows < num_rows, take)
    of_rest = None if rest is None else grads_of(*rest, True, lambda x: x)
    return *of_parts, None, None, of_rest


merged_parts.defvjp(_parts_forward, _parts_backward)


def _parts(x, place, per_row):
    """Each row's parts in turn, 0 where it has fewer: (j, float32 `[T, V]`)."""
    place = place.reshape(-1, per_row)
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    for j in range(per_row):
        part = jnp.take(x, place[:, j], 0, mode="fill", fill_value=0)
        yield j, part.astype(dtype)
