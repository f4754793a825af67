"""The order of tokens in which a neighborhood's blocks are boxes against boxes."""

from __future__ import annotations

import dataclasses
import functools

import jax

from attnx.softmax.block_mask import BlockMask
from attnx.softmax.mask import Mask
from attnx.softmax.neighborhood import Window1D, from_tiles, to_tiles
from attnx.softmax.tile_lists import tile_lists, transposed_tile_lists


@dataclasses.dataclass(frozen=True)
class TileOrder:
    """Tokens by dilation group, then tile."""

    axes: tuple[Window1D, ...]
    tile: tuple[int, ...]

    def through(self, run, *arrays: jax.Array, **options):
        """Runs `run` on row-major arrays `[B, T, ...]` in this order, and undoes it."""
        space = tuple(axis.length for axis in self.axes)

        def tiled(x):
            x = x.reshape(x.shape[0], *space, *x.shape[2:])
            return to_tiles(x, self.axes, self.tile)

        def flat(x):
            x = from_tiles(x, self.axes, self.tile)
            return x.reshape(x.shape[0], -1, *x.shape[1 + len(space) :])

        return jax.tree.map(flat, run(*map(tiled, arrays), **options))

    @functools.cached_property
    def mask(self) -> Mask:
        return self.lists().mask

    def lists(self) -> BlockMask:
        return tile_lists(self.axes, self.tile)

    def transposed(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        return transposed_tile_lists(self.axes, self.tile)
