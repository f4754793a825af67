"""How tokens are cut into blocks, pooled block by block, and scored by blocks."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from attnx._checks import expect, expect_float, expect_shape
from attnx._tree import tree_class


@tree_class(meta=("count",))
class Blocks:
    """A cut of a sequence into runs of tokens.

    Attributes:
      ids: int32 `[B or 1, S]`, the number of each token's block; `count` for a token
        that is in none, such as padding. A NumPy array where the cut is known when the
        program is traced: what follows from it is then no work of the program.
      count: n, the most blocks there may be. Some may be empty.

    Example:
      >>> import jax.numpy as jnp
      >>> from attnx.select import Blocks
      >>> Blocks.regular(7, 3).ids.tolist()
      [[0, 0, 0, 1, 1, 1, 2]]
      >>> starts = jnp.array([[True, False, False, True, True, False]])
      >>> chunks = Blocks.from_starts(starts, count=4)
      >>> chunks.ids.tolist(), chunks.sizes().tolist()
      ([[0, 0, 0, 1, 2, 2]], [[3, 1, 2, 0]])
    """

    ids: jax.Array | np.ndarray
    count: int

    @classmethod
    def regular(
        cls, length: int, block_size: int, *, lengths: jax.Array | None = None
    ) -> Blocks:
        """Blocks of `block_size` tokens from the first on; the last may be shorter.

        Args:
          length: S.
          block_size: tokens of a block.
          lengths: int `[B]`, tokens that count; by default all.
        """
        check_block_size(block_size)
        count = -(-length // block_size)
        index = np.arange(length, dtype=np.int32)[None]
        ids = index // block_size
        if lengths is not None:
            ids = jnp.where(index < jnp.asarray(lengths)[:, None], ids, count)
        return cls(ids, count)

    @classmethod
    def from_starts(cls, starts: jax.Array, count: int) -> Blocks:
        """Blocks of any length: one starts at each True, and one at the first token.

        Args:
          starts: bool `[B or 1, S]`.
          count: the most blocks. Starts beyond are not followed: the last block takes
            the rest.
        """
        expect(starts.ndim == 2, "starts", "shape [B or 1, S]", starts.shape)
        expect(starts.dtype == bool, "starts", "a boolean array", starts.dtype)
        expect(count >= 1, "count", "at least 1", count)
        ids = jnp.cumsum(starts.at[:, 0].set(True), 1, dtype=jnp.int32) - 1
        return cls(jnp.minimum(ids, count - 1), count)

    def sizes(self) -> jax.Array | np.ndarray:
        """Tokens in each block, int32 `[B or 1, count]`."""
        if isinstance(self.ids, np.ndarray):
            rows = [np.bincount(ids, minlength=self.count) for ids in self.ids]
            return np.stack(rows)[:, : self.count].astype(np.int32)
        return self._per_block(jax.ops.segment_sum, jnp.ones_like(self.ids))

    def starts(self) -> jax.Array | np.ndarray:
        """The first token of each block, int32 `[B or 1, count]`; of none, a large."""
        index = np.arange(self.ids.shape[1], dtype=np.int32)
        if isinstance(self.ids, np.ndarray):
            none = np.iinfo(np.int32).max
            starts = np.full((len(self.ids), self.count + 1), none, np.int32)
            for row, ids in zip(starts, self.ids, strict=True):
                np.minimum.at(row, ids, index)
            return starts[:, :-1]
        index = jnp.broadcast_to(index, self.ids.shape)
        return self._per_block(jax.ops.segment_min, index)

    def regular_size(self) -> int | None:
        """Tokens of every block but the last, if they follow without a gap; or None.

        None also where the cut is known only when the program runs.
        """
        if not isinstance(self.ids, np.ndarray) or len(self.ids) > 1:
            return None
        size = int((self.ids == 0).sum())
        if size == 0:
            return None
        wanted = np.minimum(np.arange(self.ids.shape[1]) // size, self.count)
        return size if np.array_equal(self.ids[0], wanted) else None

    def _per_block(self, reduce, x):
        """Reduces `[B, S, ...]` to `[B, count, ...]`."""
        ids = jnp.broadcast_to(self.ids, x.shape[:2])
        return jax.vmap(functools.partial(reduce, num_segments=self.count))(x, ids)


def pool_mean(x: jax.Array, blocks: Blocks) -> jax.Array:
    """Averages each block's tokens, as in MoBA (arXiv 2502.13189, eq. 6).

    Args:
      x: `[B, S, K, H]`.
      blocks: the cut of the S tokens.

    Returns:
      Float32 or better `[B, n, K, H]`; 0 for an empty block.

    Raises:
      ValueError: shapes that do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from attnx.select import Blocks, pool_mean
      >>> x = jnp.arange(5.0)[None, :, None, None]
      >>> pool_mean(x, Blocks.regular(5, 2)).ravel().tolist()
      [0.5, 2.5, 4.0]
    """
    return _pool_sum(x, blocks) / _sizes(blocks)


def pool_sqrt(x: jax.Array, blocks: Blocks) -> jax.Array:
    """Sums each block's tokens and divides by the root of their number.

    DHSA's pooling (arXiv 2510.24606): scores of random blocks then spread alike,
    however long the blocks are.

    Args:
      x: `[B, S, K, H]`.
      blocks: the cut of the S tokens.

    Returns:
      Float32 or better `[B, n, K, H]`; 0 for an empty block.

    Raises:
      ValueError: shapes that do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from attnx.select import Blocks, pool_sqrt
      >>> x = jnp.ones((1, 5, 1, 1))
      >>> pool_sqrt(x, Blocks.regular(5, 4)).ravel().tolist()
      [2.0, 1.0]
    """
    return _pool_sum(x, blocks) / jnp.sqrt(_sizes(blocks))


def pool_bounds(x: jax.Array, blocks: Blocks) -> tuple[jax.Array, jax.Array]:
    """The least and the largest entry of each block's tokens, channel by channel.

    With `bound_scores` they bound every score in the block (Quest, arXiv 2406.10774).

    Args:
      x: `[B, S, K, H]`.
      blocks: the cut of the S tokens.

    Returns:
      Two arrays, float32 or better `[B, n, K, H]`; 0 for an empty block.

    Raises:
      ValueError: shapes that do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from attnx.select import Blocks, pool_bounds
      >>> x = jnp.array([3.0, -1.0, 2.0])[None, :, None, None]
      >>> [bound.ravel().tolist() for bound in pool_bounds(x, Blocks.regular(3, 2))]
      [[-1.0, 2.0], [3.0, 2.0]]
    """
    x = _checked(x, blocks)
    bounds = (
        blocks._per_block(reduce, x)
        for reduce in (jax.ops.segment_min, jax.ops.segment_max)
    )
    low, high = (jnp.where(jnp.isfinite(x), x, 0) for x in bounds)
    return low, high


def block_scores(query: jax.Array, pooled: jax.Array) -> jax.Array:
    """Scores blocks by the product of queries and pooled keys, unscaled.

    Args:
      query: `[B, T, N, H]`: queries, or queries pooled by blocks of their own.
      pooled: `[B, n, K, H]`; K divides N.

    Returns:
      Float32 or better `[B, N, T, n]`.

    Raises:
      ValueError: shapes that do not fit.

    Example:
      >>> import jax
      >>> from attnx.select import Blocks, block_scores, pool_mean
      >>> q, k = jax.random.normal(jax.random.key(0), (2, 1, 64, 2, 16))
      >>> block_scores(q, pool_mean(k, Blocks.regular(64, 16))).shape
      (1, 2, 64, 4)
    """
    query, pooled = _grouped(query, pooled)
    return _joined(_scores(query, pooled))


def bound_scores(query: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """Bounds from above the unscaled scores of queries with any key of a block.

    Args:
      query: `[B, T, N, H]`.
      low: `[B, n, K, H]`, from `pool_bounds`; K divides N.
      high: the same shape.

    Returns:
      Float32 or better `[B, N, T, n]`: the largest score that a key between the bounds
      could have (Quest, arXiv 2406.10774).

    Raises:
      ValueError: shapes that do not fit.

    Example:
      >>> import jax
      >>> from attnx.select import Blocks, bound_scores, pool_bounds
      >>> q, k = jax.random.normal(jax.random.key(0), (2, 1, 64, 2, 16))
      >>> bound_scores(q, *pool_bounds(k, Blocks.regular(64, 16))).shape
      (1, 2, 64, 4)
    """
    expect_shape("low", low, high.shape)
    query, high = _grouped(query, high)
    low = low.astype(query.dtype)
    above, below = jnp.maximum(query, 0), jnp.minimum(query, 0)
    return _joined(_scores(above, high) + _scores(below, low))


def document_starts(segment_ids: jax.Array) -> jax.Array:
    """The first token of each one's document, a run of equal ids: int32 `[B, S]`."""
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
    is_start = segment_ids != jnp.roll(segment_ids, 1, 1)
    return jax.lax.cummax(jnp.where(is_start, index, 0), axis=1)


def check_block_size(block_size: int) -> None:
    fits = isinstance(block_size, int) and block_size >= 1
    expect(fits, "block_size", "an integer of at least 1", block_size)


def _checked(x, blocks):
    expect(x.ndim == 4, "x", "shape [B, S, K, H]", x.shape)
    expect_float("x", x)
    batch, length = blocks.ids.shape
    fits = length == x.shape[1] and batch in (1, x.shape[0])
    expect(fits, "blocks", f"a cut of {x.shape[:2]} tokens", blocks.ids.shape)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _pool_sum(x, blocks):
    x = _checked(x, blocks)
    if size := blocks.regular_size():
        return in_blocks(x, size, blocks.count).sum(2)
    return blocks._per_block(jax.ops.segment_sum, x)


def in_blocks(x: jax.Array, size: int, count: int) -> jax.Array:
    """`[B, S, ...]` to `[B, count, size, ...]`, with zeros past the end."""
    x = x[:, : count * size]
    rest = count * size - x.shape[1]
    x = jnp.pad(x, ((0, 0), (0, rest), *((0, 0),) * (x.ndim - 2)))
    return x.reshape(x.shape[0], count, size, *x.shape[2:])


def _sizes(blocks):
    return jnp.maximum(blocks.sizes(), 1)[:, :, None, None]


def _grouped(query, pooled):
    batch, _, heads, size = query.shape
    fits = (
        pooled.ndim == 4
        and (pooled.shape[0], pooled.shape[3]) == (batch, size)
        and heads % pooled.shape[2] == 0
    )
    wanted = f"[{batch}, n, K, {size}], K dividing {heads}"
    expect(fits, "pooled", wanted, pooled.shape)
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    query = query.reshape(*query.shape[:2], pooled.shape[2], -1, size)
    return query.astype(dtype), pooled.astype(dtype)


def _scores(query, pooled):
    # Which blocks are chosen hangs on these: no TF32.
    return jnp.einsum("btkgh,bnkh->bkgtn", query, pooled, precision="highest")


def _joined(scores):
    return scores.reshape(scores.shape[0], -1, *scores.shape[3:])
