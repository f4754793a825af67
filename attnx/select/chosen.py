"""A choice of blocks as a mask: any choice on any implementation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from attnx._tree import tree_class
from attnx.softmax.mask import Mask


@tree_class()
class Chosen(Mask):
    """A query sees the tokens of the blocks it chose.

    Attention under it visits the blocks that any query of a tile chose: exact for any
    choice, fast where neighbours agree. `routed_attention` is for where they do not.

    Attributes:
      tiles: bool `[B or 1, N or 1, T, n]`, such as `Choice.to_tiles()`.
      ids: int `[B or 1, S]`, the block of each key, such as `Blocks.ids`. A key whose
        number is n or more is in no block and is not seen.

    Example:
      >>> import jax, attnx
      >>> from attnx.select import Blocks, Chosen
      >>> from attnx.select import block_scores, pool_mean, top_k_blocks
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 64, 2, 16))
      >>> blocks = Blocks.regular(64, 16)
      >>> choice = top_k_blocks(block_scores(q, pool_mean(k, blocks)), 2)
      >>> mask = Chosen(choice.to_tiles(), blocks.ids)
      >>> attnx.dot_product_attention(q, k, v, mask=mask).shape
      (1, 64, 2, 16)
    """

    tiles: jax.Array
    ids: jax.Array | np.ndarray

    def __call__(self, batch, head, query, key):
        block = self._ids(batch, key)
        batch, head = self._clamped(batch, head)
        blocks = self.tiles.shape[-1]
        chosen = self.tiles[batch, head, query, jnp.minimum(block, blocks - 1)]
        return chosen & (block < blocks)

    def bounds(self, tiles):
        batch, head = self._clamped(tiles.batch[..., None], tiles.head[..., None])
        rows = self.tiles[batch, head, tiles.query_indices()][:, :, :, 0]
        block = self._ids(tiles.batch[..., None], tiles.key_indices())
        index = jnp.minimum(block, rows.shape[-1])
        index = index.reshape(index.shape[0], 1, 1, -1)

        def by_key(seen):
            """`[B, N, nq, n]` looked up for each key: `[B, N, nq, nk, keys]`."""
            seen = jnp.pad(seen, [(0, 0)] * 3 + [(0, 1)])  # no block
            seen = jnp.take_along_axis(seen, index, -1)
            return seen.reshape(*seen.shape[:3], *block.shape[-2:])

        return by_key(rows.any(-2)).any(-1), by_key(rows.all(-2)).all(-1)

    def _ids(self, batch, key):
        batch = 0 if self.ids.shape[0] == 1 else batch
        return jnp.asarray(self.ids)[batch, key]

    def _clamped(self, batch, head):
        sizes = self.tiles.shape
        return tuple(
            0 if n == 1 else i for i, n in zip((batch, head), sizes, strict=False)
        )
