"""The backward of attention in a fixed order, one gradient a call.

One block of threads serves one tile of queries, or of keys, and walks the tiles of the
other side as the forward kernel does. No two blocks add to the same place. The three
gradients take eight products a tile where `attention_grad` takes five.
"""

from __future__ import annotations

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic, products
from pallas_kernels.masking import ROWS, Lists, Masking, Sees, Visits
from pallas_kernels.mosaic import COL, LOG2E, ROW


def attention_grad_ordered(
    by: str,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    d_out: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    lists: Lists,
    looked_up: list[jax.Array],
    masking: Masking,
    *,
    scale: float,
    stages: int,
) -> jax.Array:
    """One gradient of `attention`, in its array's dtype.

    Args:
      by: "query", "key" or "value".
      query: `[B, T, N, H]`, T a multiple of 128 and of `masking.query_block`.
      key: `[B, S, K, H]`, S a multiple of 128 and of `masking.key_block`.
      value: `[B, S, K, V]`.
      d_out: the output's cotangent, `[B, T, N, V]`.
      lse: as in `attention_grad`.
      delta: as in `attention_grad`.
      lists: the key blocks of each query block, or by key and value the query blocks
        of each key block.
      looked_up: the arrays of `predicate.trace`.
      masking: the blocks' sizes and the predicate.
      scale: positive factor on the scores.
      stages: tiles of the other side in flight.
    """
    by_query = by == "query"
    sides = [(query, d_out), (key, value)]
    blocks = [masking.query_block, masking.key_block]
    own, other = sides if by_query else sides[::-1]
    own_block, other_block = blocks if by_query else blocks[::-1]
    batch, own_len, own_heads, _ = own[0].shape
    heads, group = query.shape[2], query.shape[2] // key.shape[2]
    members = 1 if by_query else group
    like = {"query": query, "key": key, "value": value}[by]
    width, dtype = like.shape[-1], like.dtype
    tile = 2 * ROWS
    shape = (ROWS, ROWS)
    split = other_block // ROWS
    log2_scale = scale * LOG2E
    in_columns = masking.predicate is not None and not by_query
    words = len(masking.predicate.words) if in_columns else 0

    def body(*refs):
        (*own_g, first_g, second_g, lse_g, delta_g), rest = refs[:6], refs[6:]
        lists_g, looked_up_g = rest[:3], rest[3 : 3 + len(looked_up)]
        grad_g, *local = rest[3 + len(looked_up) :]
        *own_s, first_s, second_s = local[:4]
        words_s, own_full, full, free, acc = local[4:]
        own_head, i, b = (lax.axis_index(axis) for axis in ("h", "own", "b"))
        wg = lax.axis_index("wg")
        start = (lax.axis_size("own") - 1 - i) * tile
        block = lax.div(start, jnp.int32(own_block))

        def visits_of(member):
            head = own_head if by_query else own_head * group + member
            visits = Visits(lists_g, b, head, heads, block)
            return head, visits, visits.count * split

        def other_start(visits, j):
            first = visits.block(lax.div(j, jnp.int32(split))) * other_block
            return first, lax.rem(j, jnp.int32(split)) * ROWS

        def consume():
            plgpu.set_max_registers(240, action="increase")
            first_row = wg * ROWS
            rows = pl.ds(start + first_row, ROWS)
            plgpu.barrier_wait(own_full)

            def own_rows():
                own = pl.ds(mosaic.again(wg) * ROWS, ROWS)
                return (ref.at[own] for ref in own_s)

            def step(j, n, head, visits, sees, grad):
                slot = mosaic.again(lax.rem(n, jnp.int32(stages)))
                first, second = first_s.at[slot], second_s.at[slot]
                left, right = own_rows()

                def statistic(ref):
                    first = start + mosaic.again(wg) * ROWS if by_query else sum(at)
                    queries = pl.ds(first, ROWS)
                    layout = ROW if by_query else COL
                    vector = mosaic.load(ref.at[b, head, queries], layout)
                    return mosaic.along(vector, 0 if by_query else 1, shape)

                first_token, offset = other_start(visits, j)
                at = first_token, mosaic.again(offset)

                def probabilities(scores):
                    p = jnp.exp2(scores * log2_scale - statistic(lse_g))
                    return p if sees is None else jnp.where(sees(*at), p, 0.0)

                def prepare():
                    if sees is not None and words:
                        # All threads have used the words of the last step.
                        plgpu.commit_smem()
                        sees.prepare(*at)

                plgpu.barrier_wait(full.at[slot])
                if by == "value":
                    scores = products.product(
                        left, mosaic.transposed(first), after=prepare
                    )
                    p = probabilities(scores)
                    products.add_product(grad, p.astype(dtype), second)
                else:
                    p, dp = products.two_products(
                        (left, mosaic.transposed(first)),
                        (right, mosaic.transposed(second)),
                        probabilities,
                        issued=prepare,
                    )
                    ds = p * (dp - statistic(delta_g))
                    products.add_product(grad, ds.astype(dtype), first)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(free.at[slot])
                return n + 1

            def walk(grad):
                def member(g, n):
                    head, visits, count = visits_of(g)
                    run = functools.partial(step, head=head, visits=visits, grad=grad)
                    partial = jnp.int32(0)
                    if masking.predicate is not None:
                        sees = Sees(
                            masking.predicate,
                            looked_up_g,
                            (b, head),
                            (start, first_row),
                            shape,
                            query_axis=0 if by_query else 1,
                            words=None if words_s is None else words_s.at[wg],
                        )
                        partial = visits.partial_count * split
                        n = lax.fori_loop(
                            0, partial, functools.partial(run, sees=sees), n
                        )
                    return lax.fori_loop(
                        partial, count, functools.partial(run, sees=None), n
                    )

                lax.fori_loop(0, members, member, jnp.int32(0))

            (grad,) = products.accumulators(
                walk, [None if acc is None else acc.at[wg]], [(ROWS, width)]
            )
            if by != "value":
                grad = grad * scale
            left, right = own_rows()
            out = right if by == "value" else left
            out[...] = grad.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out, grad_g.at[b, rows, own_head])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        def produce():
            plgpu.set_max_registers(24, action="decrease")

            @mosaic.by_one_warp
            def _():
                tokens = pl.ds(start, tile)
                for gmem, smem in zip(own_g, own_s, strict=True):
                    plgpu.copy_gmem_to_smem(
                        gmem.at[b, tokens, own_head], smem, own_full
                    )

                def step(j, n, head, visits):
                    slot = lax.rem(n, jnp.int32(stages))
                    tokens = pl.ds(sum(other_start(visits, j)), ROWS)
                    other_head = lax.div(head, jnp.int32(group)) if by_query else head
                    pl.when(n >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                    for gmem, smem in ((first_g, first_s), (second_g, second_s)):
                        plgpu.copy_gmem_to_smem(
                            gmem.at[b, tokens, other_head],
                            smem.at[slot],
                            full.at[slot],
                        )
                    return n + 1

                def member(g, n):
                    head, visits, count = visits_of(g)
                    run = functools.partial(step, head=head, visits=visits)
                    return lax.fori_loop(0, count, run, n)

                n = lax.fori_loop(0, members, member, jnp.int32(0))

                @pl.loop(jnp.maximum(n - stages, 0), n)
                def _(j):
                    slot = lax.rem(j, jnp.int32(stages))
                    plgpu.barrier_wait(free.at[slot])

        pl.when(wg < 2)(consume)
        pl.when(wg == 2)(produce)

    slots = functools.partial(plgpu.Barrier, num_barriers=stages)
    return mosaic.call(
        body,
        (*own, *other, lse, delta, *lists, *looked_up),
        jax.ShapeDtypeStruct(like.shape, dtype),
        scratch=[
            *(mosaic.tiled((tile, x.shape[-1]), dtype) for x in own),
            *(mosaic.tiled((stages, ROWS, x.shape[-1]), dtype) for x in other),
            plgpu.SMEM((2, words, ROWS), jnp.int32) if words else None,
            plgpu.Barrier(num_arrivals=2),
            slots(num_arrivals=2),
            slots(num_arrivals=2),
            mosaic.emulated(plgpu.SMEM((2, ROWS, width), jnp.float32)),
        ],
        grid=(own_heads, own_len // tile, batch),
        grid_names=("h", "own", "b"),
        num_threads=3,
        thread_name="wg",
        kernel_name=f"attention_grad_{by}",
    )
