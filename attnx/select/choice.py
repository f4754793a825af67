"""Which blocks are chosen: the best few, or enough to hold a share of the whole."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from attnx._checks import expect, expect_float
from attnx._tree import tree_class
from attnx.select.bits import counts, pack, ranks, running_sum, unpack
from attnx.select.ranking import best_of, heaviest
from attnx.softmax.block_mask import BlockMask
from attnx.softmax.mask import Mask

SCOPES = ("row", "head", "layer")


@tree_class(meta=("grid", "per_row"))
class Choice:
    """The blocks that rows chose, as lists of pairs (row, block) of a fixed length.

    A row is a query, or a block of queries. How many slots of a list are filled may
    vary: no program is compiled again for it. A list has the pairs of its first row
    first, then those of the next. Where rows have slots of their own, filled slots may
    come in any order among these; else filled ones come before empty ones, and those of
    a row in the order of blocks.

    Attributes:
      rows: int32 `[B, N, P]`, or `[B, 1, P]` where one list serves all heads: rows then
        count on from head to head. The number past the last row in an empty slot.
      blocks: the same shape, the blocks chosen. n in an empty slot.
      grid: (N, T, n), heads, rows of a head, and blocks.
      per_row: slots of each row; None where rows share those of their list.
    """

    rows: jax.Array
    blocks: jax.Array
    grid: tuple[int, int, int]
    per_row: int | None = None

    @jax.jit
    def to_tiles(self) -> jax.Array:
        """The map of what is chosen, bool `[B, N, T, n]`."""
        batch, lists, _ = self.rows.shape
        heads, rows, blocks = self.grid
        tiles = jnp.zeros((batch, lists, heads // lists * rows, blocks), bool)
        outer = jnp.arange(batch)[:, None, None], jnp.arange(lists)[:, None]
        tiles = tiles.at[*outer, self.rows, self.blocks].set(True, mode="drop")
        return tiles.reshape(batch, *self.grid)

    def to_block_mask(
        self,
        query_len: int,
        key_len: int,
        *,
        block_size: tuple[int, int] = (128, 128),
        mask: Mask | None = None,
    ) -> BlockMask:
        """Block lists for attention, where rows are blocks of queries.

        Args:
          query_len: T.
          key_len: S.
          block_size: `(queries, keys)` of a block.
          mask: decides inside the blocks; by default all of a chosen block is visible.
        """
        return BlockMask.from_tiles(
            self.to_tiles(), query_len, key_len, block_size=block_size, mask=mask
        )


def top_k_blocks(
    scores: jax.Array,
    k: int,
    *,
    scope: str = "row",
    valid: jax.Array | None = None,
    forced: jax.Array | None = None,
) -> Choice:
    """Chooses the k blocks a row with the highest scores.

    Args:
      scores: `[B, N, T, n]`, of T rows and n blocks. No gradient passes a choice.
      k: blocks a row; forced ones count. All where there are fewer. Of equal scores the
        earlier comes first, so that never more are chosen.
      scope: "row" for k in each row; "head" for the T k best of each head; "layer" for
        the N T k best of all heads together.
      valid: bool, broadcastable to scores: what may be chosen.
      forced: bool, broadcastable to scores: what is chosen before all else, if valid.

    Returns:
      The choice; fewer than k where fewer are valid.

    Raises:
      ValueError: options or shapes that do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from attnx.select import top_k_blocks
      >>> scores = jnp.array([[0.1, 0.7, 0.2], [0.9, 0.8, 0.0]])[None, None]
      >>> top_k_blocks(scores, 1).to_tiles()[0, 0].astype(int).tolist()
      [[0, 1, 0], [1, 0, 0]]
      >>> top_k_blocks(scores, 1, scope="head").to_tiles()[0, 0].astype(int).tolist()
      [[0, 0, 0], [1, 1, 0]]
    """
    options = {"scope": scope, "valid": valid, "forced": forced}
    if scope != "row":
        marks = mark_top_k(scores, k, **options)
        return listed(marks, scores.shape[-1], k, scope)
    valid, _, ranked = _ranked_by(scores, **options)
    _check_k(k)
    _, index = jax.lax.top_k(ranked, min(k, scores.shape[-1]))
    kept = jnp.take_along_axis(valid, index, -1)
    return choice_of(index, kept, scores.shape)


def mark_top_k(
    scores: jax.Array,
    k: int,
    *,
    scope: str,
    valid: jax.Array | None = None,
    forced: jax.Array | None = None,
) -> jax.Array:
    """`top_k_blocks` as bits, uint32 `[B, N, T, W]`: see `bits.pack`."""
    options = {"scope": scope, "valid": valid, "forced": forced}
    if scope == "row":
        return pack(top_k_blocks(scores, k, **options).to_tiles())
    *_, ranked = _ranked_by(scores, **options)
    _check_k(k)
    marks = best_of(_scopes(ranked, scope), _slots(scores.shape, k, scope))
    return _valid_ones(marks, scores, valid)


def threshold_blocks(
    scores: jax.Array,
    threshold: float | jax.Array,
    *,
    scope: str = "row",
    max_blocks: int | None = None,
    valid: jax.Array | None = None,
    forced: jax.Array | None = None,
) -> Choice:
    """Chooses the fewest blocks, best first, that hold a share of all scores.

    The cumulative threshold of VMoBA (arXiv 2506.23858): forced blocks, then at least
    one and as many others as bring the sum of scores to `threshold` times the sum of
    all.

    Args:
      scores: `[B, N, T, n]`, at least 0, of T rows and n blocks; see `min_max` and
        `row_softmax`. No gradient passes a choice.
      threshold: the share. 0 chooses one block beside the forced ones, more than 1
        all.
      scope: what "all scores" are: those of a "row", a "head" or the "layer".
      max_blocks: the most blocks a row, on average over the scope: what the threshold
        asks beyond is left out. By default all: the lists have room for every pair.
      valid: bool, broadcastable to scores: what may be chosen.
      forced: bool, broadcastable to scores: what is chosen before all else, if valid.

    Returns:
      The choice.

    Raises:
      ValueError: options or shapes that do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from attnx.select import threshold_blocks
      >>> scores = jnp.array([[0.1, 0.7, 0.2], [0.5, 0.25, 0.25]])[None, None]
      >>> threshold_blocks(scores, 0.6).to_tiles()[0, 0].astype(int).tolist()
      [[0, 1, 0], [1, 1, 0]]
    """
    most = scores.shape[-1] if max_blocks is None else max_blocks
    marks = mark_by_threshold(
        scores, threshold, scope=scope, max_blocks=most, valid=valid, forced=forced
    )
    return listed(marks, scores.shape[-1], most, scope)


def mark_by_threshold(
    scores: jax.Array,
    threshold: float | jax.Array,
    *,
    scope: str,
    max_blocks: int,
    valid: jax.Array | None = None,
    forced: jax.Array | None = None,
) -> jax.Array:
    """`threshold_blocks` as bits, uint32 `[B, N, T, W]`: see `bits.pack`."""
    expect(
        isinstance(max_blocks, int) and max_blocks >= 1,
        "max_blocks",
        "an integer of at least 1",
        max_blocks,
    )
    options = {"scope": scope, "valid": valid, "forced": forced}
    seen, first, ranked = _ranked_by(scores, **options)
    mass, before, first, ranked = (
        _scopes(x, scope)
        for x in (
            jnp.where(seen, scores, 0),
            jnp.where(first, scores, 0),
            first,
            ranked,
        )
    )
    total = lambda x: x.sum((-2, -1))
    # Scores that are all 0 have no best: any share of them takes all.
    wanted = threshold * (total(mass) + 1e-6) - total(before)
    slots = _slots(scores.shape, max_blocks, scope)
    # As many as bring the share, and one that is not forced.
    marks = heaviest(ranked, wanted, least=total(first) + 1, most=slots)
    return _valid_ones(marks, scores, valid)


def min_max(
    scores: jax.Array, *, scope: str = "row", valid: jax.Array | None = None
) -> jax.Array:
    """Stretches the valid scores of each scope to 0 ... 1; invalid ones become 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from attnx.select import min_max
      >>> min_max(jnp.array([[[[-2.0, 0.0, 2.0]]]])).ravel().tolist()
      [0.0, 0.5, 1.0]
    """
    scores, valid, _ = _checked(scores, valid, None, scope)
    axes = {"row": (-1,), "head": (-2, -1), "layer": (-3, -2, -1)}[scope]
    low = scores.min(axes, keepdims=True, where=valid, initial=jnp.inf)
    high = scores.max(axes, keepdims=True, where=valid, initial=-jnp.inf)
    width = high - low
    width = jnp.where(width > 1e-6, width, 1)
    return jnp.where(valid, (scores - low) / width, 0)


def row_softmax(scores: jax.Array, *, valid: jax.Array | None = None) -> jax.Array:
    """Each row's softmax over its valid blocks, which makes rows comparable.

    A choice over a head or a layer then maximizes the average mass that rows keep.

    Example:
      >>> import jax.numpy as jnp
      >>> from attnx.select import row_softmax
      >>> row_softmax(jnp.zeros((1, 1, 1, 4))).ravel().tolist()
      [0.25, 0.25, 0.25, 0.25]
    """
    scores, valid, _ = _checked(scores, valid, None, "row")
    masked = jnp.where(valid, scores, jnp.finfo(scores.dtype).min)
    return jnp.where(valid, jax.nn.softmax(masked, -1), 0)


def _checked(scores, valid, forced, scope):
    expect(scores.ndim == 4, "scores", "shape [B, N, T, n]", scores.shape)
    expect_float("scores", scores)
    names = ", ".join(map(repr, SCOPES))
    expect(scope in SCOPES, "scope", f"one of {names}", repr(scope))
    masks = []
    for name, mask, default in (("valid", valid, True), ("forced", forced, False)):
        mask = jnp.asarray(default if mask is None else mask)
        expect(mask.dtype == bool, name, "a boolean array", mask.dtype)
        shape = (1,) * (4 - mask.ndim) + mask.shape
        fits = len(shape) == 4 and all(
            n in (1, size) for n, size in zip(shape, scores.shape, strict=True)
        )
        expect(fits, name, f"broadcastable to {scores.shape}", mask.shape)
        masks.append(jnp.broadcast_to(mask, scores.shape))
    return scores, *masks


def _check_k(k):
    expect(isinstance(k, int) and k >= 1, "k", "an integer of at least 1", k)


def _ranked_by(scores, *, scope, valid, forced):
    """What is valid, what of it is forced, and by what all are ranked."""
    scores, valid, forced = _checked(scores, valid, forced, scope)
    ranked = jnp.where(forced, jnp.inf, scores)
    return valid, forced & valid, jnp.where(valid, ranked, -jnp.inf)


def _valid_ones(marks, scores, valid):
    """`[B, N, T, W]` of marks by scope, where more were asked for than are valid."""
    marks = marks.reshape(*scores.shape[:3], -1)
    if valid is None:
        return marks
    return marks & pack(jnp.broadcast_to(valid, scores.shape))


def _scopes(x, scope):
    """`[B, N, T, n]` with what a scope ranks together in the last two axes."""
    if scope == "head":
        return x
    batch, heads, rows, blocks = x.shape
    if scope == "row":
        return x[..., None, :]
    return x.reshape(batch, 1, heads * rows, blocks)


def _slots(shape, per_row, scope):
    """Slots of one ranking that chooses `per_row` blocks a row."""
    _, heads, rows, blocks = shape
    rows = {"row": 1, "head": rows, "layer": heads * rows}[scope]
    size = rows * blocks
    expect(size < 2**31, "scores", "fewer than 2**31 in a scope", math.prod(shape[1:]))
    return rows * min(per_row, blocks)


@functools.partial(jax.jit, static_argnums=2)
def choice_of(index, kept, shape):
    """Ranked indices `[B, N or 1, (T,) slots]` of a scope, and which of them count."""
    batch, heads, rows, blocks = shape
    row, block = jnp.divmod(index.astype(jnp.int32), blocks)
    if index.ndim == 4:
        row += jnp.arange(rows, dtype=jnp.int32)[:, None]
    lists = index.shape[1]
    row = jnp.where(kept, row, heads // lists * rows)
    block = jnp.where(kept, block, blocks)
    flat = (batch, lists, -1)
    return Choice(
        row.reshape(flat),
        block.reshape(flat),
        (heads, rows, blocks),
        index.shape[-1] if index.ndim == 4 else None,
    )


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def listed(marks, count, per_row, scope):
    """The choice of what is marked, `[B, N, T, W]` of n blocks, so many slots a row."""
    shape = (*marks.shape[:3], count)
    marks, slots = _scopes(marks, scope), _slots(shape, per_row, scope)
    each = counts(marks)
    first = running_sum(each) - each
    place = first[..., None] + ranks(marks, count)
    place = jnp.where(unpack(marks, count), place, slots)
    lead, size = marks.shape[:-2], marks.shape[-2] * count
    index = jnp.arange(size, dtype=jnp.int32)

    def compact(place):
        empty = jnp.full(slots, -1, jnp.int32)
        return empty.at[place].set(index, mode="drop", unique_indices=True)

    index = jax.vmap(compact)(place.reshape(-1, size)).reshape(*lead, slots)
    return choice_of(jnp.maximum(index, 0), index >= 0, shape)
