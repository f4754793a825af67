"""Block lists: which key blocks a query block visits, and which need the predicate."""

from __future__ import annotations

import contextlib
import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from attnx._checks import expect, is_traced
from attnx._tree import tree_class
from attnx.softmax.mask import Mask, Tiles
from attnx.softmax.masks import Full

SKIP, PARTIAL, FULL = 0, 1, 2


@tree_class(meta=("query_len", "key_len", "block_size", "first_keys"))
class BlockMask:
    """For each query block, the key blocks it visits: partial ones first, then full.

    In a partial block the predicate `mask` decides about each pair; in a full block
    every pair is visible: `mask` holds there and is not asked. A block is listed once.
    The lists are arrays: others of the same shape reuse the compiled program.

    Attributes:
      indices: int32 `[B or 1, N or K or 1, nq, slots]`, numbers of key blocks. Slots
        past the count hold valid numbers and are not visited.
      counts: int32 `[B or 1, N or K or 1, nq]`, blocks visited.
      partial_counts: the same shape, how many of them are partial.
      mask: the predicate for partial blocks.
      query_len: T; the last query block may be ragged.
      key_len: S; the last key block may be ragged and is then partial.
      block_size: `(queries, keys)` of a block.
      first_keys: how many keys there are in the first block of every list, the only
        partial one, where that is known: then `mask` says nothing else. Lists that are
        not empty have at least one full block.
    """

    indices: jax.Array
    counts: jax.Array
    partial_counts: jax.Array
    mask: Mask
    query_len: int
    key_len: int
    block_size: tuple[int, int]
    first_keys: int | None = None

    @classmethod
    def from_mask(
        cls,
        mask: Mask,
        query_len: int,
        key_len: int,
        *,
        block_size: tuple[int, int] = (128, 128),
        batch: int = 1,
        heads: int = 1,
    ) -> BlockMask:
        """Lists the blocks that a mask touches.

        Where the mask is known at trace time the lists are as long as the longest;
        where it holds traced arrays they have room for every block and counts vary.

        Args:
          mask: the predicate.
          query_len: T.
          key_len: S.
          block_size: `(queries, keys)` of a block.
          batch: B, for masks that differ between sequences.
          heads: N, for masks that differ between heads.
        """
        _check_sizes(query_len, key_len, block_size)
        sizes = (query_len, key_len, block_size, batch, heads)
        with _eager_if_known(mask):
            tiles = _classify(mask, *sizes)
        return cls.from_tiles(
            tiles, query_len, key_len, block_size=block_size, mask=mask
        )

    @classmethod
    def from_tiles(
        cls,
        tiles: ArrayLike,
        query_len: int,
        key_len: int,
        *,
        block_size: tuple[int, int] = (128, 128),
        mask: Mask | None = None,
    ) -> BlockMask:
        """Makes lists of a map of blocks.

        Args:
          tiles: `[nq, nk]`, `[N, nq, nk]` or `[B, N, nq, nk]`, leading axes may be 1.
            bool: the blocks chosen; `mask` decides inside each of them. int: 0 skips a
            block, 1 visits it with the predicate, 2 in full.
          query_len: T.
          key_len: S.
          block_size: `(queries, keys)` of a block.
          mask: the predicate of partial blocks; by default everything is visible.
        """
        _check_sizes(query_len, key_len, block_size)
        with _eager_if_known(tiles):
            tiles = jnp.asarray(tiles)
            grid = _grid(query_len, key_len, block_size)
            expect(tiles.ndim in (2, 3, 4), "tiles", "2 to 4 axes", tiles.ndim)
            expect(tiles.shape[-2:] == grid, "tiles", f"[..., {grid}]", tiles.shape)
            expect(
                tiles.dtype == bool or jnp.issubdtype(tiles.dtype, jnp.integer),
                "tiles",
                "a boolean or integer dtype",
                tiles.dtype,
            )
            tiles = tiles.reshape((1,) * (4 - tiles.ndim) + tiles.shape)
            if tiles.dtype == bool:
                tiles = jnp.where(tiles, FULL if mask is None else PARTIAL, SKIP)
            if key_len % block_size[1]:
                # Only the predicate's path looks at where the keys end.
                last = jnp.minimum(tiles[..., -1], PARTIAL)
                tiles = tiles.at[..., -1].set(last)
            indices, counts, partial_counts = compact(tiles)
            if not is_traced(counts):
                indices = indices[..., : max(1, int(counts.max()))]
                indices, counts, partial_counts = jax.device_get(
                    (indices, counts, partial_counts)
                )
        return cls(
            indices,
            counts,
            partial_counts,
            Full() if mask is None else mask,
            query_len,
            key_len,
            block_size,
        )

    def tiles(self) -> jax.Array:
        """The map `[B or 1, N or K or 1, nq, nk]` of 0 skipped, 1 partial, 2 full."""
        slot = jnp.arange(self.indices.shape[-1])
        state = jnp.where(slot < self.partial_counts[..., None], PARTIAL, FULL)
        state = jnp.where(slot < self.counts[..., None], state, SKIP)
        blocks = _grid(self.query_len, self.key_len, self.block_size)[1]
        one_hot = self.indices[..., None] == jnp.arange(blocks)
        return jnp.max(one_hot * state[..., None], -2, initial=0).astype(jnp.int32)

    def refine(self, mask: Mask, *, batch: int = 1, heads: int = 1) -> BlockMask:
        """The same blocks seen through a further mask, those it empties dropped."""
        other = BlockMask.from_mask(
            mask,
            self.query_len,
            self.key_len,
            block_size=self.block_size,
            batch=batch,
            heads=heads,
        )
        with _eager_if_known((self, mask)):
            mine, theirs = self.tiles(), other.tiles()
            if mine.shape[1] > 1 and theirs.shape[1] > 1:
                count = max(mine.shape[1], theirs.shape[1])
                mine = jnp.repeat(mine, count // mine.shape[1], 1)
                theirs = jnp.repeat(theirs, count // theirs.shape[1], 1)
            tiles = jnp.minimum(mine, theirs)
        return BlockMask.from_tiles(
            tiles,
            self.query_len,
            self.key_len,
            block_size=self.block_size,
            mask=mask if isinstance(self.mask, Full) else self.mask & mask,
        )

    def to_dense(self, *, batch: int = 1, heads: int = 1) -> jax.Array:
        """Every pair: bool, broadcastable to `[batch, heads, query_len, key_len]`."""
        tiles = self.tiles()
        for axis, size in enumerate(self.block_size, start=2):
            tiles = jnp.repeat(tiles, size, axis)
        tiles = tiles[:, :, : self.query_len, : self.key_len]
        if tiles.shape[1] not in (1, heads):
            tiles = jnp.repeat(tiles, heads // tiles.shape[1], 1)
        seen = self.mask.to_dense(
            self.query_len, self.key_len, batch=batch, heads=heads
        )
        return (tiles == FULL) | ((tiles == PARTIAL) & seen)


def transpose(lists: BlockMask) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The lists of query blocks that visit each key block, partial ones first.

    Returns:
      Indices `[B or 1, N or K or 1, nk, nq]`, counts and partial counts.
    """
    with _eager_if_known(lists):
        blocks = _grid(lists.query_len, lists.key_len, lists.block_size)[1]
        slot = jnp.arange(lists.indices.shape[-1])
        state = jnp.where(slot < lists.partial_counts[..., None], PARTIAL, FULL)
        index = jnp.where(slot < lists.counts[..., None], lists.indices, blocks)
        rows = index.reshape(-1, index.shape[-1])
        row = jnp.arange(rows.shape[0])[:, None]
        tiles = jnp.zeros((rows.shape[0], blocks), jnp.int32)
        tiles = tiles.at[row, rows].set(state.reshape(rows.shape), mode="drop")
        tiles = tiles.reshape(*index.shape[:-1], blocks)
        indices, counts, partial_counts = compact(jnp.swapaxes(tiles, -1, -2))
        if not is_traced(counts):
            indices = indices[..., : max(1, int(counts.max()))]
            return jax.device_get((indices, counts, partial_counts))
    return indices, counts, partial_counts


@functools.partial(jax.jit, static_argnums=range(1, 6))
def _classify(mask, query_len, key_len, block_size, batch, heads):
    """The map of blocks that a mask makes."""
    grid = _grid(query_len, key_len, block_size)
    some, every = mask.bounds(Tiles.grid(query_len, key_len, block_size, batch, heads))
    tiles = jnp.where(some, jnp.where(every, FULL, PARTIAL), SKIP)
    shape = jnp.broadcast_shapes(tiles.shape, (1, 1, *grid))
    return jnp.broadcast_to(tiles, shape)


@jax.jit
def compact(tiles):
    """Lists the blocks of each row of a map, partial ones first, by counting."""
    blocks = tiles.shape[-1]
    partial, full = tiles == PARTIAL, tiles == FULL
    partial_counts = partial.sum(-1, dtype=jnp.int32)
    counts = partial_counts + full.sum(-1, dtype=jnp.int32)
    slot = jnp.where(
        partial,
        jnp.cumsum(partial, -1) - 1,
        partial_counts[..., None] + jnp.cumsum(full, -1) - 1,
    )
    slot = jnp.where(partial | full, slot, blocks)

    def scatter(slot):
        order = jnp.arange(blocks, dtype=jnp.int32)
        return jnp.zeros(blocks, jnp.int32).at[slot].set(order, mode="drop")

    flat = jax.vmap(scatter)(slot.reshape(-1, blocks))
    return flat.reshape(tiles.shape), counts, partial_counts


def _check_sizes(query_len, key_len, block_size):
    expect(query_len >= 1, "query_len", "at least 1", query_len)
    expect(key_len >= 1, "key_len", "at least 1", key_len)
    fits = len(block_size) == 2 and min(block_size) >= 1
    expect(fits, "block_size", "two sizes of at least 1", block_size)


def _grid(query_len, key_len, block_size):
    return -(-query_len // block_size[0]), -(-key_len // block_size[1])


@contextlib.contextmanager
def _eager_if_known(tree):
    """Computes at trace time what depends on nothing traced, so lists can be short."""
    if is_traced(tree):
        yield
        return
    # What is computed at once is no part of a program that a mesh runs.
    no_mesh = jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))
    with jax.ensure_compile_time_eval(), no_mesh:
        yield
