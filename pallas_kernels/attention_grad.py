"""Block-sparse softmax attention on Hopper: the backward kernel.

One block of threads serves one tile of keys and holds its gradients in registers,
walking the query tiles that see it. Gradients of queries, to which many key tiles add,
are summed in float32 by the memory's own additions, in no fixed order.
"""

from __future__ import annotations

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import fragments, mosaic, products, shared
from pallas_kernels.masking import ROWS, Lists, Masking, Sees, Visits
from pallas_kernels.mosaic import COL, LOG2E
from pallas_kernels.relay import Relay
from pallas_kernels.rows import scatter

COTANGENTS = 2  # Their tiles in flight.
HELD = 64  # Columns of the values that wider heads keep in registers.
PAIR = 6  # Named barrier on which the two warpgroups meet.


def attention_grad(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    d_out: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    so_far: tuple[jax.Array, jax.Array, jax.Array] | None,
    lists: Lists,
    looked_up: list[jax.Array],
    places: jax.Array | None,
    masking: Masking,
    *,
    scale: float,
    query_tile: int,
    stages: int,
    length: int | None = None,
    goes_on: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of `attention`.

    Args:
      query: `[B, T, N, H]`, T a multiple of `masking.query_block`.
      key: `[B, S, K, H]`, S a multiple of 128 and of `masking.key_block`.
      value: `[B, S, K, V]`.
      d_out: the output's cotangent, `[B, T, N, V]`.
      lse: the log-sum-exp in base 2, +inf for a query that sees nothing,
        float32 `[B, N, T]`.
      delta: the inner product of output and cotangent less the log-sum-exp's
        cotangent, float32 `[B, N, T]`.
      so_far: gradients of other keys and queries to which these are added, zeros at
        first, in `fragments`: float32 `[B, N, T / 64, 64 H]`, `[B, K, S / 64, 64 H]`
        and `[B, K, S / 64, 64 V]`.
      lists: the query blocks that visit each key block.
      looked_up: the arrays of `predicate.trace`.
      places: where the results of as many queries as keys belong, int32 `[1, T]`, a
        negative number for nowhere; by default they stay in order.
      masking: the blocks' sizes and the predicate.
      scale: positive factor on the scores.
      query_tile: queries of one step, a divisor of `masking.query_block`: 64, or 128
        where heads, of at most 64, leave registers and shared memory for them.
      stages: query tiles in flight, 2 or 3.
      length: tokens of the results where `places` are given.
      goes_on: the result is to be a `so_far` again, in the place of the one given.

    Returns:
      Gradients of query, key and value, the last two for each of the N heads: blocks of
      threads that walk one head at a time find its queries in the cache. Heads that
      share keys are summed here only where there are gradients so far.
    """
    batch, query_len, heads, head_size = query.shape
    _, key_len, key_heads, value_size = value.shape
    dtype = query.dtype
    tile = 2 * ROWS
    shape = (ROWS, query_tile)
    split = masking.query_block // query_tile
    # Each warpgroup makes half of the queries' gradients: half of the rows, or, where
    # these are too few for a product, of the columns. A step's product of the keys'
    # gradients goes on into the next step where it takes no operand from registers.
    by_rows = query_tile == 2 * ROWS
    columns_held = head_size if by_rows else head_size // 2
    log2_scale = scale * LOG2E
    swizzle = mosaic.swizzle_of(columns_held, dtype)
    swizzle_of_v = mosaic.swizzle_of(value_size, dtype)
    # A product of two tiles in shared memory reads all that this gives in the time, and
    # what else reads or writes there waits.
    values_held = 0 if by_rows else min(value_size, HELD)
    words = len(masking.predicate.words) if masking.predicate else 0
    parts = head_size // columns_held
    sums = (batch, heads, query_len // ROWS, parts, ROWS * columns_held)
    length, key_rows = length or query_len, length or key_len
    relay = Relay(sums, key_len // tile, scale, dtype, length)
    if so_far is not None or not relay.pays:
        relay = None

    def body(*refs):
        q_g, k_g, v_g, do_g, lse_g, delta_g, *lists_g = refs[:9]
        looked_up_g = refs[9 : 9 + len(looked_up)]
        rest = refs[9 + len(looked_up) :]
        places_g = None
        if places is not None:
            places_g, *rest = rest
            places_g = places_g.at[0]
        dq_g, dk_g, dv_g, *local = rest
        if relay is not None:
            rows_g, marks_g, *local = local
        k_s, v_s, q_s, do_s, row_s, ds_s, words_s, sums_s, *barriers, acc_k, acc_v = (
            local
        )
        k_full, v_full, full, q_free, do_free, pair = barriers
        b, head, i = (lax.axis_index(axis) for axis in ("b", "h", "k"))
        wg = lax.axis_index("wg")
        start = i * tile
        key_block = lax.div(start, jnp.int32(masking.key_block))

        kv_head = lax.div(head, jnp.int32(heads // key_heads))
        visits = Visits(lists_g, b, head, heads, key_block)

        def query_start(j):
            block = visits.block(lax.div(j, jnp.int32(split))) * masking.query_block
            return block, lax.rem(j, jnp.int32(split)) * query_tile

        def consume():
            plgpu.set_max_registers(240, action="increase")
            first_row = wg * ROWS
            steps = visits.count * split
            if relay is not None:
                relay.wait_for_zeros(marks_g, b * heads + head)

            def release(j):
                slot = lax.rem(j, jnp.int32(stages))
                plgpu.barrier_arrive(q_free.at[slot])

            def arrived(j):
                """Waits for a step's tiles, if there is one."""

                @pl.when(j < steps)
                def _():
                    plgpu.barrier_wait(full.at[lax.rem(j, jnp.int32(stages))])

            def to_score(j):
                """The tiles whose product is a step's scores."""
                slot = lax.rem(j, jnp.int32(stages))
                own = pl.ds(mosaic.again(wg) * ROWS, ROWS)
                return k_s.at[own], mosaic.transposed(q_s.at[slot])

            def hold():
                """The columns of the values that have registers, if any have."""
                part = v_s.at[pl.ds(wg * ROWS, ROWS), pl.ds(0, values_held)]
                return shared.load(part, swizzle_of_v) if values_held else None

            def to_share(do, held):
                """The tiles whose products add up to the probabilities' gradients."""
                own = pl.ds(mosaic.again(wg) * ROWS, ROWS)
                rest = pl.ds(values_held, value_size - values_held)
                pairs = []
                if values_held > 0:
                    first = do.at[:, pl.ds(0, values_held)]
                    pairs.append((held, mosaic.transposed(first)))
                if values_held < value_size:
                    pairs.append((v_s.at[own, rest], mosaic.transposed(do.at[:, rest])))
                return pairs

            def step(j, scores, sees, held, d_key, d_value):
                slot = lax.rem(j, jnp.int32(stages))
                do_slot = lax.rem(j, jnp.int32(COTANGENTS))
                q, do = q_s.at[slot], do_s.at[do_slot]

                def columns(which):
                    vector = mosaic.load(row_s.at[slot, which], COL)
                    return mosaic.along(vector, 1, shape)

                def probabilities():
                    if sees is not None:
                        sees.prepare(*query_start(j))
                    p = jnp.exp2(scores * log2_scale - columns(0))
                    if sees is not None:
                        p = jnp.where(sees(*query_start(j)), p, 0.0)
                    return p

                if by_rows:
                    (pair_of_dp,) = to_share(do, held)
                    dp, p = products.product_while(*pair_of_dp, probabilities)
                    products.add_product(d_value, p.astype(dtype), do)
                else:
                    # The memory still reads the registers that this product needs,
                    # those of the last gradients of queries: exponentials come first.
                    p = probabilities()
                    adds = d_value, p.astype(dtype), do
                    dp = products.products_before(to_share(do, held), adds)
                    # What came before these products is done.
                    pl.when(j > 0)(lambda: release(j + stages - 1))
                ds = (p * (dp - columns(1))).astype(dtype)
                # The other warpgroup met this one after it last read this buffer.
                ds_now = ds_s.at[lax.rem(j, jnp.int32(2))]
                me = mosaic.again(wg)
                own = pl.ds(me * ROWS, ROWS)
                shared.store(ds_now.at[own], ds, swizzle)
                mosaic.meet(PAIR, pair)
                if by_rows:
                    # With sums so far there are more addresses to keep: one is anew.
                    first = 0 if so_far is None else mosaic.again(jnp.int32(0))
                    queries, part, here = own, 0, pl.ds(first, head_size)
                else:
                    queries, part = pl.ds(0, ROWS), me
                    here = pl.ds(me * columns_held, columns_held)

                def write(d_query):
                    start = sum(query_start(mosaic.again(j))) + queries.start
                    place = b, head, lax.div(start, jnp.int32(ROWS)), part
                    if sums_s is None:
                        fragments.add(dq_g.at[place], d_query)
                    else:
                        fragments.send(dq_g.at[place], d_query, sums_s.at[me])

                scores = products.product_beside(
                    (
                        mosaic.transposed(ds_now.at[:, queries]),
                        k_s.at[:, here],
                    ),
                    # Narrow heads leave registers for it, which saves a reading.
                    (d_key, ds if by_rows else ds_now.at[own], q),
                    to_score(j + 1),
                    write,
                    issued=lambda: plgpu.barrier_arrive(do_free.at[do_slot]),
                    ready=lambda: arrived(j + 1),
                    third_is_last=by_rows,
                )
                if by_rows:
                    release(j)
                return scores

            def walk(d_key, d_value):
                partial = jnp.int32(0)
                plgpu.barrier_wait(k_full)
                arrived(partial)
                scores = products.product(*to_score(partial))
                plgpu.barrier_wait(v_full)
                run = functools.partial(step, held=hold(), d_key=d_key, d_value=d_value)
                if masking.predicate is not None:
                    sees = Sees(
                        masking.predicate,
                        looked_up_g,
                        (b, head),
                        (start, first_row),
                        shape,
                        query_axis=1,
                        words=None if words_s is None else words_s.at[wg],
                    )
                    partial = visits.partial_count * split
                    partly = functools.partial(run, sees=sees)
                    scores = lax.fori_loop(0, partial, partly, scores)
                wholly = functools.partial(run, sees=None)
                lax.fori_loop(partial, steps, wholly, scores)
                products.wait_for_products()
                if not by_rows:
                    pl.when(steps > 0)(lambda: release(steps - 1))

            d_key, d_value = products.accumulators(
                walk,
                [None if ref is None else ref.at[wg] for ref in (acc_k, acc_v)],
                [(ROWS, head_size), (ROWS, value_size)],
            )
            if so_far is not None:
                place = b, kv_head, lax.div(start + first_row, jnp.int32(ROWS))

                @pl.when(steps > 0)
                def _():
                    fragments.add(dk_g.at[place], d_key)
                    fragments.add(dv_g.at[place], d_value)

                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                return
            # Both have read the keys before either writes over them.
            mosaic.meet(PAIR, pair)
            first_row = mosaic.again(wg) * ROWS
            k, v = k_s.at[pl.ds(first_row, ROWS)], v_s.at[pl.ds(first_row, ROWS)]
            k[...] = (d_key * scale).astype(dtype)
            v[...] = d_value.astype(dtype)
            rows = pl.ds(start + first_row, ROWS)
            if places_g is None:
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(k, dk_g.at[b, rows, head])
                plgpu.copy_smem_to_gmem(v, dv_g.at[b, rows, head])
            else:
                for x, to, swizzled in ((k, dk_g, swizzle), (v, dv_g, swizzle_of_v)):
                    scatter(x, places_g.at[rows], to.at[b, :, head], swizzled)
            if relay is not None:
                if sums_s is not None:  # What the copy engine adds.
                    plgpu.wait_smem_to_gmem(0)
                relay.added(marks_g, b * heads + head)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        def produce():
            plgpu.set_max_registers(24, action="decrease")
            if relay is not None:
                relay.serve(dq_g, rows_g, marks_g, places_g, b * heads + head, i)

            @mosaic.by_one_warp
            def _():
                steps = visits.count * split

                def copy(j):
                    slot = lax.rem(j, jnp.int32(stages))
                    rows = pl.ds(sum(query_start(j)), query_tile)
                    again = j >= stages
                    pl.when(again)(lambda: plgpu.barrier_wait(q_free.at[slot]))
                    there = full.at[slot]
                    plgpu.copy_gmem_to_smem(q_g.at[b, rows, head], q_s.at[slot], there)
                    plgpu.copy_gmem_to_smem(
                        lse_g.at[b, head, rows], row_s.at[slot, 0], there
                    )
                    plgpu.copy_gmem_to_smem(
                        delta_g.at[b, head, rows], row_s.at[slot, 1], there
                    )
                    slot = lax.rem(j, jnp.int32(COTANGENTS))
                    pl.when(j >= COTANGENTS)(
                        lambda: plgpu.barrier_wait(do_free.at[slot])
                    )
                    plgpu.copy_gmem_to_smem(
                        do_g.at[b, rows, head], do_s.at[slot], there
                    )

                keys = pl.ds(start, tile)
                plgpu.copy_gmem_to_smem(k_g.at[b, keys, kv_head], k_s, k_full)
                # The first scores need no values.
                pl.when(steps > 0)(lambda: copy(jnp.int32(0)))
                plgpu.copy_gmem_to_smem(v_g.at[b, keys, kv_head], v_s, v_full)
                pl.loop(1, steps)(copy)

                for free, count in ((q_free, stages), (do_free, COTANGENTS)):

                    @pl.loop(jnp.maximum(steps - count, 0), steps)
                    def _(j, free=free, count=count):
                        plgpu.barrier_wait(free.at[lax.rem(j, jnp.int32(count))])

        pl.when(wg < 2)(consume)
        pl.when(wg == 2)(produce)

    inputs = query, key, value, d_out, lse, delta, *lists, *looked_up
    if places is not None:
        inputs = *inputs, places
    slots = functools.partial(plgpu.Barrier, num_barriers=stages)
    sent = plgpu.SMEM((2, ROWS * columns_held), jnp.float32)
    rows = ()
    if so_far is None:
        if relay is None:
            d_query = jnp.zeros(sums, jnp.float32)
        else:
            d_query, *rows = relay.begin()
        d_key, d_value = (
            lax.empty((batch, key_rows, heads, size), dtype)
            for size in (head_size, value_size)
        )
    else:
        d_query, d_key, d_value = so_far
        d_query = d_query.reshape(sums)
    d_query, d_key, d_value, *rows = mosaic.call_in_place(
        body,
        inputs,
        (d_query, d_key, d_value, *rows),
        scratch=[
            mosaic.tiled((tile, head_size), dtype, swizzle),
            mosaic.tiled((tile, value_size), dtype),
            mosaic.tiled((stages, query_tile, head_size), dtype, swizzle),
            mosaic.tiled((COTANGENTS, query_tile, value_size), dtype),
            plgpu.SMEM((stages, 2, query_tile), jnp.float32),
            mosaic.tiled((2, tile, query_tile), dtype, swizzle),
            plgpu.SMEM((2, words, query_tile), jnp.int32) if words else None,
            None if by_rows or mosaic.interpreted() else sent,
            plgpu.Barrier(),
            plgpu.Barrier(),
            slots(num_arrivals=4),
            slots(num_arrivals=2),
            plgpu.Barrier(num_barriers=COTANGENTS, num_arrivals=2),
            mosaic.emulated(plgpu.Barrier(num_arrivals=2)),
            mosaic.emulated(plgpu.SMEM((2, ROWS, head_size), jnp.float32)),
            mosaic.emulated(plgpu.SMEM((2, ROWS, value_size), jnp.float32)),
        ],
        # The last axis counts first: tiles of one head share queries.
        grid=(batch, heads, key_len // tile),
        grid_names=("b", "h", "k"),
        num_threads=3,
        thread_name="wg",
        kernel_name="attention_grad",
    )
    if so_far is not None:
        if goes_on:
            return d_query.reshape(so_far[0].shape), d_key, d_value
        d_key = fragments.in_rows(d_key[:, :, :, None], scale, dtype)
        d_value = fragments.in_rows(d_value[:, :, :, None], 1.0, dtype)
    if relay is not None:
        return relay.end(d_query, rows[0], places), d_key, d_value
    empty = lax.empty((batch, length, heads, head_size), dtype)
    d_query = fragments.in_rows(d_query, scale, dtype, empty, places=places)
    return d_query, d_key, d_value
