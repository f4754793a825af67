"""One token of linear attention on Hopper: each state is read once and written once.

One block of threads serves one head of one sequence. The copy engine brings the state
to shared memory, 64 rows at a time, and takes it back; a thread has one column of it,
and several blocks on a multiprocessor hide each other's waits.
"""

from __future__ import annotations

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu.fragmented_array import Tiling

from pallas_kernels import mosaic

ROWS = 64  # Of a state, copied at once.
_UNROLL = 8
_BARRIER = 4  # The first number that Mosaic leaves free.
# The most of a state that a block takes, in bytes; more is split by columns.
_BYTES = 128 * 128 * 4
_EPS = 1e-12


def linear_step(
    state: jax.Array,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    decay: jax.Array | None,
    scale: jax.Array,
    *,
    normalize: bool,
) -> tuple[jax.Array, jax.Array]:
    """`state <- decay state + key^T value` in place, and `scale query state`.

    Args:
      state: float32 `[B, N, H, V]`, H a multiple of 64, V 64 or a multiple of 128; with
        `normalize` `[B, N, H, V + 1]`.
      query: `[B, N, H]`.
      key: `[B, K, H]`, K a divisor of N.
      value: `[B, K, V]`.
      decay: float32 `[B or 1, N]`, or `[B, N, H]`, or None.
      scale: float32 `[B or 1]`.
      normalize: divide by what the last column of the state gives, of ones.

    Returns:
      The output `[B, N, V]` in query's dtype, and the state.
    """
    batch, heads, size, _ = state.shape
    value_size = value.shape[-1]
    splits = splits_of(size, value_size, normalize)
    columns = value_size // splits
    held = columns + normalize
    # Rows of V + 1 numbers are not aligned, as copies must be, but 64 of them are.
    by_lines = normalize and not mosaic.interpreted()
    by_channel = decay is not None and decay.ndim == 3
    layout, rows_layout = _layout(columns), _layout(ROWS)
    # What each row needs, as float32 that all threads read.
    names = ["key", "query"] + ["decay"] * by_channel + ["count"] * normalize

    def body(query_g, key_g, value_g, scale_g, *refs):
        if decay is not None:
            decay_g, *refs = refs
        state_g, out_g, state_s, rows_s, full = refs
        lines_s = state_s
        if by_lines:
            state_s = state_s.reshape((size, held))
        h, split, b = (lax.axis_index(axis) for axis in ("h", "split", "b"))
        key_head = lax.div(h, jnp.int32(heads // key_g.shape[1]))
        own = pl.ds(split * columns, columns)
        parts = [pl.ds(first, ROWS) for first in range(0, size, ROWS)]

        def ends(rows):
            """Where rows are in memory and where in shared memory."""
            if not by_lines:
                columns = own if splits > 1 else slice(None)
                return state_g.at[b, h, rows, columns], state_s.at[rows]
            lines = pl.ds(rows.start // ROWS * held, held)
            return state_g.at[b, h, lines], lines_s.at[lines]

        for i, rows in enumerate(parts):
            plgpu.copy_gmem_to_smem(*ends(rows), full.at[i])
        rows_s = {name: rows_s.at[i] for i, name in enumerate(names)}
        sources = {"key": key_g.at[b, key_head], "query": query_g.at[b, h]}
        if by_channel:
            sources["decay"] = decay_g.at[b, h]
        for name, source in sources.items():
            x = mosaic.load(source, rows_layout)
            rows_s[name][...] = x.astype(jnp.float32)
        value = mosaic.load(value_g.at[b, key_head, own], layout).astype(jnp.float32)
        fading = None
        if decay is not None and not by_channel:
            fading = decay_g[row_of(decay_g, b), h]
        plgpu.commit_smem()

        def faded(x, decays):
            if decay is None:
                return x
            return x * (decays() if by_channel else fading)

        def count(rows):
            """Takes the keys into the state's last column."""
            load = lambda name: mosaic.load(rows_s[name].at[rows], rows_layout)
            x = mosaic.load(state_s.at[rows, columns], rows_layout)
            x = faded(x, lambda: load("decay")) + load("key")
            rows_s["count"].at[rows][...] = x
            plgpu.commit_smem()  # Threads share rows: all have read.
            state_s.at[rows, columns][...] = x

        def group(first, out, total):
            rows = [first + j for j in range(_UNROLL)]
            places = [state_s.at[row, pl.ds(0, columns)] for row in rows]
            old = [mosaic.load(place, layout) for place in places]
            new = []
            for row, x in zip(rows, old, strict=True):
                x = faded(x, lambda row=row: rows_s["decay"][row])
                x = x + rows_s["key"][row] * value
                query = rows_s["query"][row]
                if normalize:
                    total = total + query * rows_s["count"][row]
                out = out + query * x
                new.append(x)
            if columns < 128:  # Threads share columns: all have read.
                mosaic.named_barrier("sync", _BARRIER, 128)
            for place, x in zip(places, new, strict=True):
                place[...] = x
            return out, total

        sums = mosaic.full((columns,), 0.0, layout), jnp.float32(0)
        for i, rows in enumerate(parts):
            plgpu.barrier_wait(full.at[i])
            if normalize:
                count(rows)
            step = lambda n, sums, rows=rows: group(rows.start + n * _UNROLL, *sums)
            sums = lax.fori_loop(0, ROWS // _UNROLL, step, sums)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(*reversed(ends(rows)))
        scale = scale_g[row_of(scale_g, b)]
        out, total = (x * scale for x in sums)
        if normalize:
            out = divided(out, total)
        out_g.at[b, h, own][...] = out.astype(out_g.dtype)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    inputs = (query, key, value, scale, *([] if decay is None else [decay]))
    out = jnp.zeros((batch, heads, value_size), query.dtype)
    shape = state.shape
    if by_lines:
        state = state.reshape(batch, heads, -1, ROWS)
    state, out = mosaic.call_in_place(
        body,
        inputs,
        (state, out),
        scratch=[
            plgpu.SMEM(state.shape[2:] if by_lines else (size, held), jnp.float32),
            plgpu.SMEM((len(names), size), jnp.float32),
            plgpu.Barrier(num_barriers=size // ROWS),
        ],
        grid=(heads, splits, batch),
        grid_names=("h", "split", "b"),
        num_threads=1,
        thread_name="wg",
        kernel_name="linear_step",
    )
    return out, state.reshape(shape)


def splits_of(size: int, value_size: int, normalize: bool) -> int:
    """Blocks of threads a head: with `normalize` one, for rows are not aligned."""
    return 1 if normalize else max(1, size * value_size * 4 // _BYTES)


def divided(out, total):
    """`out / total`; where the denominator is 0, 0."""
    empty = total == 0.0
    return jnp.where(empty, 0.0, out / (jnp.where(empty, 1.0, total) + _EPS))


def row_of(ref, batch):
    """A batch's row of what may be the same for all."""
    return jnp.int32(0) if ref.shape[0] == 1 else batch


def _layout(size: int):
    """Of a vector, neighbours in neighbouring threads; 64 numbers lie in two each."""
    rows = 1 if size % 128 == 0 else 2
    tiling = Tiling(((rows, 128 // rows), (32,), (1,)))
    warps = (-3,) if rows == 1 else (-4, -3)
    return plgpu.Layout.TILED(tiling, warps, (-2,), -1).reduce(0)
