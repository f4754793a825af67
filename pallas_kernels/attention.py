"""Block-sparse softmax attention on Hopper: the forward kernel.

One block of threads serves one tile of queries. A warp copies the key and value tiles
that the tile's list names; two warpgroups of 64 queries each take turns on the tensor
cores: while one multiplies, the other exponentiates. Within a warpgroup the product of
the last probabilities with their values overlaps the softmax of the next scores
(FlashAttention-3, arXiv 2407.08608).
"""

from __future__ import annotations

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import fragments, mosaic, products, shared
from pallas_kernels import rows as gathering
from pallas_kernels.masking import ROWS, Lists, Masking, Sees, Visits, looked_up_at
from pallas_kernels.mosaic import LOG2E, ROW, TILE
from pallas_kernels.predicate import KEY
from pallas_kernels.turns import Turns, divided, place

TURN = 4  # The first of the named barriers for turns; Mosaic uses those below.


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    so_far: tuple[jax.Array, jax.Array] | None,
    lists: Lists,
    looked_up: list[jax.Array],
    rows: jax.Array | None,
    head: jax.Array | None,
    masking: Masking,
    *,
    scale: float,
    key_tile: int,
    stages: int,
    warpgroups: int = 2,
    tiles: int = 1,
    late: int = 0,
    first_keys: int | None = None,
    goes_on: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Attends each query block to the key blocks that it lists.

    Args:
      query: `[B, T, N, H]`, T a multiple of 64; `masking.query_block` is one of 64 for
        each warpgroup.
      key: `[B, S, K, H]`, S a multiple of 8; a ragged last block must be partial.
      value: `[B, S, K, V]`.
      so_far: the result over other keys, to which these are added, for queries as they
        come: the output in `fragments`, float32 `[B, N, T / 64, 64 V]`, and the
        log-sum-exp in base 2, -inf where no key was seen, float32 `[B, N, T]`.
      lists: the key blocks of each query block.
      looked_up: the arrays of `predicate.trace`.
      rows: int32 `[B or 1, N, M]`, M a multiple of the queries of a tile: which query
        is in each place of the tiles, a number past the last if any will do. Then M
        takes the place of T in all but the query. By default they are as they come.
      head: int32 `[1]`, with `rows`: the first of its heads among those of query, key
        and value, where these have others. Then its N is that of all else.
      masking: the blocks' sizes and the predicate.
      scale: positive factor on the scores.
      key_tile: keys of one step, a divisor of `masking.key_block`.
      stages: key and value tiles in flight.
      warpgroups: 1 to 3, of 64 queries each, that share the keys.
      tiles: tiles of queries that a block of threads serves in turn. More than one
        hides, where lists are short, how a tile begins and ends.
      late: so many tiles at the start of each head are served after all others.
      first_keys: keys of the first step of every list, a multiple of 64, where there
        are no more; a list that is not empty has at least two steps. Without a
        predicate.
      goes_on: the result is to be a `so_far` again, in the place of the one given.

    Returns:
      The output `[B, T, N, V]` and the log-sum-exp in base 2, float32 `[B, N, T]`.
    """
    batch, query_len, heads, head_size = query.shape
    value_size = value.shape[-1]
    group = heads // key.shape[2]
    dtype = query.dtype
    tile = warpgroups * ROWS
    if rows is not None:
        heads, query_len = rows.shape[1:]
        rows = rows.reshape(len(rows), heads, -1, tile)
    given = [x for x in (rows, head) if x is not None]
    if so_far is not None and not goes_on:
        given += so_far
    shape = (ROWS, key_tile)
    taking_turns = warpgroups > 1
    split = masking.key_block // key_tile
    log2_scale = scale * LOG2E
    num_tiles = pl.cdiv(query_len, tile)
    turns = Turns(num_tiles * heads * batch, tiles)
    # What keys look up comes with them. Their place is free when scores are there,
    # but these are needed a while longer: they have one place more.
    of_keys, places = masking.looked_up_by(KEY), stages + 1
    buffers = min(tiles, 2)

    def body(*refs):
        q_g, k_g, v_g, *lists_g = refs[:6]
        count = 6 + len(looked_up)
        looked_up_g, rows_g = refs[6:count], refs[count : count + len(given)]
        [out_g, lse_g, q_s, k_s, v_s, of_keys_s, out_s, lse_s, rows_s, *barriers] = (
            refs[count + len(given) :]
        )
        so_far_g = (out_g, lse_g) if goes_on else rows_g
        q_full, q_free, k_full, v_full, k_free, v_free = barriers
        me, wg = lax.axis_index("block"), lax.axis_index("wg")
        first_head = 0 if head is None else rows_g[-1][0]

        def place_of(t):
            """The batch, head and first query of the tile of turn t."""
            number = turns.number(me, t)
            # Tiles of one head share keys, which the cache then holds. In turn those of
            # several batches beside each other come to the same for each block.
            beside, first = batch if tiles > 1 else 1, 0
            if beside < batch:
                first, number = divided(number, heads * num_tiles)
            # Later tiles of a causal mask visit more: the longest start first.
            b, h, i = place(number, (beside, heads, num_tiles), late)
            return first + b, h, i * tile

        def visits_of(t):
            """The key blocks of a tile, and the steps that they take."""
            b, h, start = place_of(t)
            block = lax.div(start, jnp.int32(masking.query_block))
            visits = Visits(lists_g, b, h, heads, block)
            steps = visits.count * split
            if tiles > 1:
                steps = jnp.where(turns.exists(me, t), steps, 0)
            return visits, steps

        def key_start(visits, j):
            block = visits.block(lax.div(j, jnp.int32(split))) * masking.key_block
            return block, lax.rem(j, jnp.int32(split)) * key_tile

        def consume():
            if taking_turns:
                registers = 240 if warpgroups == 2 else 160
                plgpu.set_max_registers(registers, action="increase")
            pl.when(wg == warpgroups - 1)(lambda: give_turn(0))
            if rows is not None:
                plgpu.barrier_wait(q_full.at[0])
                gather(0)
            turns.each(consume_tile)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        def gather(t):
            own = pl.ds(wg * ROWS, ROWS)
            buffer = lax.rem(jnp.int32(t), jnp.int32(buffers))
            b, h, _ = place_of(t)
            queries = q_g.at[b, :, h + first_head]
            gathering.gather(queries, rows_s.at[t, own], q_s.at[buffer, own])

        def wait_turn():
            if taking_turns:
                mosaic.named_barrier("sync", TURN + wg, 256)

        def give_turn(to):
            if taking_turns:
                mosaic.named_barrier("arrive", TURN + to, 256)

        def consume_tile(t, before):
            b, h, start = place_of(t)
            visits, steps = visits_of(t)
            slot_of = lambda j: lax.rem(jnp.int32(before + j), jnp.int32(stages))
            buffer = lax.rem(jnp.int32(t), jnp.int32(buffers)) if tiles > 1 else 0
            first_row = wg * ROWS
            q = q_s.at[buffer, pl.ds(first_row, ROWS)]
            if masking.predicate is not None:
                sees = Sees(
                    masking.predicate, looked_up_g, (b, h), (start, first_row), shape
                )

            def beginning():
                """The output, peaks and sums before the first key."""
                if so_far is None:
                    return (
                        mosaic.full((ROWS, value_size), 0.0, TILE),
                        mosaic.full((ROWS,), -jnp.inf, ROW),
                        mosaic.full((ROWS,), 0.0, ROW),
                    )
                sums_g, peaks_g = so_far_g
                # A share past the end reads another's, which may change meanwhile:
                # nothing that comes of it is written.
                first = jnp.minimum(start + first_row, query_len - ROWS)
                at = b, h, lax.div(first, jnp.int32(ROWS))
                peak = mosaic.load(peaks_g.at[b, h, pl.ds(first, ROWS)], ROW)
                total = jnp.where(peak == -jnp.inf, 0.0, 1.0)
                return fragments.load(sums_g.at[at], value_size), peak, total

            def seen(j):
                at = lax.rem(jnp.int32(before + j), jnp.int32(places))
                of_columns = {i: of_keys_s.at[at, n] for n, i in enumerate(of_keys)}
                return sees(*key_start(visits, j), of_columns)

            def update(j, scores, m, l, masked):
                if masked:
                    # A huge finite value would leave a residue where a whole row is
                    # hidden: the compiler fuses the product and the difference.
                    scores = jnp.where(seen(j), scores, -jnp.inf)
                m_new = jnp.maximum(m, scores.max(axis=1) * log2_scale)
                peak = jnp.where(m_new == -jnp.inf, 0.0, m_new) if masked else m_new
                alpha = jnp.exp2(m - peak)
                p = jnp.exp2(scores * log2_scale - mosaic.along(peak, 0, scores.shape))
                return m_new, l * alpha + p.sum(axis=1), alpha, p

            def first(j, carry, masked):
                acc, m, l, _ = carry
                slot = slot_of(0)
                plgpu.barrier_wait(k_full.at[slot])
                keys = mosaic.transposed(k_s.at[slot, pl.ds(0, first_keys or key_tile)])
                scores = products.product(q, keys)
                plgpu.barrier_arrive(k_free.at[slot])
                m, l, alpha, p = update(j, scores, m, l, masked)
                if so_far is not None:
                    acc = acc * mosaic.along(alpha, 0, acc.shape)
                return acc, m, l, p.astype(dtype)

            def step(j, carry, masked, after_first=None):
                acc, m, l, p = carry
                weighed_keys = slice(None)
                if after_first is not None:
                    p, weighed_keys = after_first, pl.ds(0, first_keys)
                slot, last_slot = slot_of(j), slot_of(j - 1)
                plgpu.barrier_wait(k_full.at[slot])
                plgpu.barrier_wait(v_full.at[last_slot])
                wait_turn()

                # With what keys look up there are too many registers to hold while a
                # product runs, where three warpgroups share them.
                waits = masked and of_keys and warpgroups > 2
                weighed = functools.partial(update, j, m=m, l=l, masked=masked)

                def meanwhile(scores):
                    plgpu.barrier_arrive(k_free.at[slot])
                    return scores if waits else weighed(scores)

                acc, done = products.overlapped(
                    (q, k_s.at[slot]),
                    (acc, p, v_s.at[last_slot, weighed_keys]),
                    issued=lambda: give_turn(lax.rem(wg + 1, jnp.int32(warpgroups))),
                    meanwhile=meanwhile,
                )
                plgpu.barrier_arrive(v_free.at[last_slot])
                m, l, alpha, p = weighed(done) if waits else done
                acc = acc * mosaic.along(alpha, 0, acc.shape)
                return acc, m, l, p.astype(dtype)

            def last(_, acc, p):
                slot = slot_of(steps - 1)
                plgpu.barrier_wait(v_full.at[slot])
                acc = products.accumulated(acc, p, v_s.at[slot])
                plgpu.barrier_arrive(v_free.at[slot])
                return acc

            first_shape = ROWS, first_keys or key_tile
            carry = *beginning(), mosaic.full(first_shape, 0.0, TILE, dtype)
            has_partial = masking.predicate is not None
            partial = visits.partial_count * split if has_partial else 0
            if tiles > 1:
                partial = jnp.minimum(partial, steps)
            some = jnp.minimum(steps, 1)
            if rows is None:
                plgpu.barrier_wait(q_full.at[buffer])
            else:
                gathering.wait()
            if tiles > 1:
                # By now the output of the tile before has left its place.
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                if rows is None:

                    @pl.when((t > 0) & (t + 1 < tiles))
                    def _():
                        plgpu.barrier_arrive(q_free.at[1 - buffer])
                else:
                    pl.when(t + 1 < tiles)(lambda: gather(t + 1))

            # In full blocks the predicate holds: the first step can always ask it.
            carry = lax.fori_loop(
                0, some, functools.partial(first, masked=has_partial), carry
            )
            if has_partial:
                carry = lax.fori_loop(
                    1, partial, functools.partial(step, masked=True), carry
                )
            start_full = jnp.maximum(partial, 1)
            if first_keys is not None:
                *carry, p = carry
                carry = lax.fori_loop(
                    1,
                    jnp.minimum(steps, 2),
                    functools.partial(step, masked=False, after_first=p),
                    (*carry, mosaic.full(shape, 0.0, TILE, dtype)),
                )
                start_full = 2
            carry = lax.fori_loop(
                start_full,
                steps,
                functools.partial(step, masked=False),
                carry,
            )
            acc, m, l, p = carry
            acc = lax.fori_loop(0, some, functools.partial(last, p=p), acc)
            empty = l == 0.0
            l = jnp.where(empty, 1.0, l)
            inverse = jnp.where(empty, 0.0, 1.0 / l)
            acc = acc * mosaic.along(inverse, 0, acc.shape)
            share = mosaic.again(wg)
            first_row, lse = share * ROWS, lse_s.at[buffer, share]
            lse[...] = jnp.where(empty, -jnp.inf, m + jnp.log(l) * LOG2E)
            # The queries have been read: their place takes the output.
            out = (q_s if out_s is None else out_s).at[buffer, pl.ds(first_row, ROWS)]
            if not goes_on:
                swizzle = mosaic.swizzle_of(value_size, dtype)
                shared.store(out, acc.astype(dtype), swizzle)
            plgpu.commit_smem()

            is_mine = start + first_row < query_len
            if tiles > 1:
                is_mine &= turns.exists(me, t)
            if goes_on:  # Otherwise all is as it was.
                is_mine &= steps > 0

            @pl.when(is_mine)
            def _():
                rows = pl.ds(start + first_row, ROWS)
                if goes_on:
                    at = b, h, lax.div(start + first_row, jnp.int32(ROWS))
                    fragments.store(out_g.at[at], acc)
                else:
                    plgpu.copy_smem_to_gmem(out, out_g.at[b, rows, h])
                plgpu.copy_smem_to_gmem(lse, lse_g.at[b, h, rows])

            return before + steps

        def produce():
            if taking_turns:
                plgpu.set_max_registers(24, action="decrease")

            def fetch_rows():
                numbers, *_ = rows_g

                @pl.loop(0, tiles)
                def _(t):
                    b, h, start = place_of(t)
                    b = 0 if numbers.shape[0] == 1 else b
                    own = numbers.at[b, h, lax.div(start, jnp.int32(tile))]
                    plgpu.copy_gmem_to_smem(own, rows_s.at[t], q_full.at[0])

            def fetch(t):
                b, h, start = place_of(t)
                buffer = lax.rem(jnp.int32(t), jnp.int32(buffers)) if tiles > 1 else 0
                for i in range(warpgroups):
                    # Of the last tile some may lie past the end: they get queries
                    # whose output nobody writes.
                    first = jnp.minimum(start + i * ROWS, query_len - ROWS)
                    own = q_s.at[buffer, pl.ds(i * ROWS, ROWS)]
                    plgpu.copy_gmem_to_smem(
                        q_g.at[b, pl.ds(first, ROWS), h], own, q_full.at[buffer]
                    )

            def produce_tile(t, before):
                b, h, _ = place_of(t)
                kv_head = lax.div(h + first_head, jnp.int32(group))
                visits, steps = visits_of(t)

                def copy(j, gmem, smem, full, free):
                    slot = lax.rem(before + j, jnp.int32(stages))

                    @pl.when(before + j >= stages)
                    def _():
                        plgpu.barrier_wait(free.at[slot])

                    rows = pl.ds(sum(key_start(visits, j)), key_tile)
                    plgpu.copy_gmem_to_smem(
                        gmem.at[b, rows, kv_head], smem.at[slot], full.at[slot]
                    )
                    if full is k_full:
                        place = lax.rem(before + j, jnp.int32(places))
                        for n, i in enumerate(of_keys):
                            plgpu.copy_gmem_to_smem(
                                looked_up_at(looked_up_g[i], (b, h), rows),
                                of_keys_s.at[place, n],
                                full.at[slot],
                            )

                # Values are used one step after their keys.
                @pl.loop(0, jnp.where(steps > 0, steps + 1, 0))
                def _(j):
                    pl.when(j < steps)(lambda: copy(j, k_g, k_s, k_full, k_free))
                    pl.when(j > 0)(lambda: copy(j - 1, v_g, v_s, v_full, v_free))

                if tiles > 1 and rows is None:

                    @pl.when(t + 1 < tiles)
                    def _():
                        # The place of the tile before the one that is attended now.
                        buffer = lax.rem(t + 1, jnp.int32(buffers))
                        pl.when(t > 0)(lambda: plgpu.barrier_wait(q_free.at[buffer]))
                        fetch(t + 1)

                return before + steps

            @mosaic.by_one_warp
            def _():
                fetch_rows() if rows is not None else fetch(0)
                total = turns.each(produce_tile)

                @pl.loop(jnp.maximum(total - stages, 0), total)
                def _(j):
                    slot = lax.rem(j, jnp.int32(stages))
                    plgpu.barrier_wait(k_free.at[slot])
                    plgpu.barrier_wait(v_free.at[slot])

        pl.when(wg < warpgroups)(consume)
        pl.when(wg == warpgroups)(produce)

    slots = functools.partial(plgpu.Barrier, num_barriers=stages)
    queries = functools.partial(plgpu.Barrier, num_barriers=buffers)
    alone = head_size == value_size
    outputs = (
        jax.ShapeDtypeStruct((batch, query_len, heads, value_size), dtype),
        jax.ShapeDtypeStruct((batch, heads, query_len), jnp.float32),
    )
    call = mosaic.call_in_place if goes_on else mosaic.call
    return call(
        body,
        (query, key, value, *lists, *looked_up, *given),
        so_far if goes_on else outputs,
        scratch=[
            mosaic.tiled((buffers, tile, head_size), dtype),
            mosaic.tiled((stages, key_tile, head_size), dtype),
            mosaic.tiled((stages, key_tile, value_size), dtype),
            plgpu.SMEM((places, len(of_keys), key_tile), jnp.int32)
            if of_keys
            else None,
            None if alone else mosaic.tiled((buffers, tile, value_size), dtype),
            plgpu.SMEM((buffers, warpgroups, ROWS), jnp.float32),
            None if rows is None else plgpu.SMEM((tiles, tile), jnp.int32),
            queries(num_arrivals=warpgroups if rows is None else tiles),
            queries(num_arrivals=warpgroups),
            slots(num_arrivals=1 + len(of_keys)),
            slots(),
            slots(num_arrivals=warpgroups),
            slots(num_arrivals=warpgroups),
        ],
        grid=(turns.blocks,),
        grid_names=("block",),
        num_threads=warpgroups + 1,
        thread_name="wg",
        kernel_name="attention",
    )
