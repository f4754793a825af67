"""HyLRA: some layers choose what to attend to, others take their choice over."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from attnx._checks import expect, expect_shape
from attnx.cache.sparse_cache import EMPTY, Held
from attnx.select.blocks import Blocks, check_block_size
from attnx.select.choice import Choice, top_k_blocks
from attnx.select.chosen import Chosen
from attnx.softmax import KernelConfig, decode_attention, dot_product_attention
from attnx.softmax.engine import check_arrays
from attnx.softmax.masks import Causal, Offset, Segments

# Scores that are computed at a time.
_SCORES = 1 << 22


def hylra_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    choice: Choice | None = None,
    *,
    block_size: int,
    top_k: int,
    sink_blocks: int = 1,
    recent_blocks: int = 2,
    segment_ids: jax.Array | None = None,
    query_start: jax.Array | None = None,
    scale: float | None = None,
    implementation: str | KernelConfig | None = None,
) -> tuple[jax.Array, Choice]:
    """Attends causally to all keys and says which mattered, or to those that mattered.

    Hybrid Layer Reuse Attention (arXiv 2602.00777). A full layer attends to everything
    and chooses, for each query, the blocks that got most of its attention, averaged
    over heads. A layer that reuses attends to the blocks that an earlier one chose:
    `reuse_policy` says which does what.

    One query at a time, as in generation, reads what was chosen and nothing else. Many
    queries visit the blocks that any of a tile chose.

    Args:
      query: `[B, T, N, H]`.
      key: `[B, S, K, H]`; K divides N.
      value: `[B, S, K, V]`.
      choice: what an earlier layer returned, to reuse; None to attend in full.
      block_size: tokens of a block.
      top_k: blocks that each query chooses.
      sink_blocks: first blocks that are chosen in any case; they count.
      recent_blocks: newest blocks that are chosen in any case; they count.
      segment_ids: integers `[B, S]` that tell packed documents apart. Blocks are those
        of the row.
      query_start: int `[B]`, the position of the first query among the keys of a cache,
        which reach to the last query; by default 0, and as many keys as queries.
      scale: factor on the scores, by default `H ** -0.5`.
      implementation: as in `dot_product_attention`.

    Returns:
      The output `[B, T, N, V]`, and the choice that was made or taken over. It has no
      gradient.

    Raises:
      ValueError: shapes or options that do not fit.
      NotImplementedError: an `implementation` that does not serve the call.

    Example:
      >>> import jax, attnx
      >>> layers = jax.random.normal(jax.random.key(0), (4, 3, 1, 64, 2, 16))
      >>> policy, choices = (0, 0, 2, 2), {}
      >>> for layer, source in enumerate(policy):
      ...     out, choices[layer] = attnx.hylra_attention(
      ...         *layers[layer], choices.get(source), block_size=8, top_k=4
      ...     )
      >>> choices[1] is choices[0], choices[2] is choices[0]
      (True, False)
    """
    query, key, value, batched = check_arrays(query, key, value)
    expect(batched, "query", "[B, T, N, H]", query.shape[1:])
    check_block_size(block_size)
    batch, length = query.shape[:2]
    key_len = key.shape[1]
    blocks = Blocks.regular(key_len, block_size)
    mask, attend = Causal(), dot_product_attention
    if segment_ids is not None:
        segment_ids = jnp.asarray(segment_ids)
        expect_shape("segment_ids", segment_ids, (batch, key_len))
        mask &= Segments(segment_ids)
    if query_start is None:
        expect(key_len == length, "key", "query's length", key.shape)
        start = jnp.zeros(batch, jnp.int32)
    else:
        start = jnp.asarray(query_start)
        expect_shape("query_start", start, (batch,))
        attend = functools.partial(decode_attention, lengths=start + length)
    if choice is not None:
        grid = (1, length, blocks.count)
        expect(choice.grid == grid, "choice", f"the grid {grid}", choice.grid)
        if length == 1 and query_start is not None:
            positions = _positions(choice, block_size, key_len)
            mask = Held(mask, positions, heads=1, group=query.shape[2])
            index = positions[..., None, None]
            key, value = (
                jnp.take_along_axis(x, index, 1, mode="clip") for x in (key, value)
            )
        else:
            chosen = Chosen(choice.to_tiles(), blocks.ids)
            mask &= chosen if query_start is None else Offset(chosen, query=-start)
    out, lse = attend(
        query,
        key,
        value,
        mask=mask,
        scale=scale,
        implementation=implementation,
        return_residual=True,
    )
    if choice is None:
        mass = _block_mass(query, key, lse, mask, start, blocks, block_size, scale)
        own = (start[:, None] + jnp.arange(length))[:, None, :, None] // block_size
        index = jnp.arange(blocks.count)
        choice = top_k_blocks(
            mass[:, None],
            top_k,
            valid=index <= own,
            forced=(index < sink_blocks) | (index > own - recent_blocks),
        )
    return out, choice


def selection_overlap(choices: Sequence[Choice]) -> jax.Array:
    """Measures how much of what each layer chose every other layer chose too.

    HyLRA's profile. Average it over samples.

    Args:
      choices: one a layer, of the same rows and blocks.

    Returns:
      Float32 `[L, L]`: of the blocks that layer j chose, the share that layer i did, at
      `[i, j]`, averaged over the rows that chose any.

    Raises:
      ValueError: no layer, or grids that differ.

    Example:
      >>> import jax.numpy as jnp
      >>> from attnx.select import selection_overlap, top_k_blocks
      >>> scores = jnp.array([[3.0, 2.0, 1.0, 0.0], [3.0, 0.0, 1.0, 2.0]])
      >>> choices = [top_k_blocks(x[None, None, None], 2) for x in scores]
      >>> selection_overlap(choices).tolist()
      [[1.0, 0.5], [0.5, 1.0]]
    """
    expect(len(choices) >= 1, "choices", "at least one layer", len(choices))
    grid = choices[0].grid
    for choice in choices:
        expect(choice.grid == grid, "choices", f"the grid {grid}", choice.grid)
    tiles = jnp.stack([choice.to_tiles() for choice in choices])
    sizes = tiles.sum(-1)
    rows = jnp.maximum((sizes > 0).sum((1, 2, 3)), 1)

    def row(mine):
        share = (mine & tiles).sum(-1) / jnp.maximum(sizes, 1)
        return share.sum((1, 2, 3)) / rows

    return jax.lax.map(row, tiles)


def reuse_policy(
    overlap: ArrayLike,
    *,
    threshold: float | None = None,
    max_full: int | None = None,
    full_layers: Sequence[int] = (),
) -> tuple[int, ...]:
    """Plans which layers choose and which take over the choice of the last that did.

    Exact, by dynamic programming over layers.

    Args:
      overlap: `[L, L]`, from `selection_overlap`: what layer j loses by reusing the
        choice of layer i < j.
      threshold: the least overlap with which a layer may reuse. As few layers as
        possible choose; of such plans that of the largest sum of overlaps (HyLRA).
      max_full: in its place, the most layers that choose. The least overlap is as large
        as possible; then their sum (the objective of UCM's layer reuse).
      full_layers: layers that choose in any case, being sensitive. The first always
        does.

    Returns:
      For each layer the one whose choice it attends to: itself for one that chooses.

    Raises:
      ValueError: shapes or options that do not fit.

    Example:
      >>> from attnx.select import reuse_policy
      >>> overlap = [[1.0, 0.9, 0.5], [0.9, 1.0, 0.8], [0.5, 0.8, 1.0]]
      >>> reuse_policy(overlap, threshold=0.7), reuse_policy(overlap, max_full=1)
      ((0, 0, 2), (0, 0, 0))
    """
    overlap = np.asarray(overlap, np.float64)
    layers = len(overlap)
    expect(overlap.shape == (layers, layers), "overlap", "[L, L]", overlap.shape)
    expect(bool(np.isfinite(overlap).all()), "overlap", "finite numbers", overlap)
    fits = all(0 <= layer < layers for layer in full_layers)
    expect(fits, "full_layers", f"layers below {layers}", tuple(full_layers))
    full = {0, *full_layers}
    if threshold is not None and max_full is None:
        plans = _plans(overlap, overlap >= threshold, full)
        return min((count, -total, plan) for count, total, plan in plans)[2]
    if threshold is not None or max_full is None:
        raise ValueError(
            "threshold: expected threshold or max_full, got "
            f"threshold={threshold}, max_full={max_full}"
        )
    expect(max_full >= len(full), "max_full", f"at least {len(full)}", max_full)
    # The best least overlap is one of those there are, or infinite where all choose.
    # At the smallest of all any layer may reuse the first, so there is a plan.
    return next(
        min((-total, plan) for count, total, plan in plans if count <= max_full)[1]
        for least in (np.inf, *np.unique(overlap)[::-1])
        if (plans := _plans(overlap, overlap >= least, full))[0][0] <= max_full
    )


def _plans(overlap, allowed, full):
    """For each number of layers that choose the plan of the largest sum, if any."""
    layers = len(overlap)
    # best[count][j]: of plans for the layers before j, after which j chooses.
    best = {(0, 0): (0.0, ())}
    for source in range(layers):
        stop, total = source + 1, 0.0
        stops = [(stop, total)]
        while stop < layers and stop not in full and allowed[source, stop]:
            total += overlap[source, stop]
            stop += 1
            stops.append((stop, total))
        for count in range(source + 1):
            if (count, source) not in best:
                continue
            before, plan = best[count, source]
            for stop, total in stops:
                new = before + total, plan + (source,) * (stop - source)
                old = best.get((count + 1, stop))
                if old is None or new[0] > old[0]:
                    best[count + 1, stop] = new
    return [
        (count, *best[count, layers])
        for count in range(1, layers + 1)
        if (count, layers) in best
    ]


def _positions(choice, block_size, key_len):
    """The keys that the only row of a choice chose: growing `[B, slots]`, then -1."""
    blocks = jnp.sort(choice.blocks[:, 0], -1)
    index = blocks[..., None] * block_size + jnp.arange(block_size, dtype=jnp.int32)
    inside = (blocks[..., None] < choice.grid[2]) & (index < key_len)
    return jnp.where(inside, index, EMPTY).reshape(len(blocks), -1)


def _block_mass(query, key, lse, mask, start, blocks, block_size, scale):
    """Each query's attention to each block, averaged over heads: `[B, T, n]`."""
    query, key, lse = jax.lax.stop_gradient((query, key, lse))
    batch, length, heads, size = query.shape
    key_len, key_heads = key.shape[1:3]
    dtype = lse.dtype
    scale = size**-0.5 if scale is None else scale
    key = key.astype(dtype)
    pad = blocks.count * block_size - key_len
    # Indices of [B, N, S] for one query.
    row, head = jnp.arange(batch)[:, None, None], jnp.arange(heads)[:, None]
    index = jnp.arange(key_len)

    def one(item):
        query, lse, t = item
        query = query.reshape(batch, key_heads, -1, size).astype(dtype)
        scores = jnp.einsum("bkgh,bskh->bkgs", query, key, precision="highest")
        scores = scale * scores.reshape(batch, heads, key_len)
        seen = mask(row, head, start[:, None, None] + t, index)
        # A query that sees nothing has the log-sum-exp -inf, and no weights.
        scores = jnp.where(seen, scores - lse[..., None], -jnp.inf)
        weights = jnp.exp(scores).mean(1)
        weights = jnp.pad(weights, ((0, 0), (0, pad)))
        return weights.reshape(batch, -1, block_size).sum(-1)

    items = (jnp.swapaxes(query, 0, 1), jnp.swapaxes(lse, 0, 1), jnp.arange(length))
    at_once = max(1, min(length, _SCORES // (batch * heads * key_len)))
    mass = jax.lax.map(one, items, batch_size=at_once)
    return jnp.swapaxes(mass, 0, 1)
