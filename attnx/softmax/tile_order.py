"""The order of tokens in which a neighborhood's blocks are boxes against boxes."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

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
      in_array: which axis of an array each of these is.
    """

    axes: tuple[Window1D, ...]
    tile: tuple[int, ...]
    in_array: tuple[int, ...]

    @classmethod
    def of(cls, axes: tuple[Window1D, ...], tile: tuple[int, ...]) -> TileOrder:
        """The order in which tiles that are served at the same time share most.

        These are a run of tiles, and what they see are the planes of a window and of
        the run itself. So planes are cut across the axis that a window covers least.

        Args:
          axes: from `windows`.
          tile: tokens of a tile along each of them.
        """
        covered = [x.kernel_size * x.dilation / x.length for x in axes]
        in_array = tuple(sorted(range(len(axes)), key=covered.__getitem__))
        axes = tuple(axes[i] for i in in_array)
        return cls(axes, tuple(tile[i] for i in in_array), in_array)

    def through(self, run, *arrays: jax.Array, **options):
        """Runs `run` on row-major arrays `[B, T, ...]` in this order, and undoes it."""
        return jax.tree.map(self.flat, run(*map(self.tiled, arrays), **options))

    def tiled(self, x: jax.Array) -> jax.Array:
        """A row-major array `[B, T, ...]` in this order, zeros filling up its tiles."""
        rank = len(self.axes)
        lengths = (self.axes[i].length for i in self._back)
        x = x.reshape(x.shape[0], *lengths, *x.shape[2:])
        rest = range(rank + 1, x.ndim)
        x = x.transpose(0, *(i + 1 for i in self.in_array), *rest)
        return to_tiles(x, self.axes, self.tile)

    def flat(self, x: jax.Array) -> jax.Array:
        """The inverse of `tiled`."""
        rank = len(self.axes)
        x = from_tiles(x, self.axes, self.tile)
        x = x.transpose(0, *(i + 1 for i in self._back), *range(rank + 1, x.ndim))
        return x.reshape(x.shape[0], -1, *x.shape[rank + 1 :])

    @property
    def length(self) -> int:
        """Tokens of the row-major array."""
        return math.prod(axis.length for axis in self.axes)

    def places(self) -> jax.Array:
        """Where in a row-major array each token belongs, -1 for what fills tiles up."""
        numbers = jnp.arange(1, self.length + 1, dtype=jnp.int32)
        return self.tiled(numbers[None]) - 1

    @functools.cached_property
    def mask(self) -> Mask:
        return self.lists().mask

    def lists(self) -> BlockMask:
        return tile_lists(self.axes, self.tile)

    def transposed(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        return transposed_tile_lists(self.axes, self.tile)

    @property
    def _back(self) -> list[int]:
        """Which of `axes` each axis of an array is."""
        return sorted(range(len(self.axes)), key=self.in_array.__getitem__)
