"""Taylor attention on Hopper: the second order of exp, its features in registers.

As in `linear_attention.py`, one block of threads walks the chunks of one head and two
warpgroups hold the state, here half of the values each. Features are made in registers
(`taylor_features.py`), each used at once as the left operand of a product.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic, products, shared
from pallas_kernels.chunks import CHUNK, ROWS, Stream, inverse
from pallas_kernels.mosaic import COL, ROW, TILE
from pallas_kernels.taylor_features import PART, PARTS, SIZE, TILES, Forms, coefficients


class Slope(NamedTuple):
    """What the sums' gradient with respect to queries is asked for.

    Attributes:
      cotangent: of the sums, `[B, T, *, V]`.
      by: of the denominator, float32 `[B, N, T]`; None for 1.
    """

    cotangent: jax.Array
    by: jax.Array | None


def taylor_scan(
    query: jax.Array | None,
    key: jax.Array,
    value: jax.Array,
    state: jax.Array,
    sums: jax.Array,
    by: jax.Array | None = None,
    slope: Slope | None = None,
    *,
    outputs: str,
    pieces: int,
    transposed: bool = False,
) -> tuple:
    """`sum_j w_ij value_j` over the tokens j up to i, or its gradient, or both.

    With `a = query_i . key_j / 4`, the weight w_ij is `1 + a + a^2 / 2`. The gradient
    is that of `cotangent_i . sum_j w_ij value_j + slope.by_i sum_j w_ij by_j`. Heads of
    each array divide N, the number of heads of `state`.

    Args:
      query: `[B, T, *, 16]`, T a multiple of `CHUNK`; None if states alone are wanted.
      key: `[B, T, *, 16]`.
      value: `[B, T, *, V]`, V 64 or 128.
      state: what enters each piece, float32 `[B, N, pieces, STATE_ROWS, V]`. For states
        alone there may be fewer pieces, the first ones, or the last if transposed.
      sums: the same of `by`, `[B, N, pieces, STATE_ROWS]`.
      by: what each key counts for, float32 `[B, N, T]`; None for 1.
      slope: for a gradient.
      outputs: of the sums, "quotients" by those of the weights, "sums" or "none".
      pieces: equal parts of the sequence, of whole chunks, served side by side.
      transposed: sums over the tokens from i on; states enter from the right.

    Returns:
      The state and the sums that leave each piece; then, as asked for, the sums
      `[B, T, N, V]` in value's dtype, for quotients the denominators `[B, N, T]`, and
      the gradients `[B, T, N, 16]`.
    """
    batch, heads, served, _, value_size = state.shape
    length, dtype = key.shape[1], key.dtype
    chunks = length // CHUNK // pieces
    first_piece = pieces - served if transposed else 0
    columns = value_size // 2  # One warpgroup's.
    crowded = value_size > 64 and slope and outputs != "none"
    stages = min(1 if crowded else 2, chunks)  # what shared memory has room for
    near = slope and slope.cotangent
    inputs = {"query": query, "key": key, "value": value, "near": near}
    inputs = {name: x for name, x in inputs.items() if x is not None}
    numbers = {"by": by, "near_by": slope and slope.by}
    numbers = {name: x for name, x in numbers.items() if x is not None}

    def body(*refs):
        tokens_g = dict(zip((*inputs, *numbers), refs, strict=False))
        state_g, sums_g, forms_g, last_g, last_sums_g, *rest = refs[len(tokens_g) :]
        results_g = dict(zip(results, rest, strict=False))
        stream, local = Stream.of(tuple(buffers), rest[len(results) :])
        tokens_s, fulls, frees = stream
        forms_s, forms_full, state_s, sums_s, *staged, met = local
        read, written = (met.at[i] for i in range(2))
        staged = dict(zip(("out", "slope"), staged, strict=True))
        h, place, b = (lax.axis_index(axis) for axis in ("h", "piece", "b"))
        wg = lax.axis_index("wg")
        piece = first_piece + place

        def chunk_of(n):
            return piece * chunks + (chunks - 1 - n if transposed else n)

        def consume():
            plgpu.set_max_registers(240, action="increase")
            own_columns = pl.ds(wg * columns, columns)
            own_rows = pl.ds(wg * ROWS, ROWS)
            forms = Forms(forms_s)
            plgpu.barrier_wait(forms_full)

            def held(ref, rows):
                return ref.at[b, h, place, rows]

            def publish(state, sums):
                for tile, part in zip(TILES, state, strict=True):
                    here = state_s.at[tile, own_columns]
                    shared.store(here, part.astype(dtype), _swizzle(value_size, dtype))
                write_sums(sums, lambda tile: sums_s.at[tile])
                plgpu.commit_smem()
                plgpu.barrier_arrive(written)
                plgpu.barrier_wait(written)

            def write_sums(sums, place):
                @pl.when(wg == 0)  # Both have them.
                def _():
                    for tile, part in zip(TILES, sums, strict=True):
                        place(tile)[...] = part

            def seen(x, half):
                """`x` of own rows and of half of the columns, where those are seen."""
                i = mosaic.along(wg * ROWS + mosaic.iota(ROWS, 0), 0, x.shape)
                j = mosaic.along(half.start + mosaic.iota(ROWS, 1), 1, x.shape)
                return jnp.where(i <= j if transposed else i >= j, x, 0.0)

            def scores(here, half):
                keys = mosaic.transposed(here["key"].at[half])
                return products.product(here["query"].at[own_rows], keys)

            def weighted(here):
                """Sums of values by their weights, and of the weights."""

                def before(n, carry):
                    out, total = carry
                    part = pl.ds(n * PART, PART)
                    left, right = forms.of_queries(here["query"].at[own_rows], part)
                    features = left * right
                    if outputs == "quotients":
                        entered = mosaic.load(sums_s.at[part], COL)
                        entered = mosaic.along(entered, 1, features.shape)
                        total = total + (features * entered).sum(axis=1)
                    features = features.astype(dtype)
                    return products.accumulated(out, features, state_s.at[part]), total

                def within(n, carry):
                    out, total = carry
                    half = pl.ds(n * ROWS, ROWS)
                    a = scores(here, half) * SIZE**-0.5
                    weights = seen(1.0 + a * (1.0 + 0.5 * a), half)
                    total = total + weights.sum(axis=1)
                    weights, values = weights.astype(dtype), here["value"].at[half]
                    return products.accumulated(out, weights, values), total

                out = mosaic.full((ROWS, value_size), 0.0, TILE)
                total = mosaic.full((ROWS,), 0.0, ROW)
                carry = lax.fori_loop(0, PARTS, before, (out, total))
                return lax.fori_loop(0, 2, within, carry)

            def slopes(here):
                """The gradient: what is summed, by the weights' own gradients."""
                near = here["near"].at[own_rows]

                def beside(x, far):
                    """`x` and what the last column of values adds to it."""
                    own = 1.0
                    if far is not None:
                        far = mosaic.along(mosaic.load(far, COL), 1, x.shape)
                    if "near_by" in here:
                        own = mosaic.load(here["near_by"].at[own_rows], ROW)
                        own = mosaic.along(own, 0, x.shape)
                    return x + (own if far is None else own * far)

                def before(n, out):
                    part = pl.ds(n * PART, PART)
                    entered = mosaic.transposed(state_s.at[part])
                    by = beside(products.product(near, entered), sums_s.at[part])
                    left, right = forms.of_queries(here["query"].at[own_rows], part)
                    return forms.back(out, (by * right, by * left), part)

                def within(n, out):
                    half = pl.ds(n * ROWS, ROWS)
                    values = mosaic.transposed(here["value"].at[half])
                    far = here["by"].at[half] if "by" in here else None
                    by = beside(products.product(near, values), far)
                    a = scores(here, half) * SIZE**-0.5
                    by = seen(by * (SIZE**-0.5 * (1.0 + a)), half).astype(dtype)
                    return products.accumulated(out, by, here["key"].at[half])

                out = mosaic.full((ROWS, SIZE), 0.0, TILE)
                out = lax.fori_loop(0, PARTS, before, out)
                return lax.fori_loop(0, 2, within, out)

            def write(name, x, chunk):
                first = mosaic.again(wg) * ROWS
                place_s = staged[name].at[pl.ds(first, ROWS)]
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                shared.store(place_s, x.astype(dtype), _swizzle(x.shape[-1], dtype))
                plgpu.commit_smem()
                rows = pl.ds(chunk * CHUNK + first, ROWS)
                plgpu.copy_smem_to_gmem(place_s, results_g[name].at[b, rows, h])

            def after(state, sums, here):
                """What leaves the chunk."""

                def added(tile, n, carry):
                    state, total = carry
                    half = pl.ds(n * ROWS, ROWS)
                    features = forms.of_keys(here["key"].at[half], tile)
                    counts = features
                    if "by" in here:
                        by = mosaic.load(here["by"].at[half], COL)
                        counts = features * mosaic.along(by, 1, features.shape)
                    total = total + counts.sum(axis=1)
                    values = here["value"].at[half, own_columns]
                    features = features.astype(dtype)
                    return products.accumulated(state, features, values), total

                parts = [
                    lax.fori_loop(0, 2, functools.partial(added, tile), tuple(carry))
                    for tile, *carry in zip(TILES, state, sums, strict=True)
                ]
                return tuple(zip(*parts, strict=True))

            def step(n, carry):
                slot = mosaic.again(lax.rem(n, jnp.int32(stages)))
                chunk = chunk_of(n)
                for name in fulls:
                    plgpu.barrier_wait(fulls[name].at[slot])
                here = {name: ref.at[slot] for name, ref in tokens_s.items()}
                if outputs != "none":
                    out, total = weighted(here)
                    if outputs == "quotients":
                        out = out * mosaic.along(inverse(total), 0, out.shape)
                        rows = pl.ds(chunk * CHUNK + wg * ROWS, ROWS)
                        results_g["total"].at[b, h, rows][...] = total
                    write("out", out, chunk)
                if slope:
                    write("slope", slopes(here), chunk)
                if results:
                    plgpu.barrier_arrive(read)
                carry = after(*carry, here)
                for name in frees:
                    plgpu.barrier_arrive(frees[name].at[slot])
                if results:
                    plgpu.barrier_wait(read)
                    publish(*carry)
                return carry

            carry = (
                tuple(
                    mosaic.load(held(state_g, tile).at[:, own_columns], TILE)
                    for tile in TILES
                ),
                tuple(mosaic.load(held(sums_g, tile), ROW) for tile in TILES),
            )
            if results:
                publish(*carry)
            state, sums = lax.fori_loop(0, chunks, step, carry)
            for tile, part in zip(TILES, state, strict=True):
                held(last_g, tile).at[:, own_columns][...] = part
            write_sums(sums, functools.partial(held, last_sums_g))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        def produce():
            plgpu.set_max_registers(24, action="decrease")

            def source(name, n):
                gmem = tokens_g[name]
                tokens = pl.ds(chunk_of(n) * CHUNK, CHUNK)
                if name in numbers:
                    return gmem.at[b, h, tokens]
                head = lax.div(h, jnp.int32(heads // gmem.shape[2]))
                return gmem.at[b, tokens, head]

            def copy():
                plgpu.copy_gmem_to_smem(forms_g, forms_s, forms_full)
                stream.copy(source, chunks)

            mosaic.by_one_warp(copy)

        pl.when(wg < 2)(consume)
        pl.when(wg == 2)(produce)

    buffers = {
        name: _tiled((stages, CHUNK, x.shape[-1]), dtype) for name, x in inputs.items()
    }
    for name in numbers:
        buffers[name] = plgpu.SMEM((stages, CHUNK), jnp.float32)
    results, staged = {}, [None, None]
    if outputs != "none":
        results["out"] = (batch, length, heads, value_size), dtype
        staged[0] = _tiled((CHUNK, value_size), dtype)
    if outputs == "quotients":
        results["total"] = (batch, heads, length), jnp.float32
    if slope:
        results["slope"] = (batch, length, heads, SIZE), dtype
        staged[1] = _tiled((CHUNK, SIZE), dtype)
    forms = coefficients(dtype)
    published = (
        _tiled(state.shape[-2:], dtype),
        plgpu.SMEM(sums.shape[-1:], jnp.float32),
    )
    return mosaic.call(
        body,
        (*inputs.values(), *numbers.values(), state, sums, forms),
        (
            jax.ShapeDtypeStruct(state.shape, jnp.float32),
            jax.ShapeDtypeStruct(sums.shape, jnp.float32),
            *(jax.ShapeDtypeStruct(*result) for result in results.values()),
        ),
        scratch=[
            *Stream.scratch(buffers),
            _tiled(forms.shape, dtype),
            plgpu.Barrier(),
            *(published if results else (None, None)),
            *staged,
            plgpu.Barrier(num_barriers=2, num_arrivals=2),
        ],
        grid=(heads, served, batch),
        grid_names=("h", "piece", "b"),
        num_threads=3,
        thread_name="wg",
        kernel_name="taylor_scan" + "_transposed" * transposed,
    )


def _tiled(shape, dtype):
    """As all operands of one product must be, for products over 32 rows or more."""
    return mosaic.tiled(shape, dtype, _swizzle(shape[-1], dtype))


def _swizzle(columns, dtype):
    return min(64, mosaic.swizzle_of(columns, dtype))
