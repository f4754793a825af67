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
    """Tokens by dilation group, then tile.

    Attributes:
      axes: the neighborhood's, the one along which tiles are counted last first.
      tile: tokens of a tile along each of these.
      places: which axis of an array each of these is.
    """

    axes: tuple[Window1D, ...]
    tile: tuple[int, ...]
    places: tuple[int, ...]

    @classmethod
    def of(cls, axes: tuple[Window1D, ...], tile: tuple[int, ...]) -> TileOrder:
        """The order in which tiles that are served at the same time share most.

        These are a run of tiles, and what they see are the planes of a window and of
        the run itself. So planes are cut across the axis that a window covers least.

        Args:
          axes: from `windows`.
          tile: tokens of a tile along each of them.
        """

        def covered(place):
            axis = axes[place]
            return axis.kernel_size * axis.dilation / axis.length

        places = tuple(sorted(range(len(axes)), key=covered))
        return cls(*(tuple(x[i] for i in places) for x in (axes, tile)), places)

    def through(self, run, *arrays: jax.Array, **options):
        """Runs `run` on row-major arrays `[B, T, ...]` in this order, and undoes it."""
        space = [axis.length for axis in self.axes]
        rank = len(space)
        back = sorted(range(rank), key=self.places.__getitem__)

        def tiled(x):
            rest = range(rank + 1, rank + x.ndim - 1)
            x = x.reshape(x.shape[0], *(space[i] for i in back), *x.shape[2:])
            x = x.transpose(0, *(i + 1 for i in self.places), *rest)
            return to_tiles(x, self.axes, self.tile)

        def flat(x):
            x = from_tiles(x, self.axes, self.tile)
            x = x.transpose(0, *(i + 1 for i in back), *range(rank + 1, x.ndim))
            return x.reshape(x.shape[0], -1, *x.shape[rank + 1 :])

        return jax.tree.map(flat, run(*map(tiled, arrays), **options))

    @functools.cached_property
    def mask(self) -> Mask:
        return self.lists().mask

    def lists(self) -> BlockMask:
        return tile_lists(self.axes, self.tile)

    def transposed(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        return transposed_tile_lists(self.axes, self.tile)
