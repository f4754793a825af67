"""Queries gathered by the block they chose, and their parts merged again."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp

# Parts of a row that are read in one pass over all rows.
_AT_ONCE = 16


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


def split_tiles(lists, shares):
    """What `plan_tiles` returned, in runs of tiles that are such shares of all."""
    rows, place, block, used = lists
    tiles = block.shape[2]
    tile = rows.shape[2] // tiles
    total = sum(shares)
    bounds = sorted({tiles * x // total for x in (0, *itertools.accumulate(shares))})
    for first, stop in itertools.pairwise(bounds):
        size = (stop - first) * tile
        inside = place - first * tile
        inside = jnp.where((inside >= 0) & (inside < size), inside, size)
        yield (
            rows[:, :, first * tile : stop * tile],
            inside,
            block[:, :, first:stop],
            used[:, :, first:stop],
        )


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


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("index", "place"),
    meta_fields=("per_row",),
)
@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows in the places of `plan_tiles`, for the engine.

    Attributes:
      index: int32 `[B, N, M]`, the row in each place.
      place: int32 `[B, N, P]`, the place of each pair.
      per_row: pairs of each row, one after the other, or None where that varies.
    """

    index: jax.Array
    place: jax.Array
    per_row: int | None

    def take(self, query: jax.Array) -> jax.Array:
        """The rows `[B, M, N, H]` of `[B, T, N, H]`."""
        gather = functools.partial(gathered_rows, self.per_row, query.shape[1])
        gather = jax.vmap(jax.vmap(gather, (1, 0, 0), 1))
        return gather(query, self.index, self.place)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def gathered_rows(per_row, num_rows, x, rows, place):
    """The rows `[M]` of `[T, H]`: `[M, H]`."""
    return jnp.take(x, rows, 0, mode="clip")


def _rows_forward(per_row, num_rows, x, rows, place):
    return gathered_rows(per_row, num_rows, x, rows, place), (rows, place)


def _rows_backward(per_row, num_rows, residuals, grads):
    rows, place = residuals
    if per_row is None:
        add = lambda total, places: total + sum(_parts(grads, places))
        zero = jnp.zeros_like(grads[:1], jnp.promote_types(grads.dtype, jnp.float32))
        zero = jnp.broadcast_to(zero, (num_rows, grads.shape[1]))
        total = _by_row(rows, num_rows, add, zero)
    else:
        total = sum(_parts(grads, place.reshape(num_rows, per_row)))
    return total.astype(grads.dtype), None, None


gathered_rows.defvjp(_rows_forward, _rows_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def merged_parts(per_row, num_rows, out, lse, rows, place, rest):
    """Merges the parts `[M, V]`, `[M]` of each row, as `merge_attention` would.

    `rest` is one more part of every row, `[T, V]` and `[T]`, or None.
    """

    def merge(state, places):
        peak, total, merged = state
        each = jnp.take(lse, places, mode="fill", fill_value=-jnp.inf)
        new_peak = jnp.maximum(peak, each.max(1))
        base = jnp.where(jnp.isfinite(new_peak), new_peak, 0)
        before, weights = jnp.exp(peak - base), jnp.exp(each - base[:, None])
        merged = before[:, None] * merged
        for j, part in enumerate(_parts(out, places)):
            merged += weights[:, j, None] * part
        return new_peak, before * total + weights.sum(1), merged

    if rest is None:
        rest = jnp.zeros_like(out[:1]), jnp.full_like(lse[:1], -jnp.inf)
    peak = jnp.broadcast_to(rest[1], num_rows)
    merged = jnp.broadcast_to(rest[0].astype(lse.dtype), (num_rows, out.shape[1]))
    state = peak, jnp.exp(jnp.where(peak > -jnp.inf, 0, peak)), merged
    if per_row is None:
        state = _by_row(rows, num_rows, merge, state)
    else:
        state = merge(state, place.reshape(num_rows, per_row))
    peak, total, merged = state
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


def _by_row(rows, num_rows, body, state):
    """`body(state, places)`, until it had the places of all the parts of each row.

    `places` are some of each row's, `[T, n]`: past the end where it has fewer.
    """
    order = jnp.argsort(rows, stable=True).astype(jnp.int32)
    sizes = _run_lengths(rows[order], num_rows)
    first = jnp.cumsum(sizes) - sizes

    def step(i, state):
        number = i * _AT_ONCE + jnp.arange(_AT_ONCE)
        places = jnp.take(order, first[:, None] + number, mode="clip")
        places = jnp.where(number < sizes[:, None], places, rows.shape[0])
        return body(state, places)

    return jax.lax.fori_loop(0, -(-sizes.max() // _AT_ONCE), step, state)


def _parts(x, places):
    """What `[M, V]` has in each column of `[T, n]` places, in float32; else 0."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    for place in places.T:
        part = jnp.take(x, place, 0, mode="fill", fill_value=0)
        yield part.astype(dtype)
