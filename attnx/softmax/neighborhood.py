"""Neighborhood windows: their arithmetic, the mask, and the order of tokens in tiles.

Follows NATTEN: Generalized Neighborhood Attention (arXiv 2504.16922). Along each axis
a query attends a window of exactly `kernel_size` keys that is shifted inward at the
edges, never truncated. With dilation d an axis falls into d interleaved groups that do
not see each other; with stride s all s queries of a group share the window of their
centre (or, on a causal axis, of their last).
"""

from __future__ import annotations

import dataclasses
import math
from types import ModuleType

import jax
import jax.numpy as jnp
from jax import lax

from attnx._checks import expect
from attnx._tree import tree_class
from attnx.softmax.mask import Mask


@dataclasses.dataclass(frozen=True)
class Window1D:
    """One axis of a neighborhood, in tokens of that axis."""

    length: int
    kernel_size: int
    stride: int
    dilation: int
    is_causal: bool

    def split(self, index):
        """The dilation group of an index, and its position inside the group."""
        return index % self.dilation, index // self.dilation

    def group_length(self, group, xp: ModuleType = jnp):
        """Tokens of a dilation group: those of an uneven axis differ by one."""
        length, longer = divmod(self.length, self.dilation)
        if longer == 0:
            return length
        # Adding `group < longer` would make it a long integer in x64 mode.
        return length + xp.minimum(xp.maximum(longer - group, 0), 1)

    def range(self, group, position, xp: ModuleType = jnp):
        """The positions `[start, end)` that a query attends within its group.

        Computed by `xp`: jax.numpy, or numpy where the program has no part in it.
        """
        length = self.group_length(group, xp)
        stride = self.stride
        if stride & (stride - 1):
            leader = position - xp.fmod(position, stride)
        else:  # A power of two.
            leader = position & -stride
        if self.is_causal:
            leader = xp.minimum(leader + stride - 1, length - 1)
            start = xp.maximum(leader - self.kernel_size + 1, 0)
            return start, position + 1
        leader = xp.minimum(leader + stride // 2, length - 1)
        start = xp.minimum(leader - self.kernel_size // 2, length - self.kernel_size)
        start = xp.maximum(start, 0)
        return start, start + self.kernel_size


def windows(
    shape: tuple[int, ...],
    kernel_size: int | tuple[int, ...],
    stride: int | tuple[int, ...] = 1,
    dilation: int | tuple[int, ...] = 1,
    is_causal: bool | tuple[bool, ...] = False,
) -> tuple[Window1D, ...]:
    """Checks the arguments of a neighborhood and gives its axes."""
    rank = len(shape)
    expect(rank in (1, 2, 3), "neighborhood", "1, 2 or 3 spatial axes", rank)
    kernel_size = _each("kernel_size", kernel_size, rank)
    stride = _each("stride", stride, rank)
    dilation = _each("dilation", dilation, rank)
    causal = _each("is_causal", is_causal, rank)
    for length, k, s, d in zip(shape, kernel_size, stride, dilation, strict=True):
        expect(d >= 1, "dilation", "at least 1", dilation)
        expect(k >= 1, "kernel_size", "at least 1", kernel_size)
        expect(
            k * d <= length,
            "kernel_size * dilation",
            f"at most the axis, for shape {shape}",
            f"kernel_size {kernel_size}, dilation {dilation}",
        )
        expect(1 <= s <= k, "stride", f"1 to kernel_size {kernel_size}", stride)
    return tuple(map(Window1D, shape, kernel_size, stride, dilation, map(bool, causal)))


@tree_class(meta=("shape", "kernel_size", "stride", "dilation", "is_causal", "tile"))
class Neighborhood(Mask):
    """The neighborhood mask over the flattened tokens of an array of 1 to 3 axes.

    Attributes:
      shape: the axes' lengths.
      kernel_size: keys a query attends along each axis.
      stride: queries that share a window, 1 to `kernel_size`.
      dilation: distance between the keys of a window.
      is_causal: whether a query sees no later key along the axis.
      tile: None for tokens in row-major order, or the tile of `to_tiles`.
    """

    shape: tuple[int, ...]
    kernel_size: int | tuple[int, ...]
    stride: int | tuple[int, ...] = 1
    dilation: int | tuple[int, ...] = 1
    is_causal: bool | tuple[bool, ...] = False
    tile: tuple[int, ...] | None = None

    def __post_init__(self):
        _ = self.axes  # Refuses bad arguments where the mask is made.

    @property
    def axes(self) -> tuple[Window1D, ...]:
        return windows(
            self.shape, self.kernel_size, self.stride, self.dilation, self.is_causal
        )

    def __call__(self, batch, head, query, key):
        seen = True
        queries, keys = self._positions(query), self._positions(key)
        for axis, (group, position), (key_group, key_position) in zip(
            self.axes, queries, keys, strict=True
        ):
            start, end = axis.range(group, position)
            if axis.dilation > 1:
                seen &= group == key_group
            seen &= (start <= key_position) & (key_position < end)
        return seen

    def bounds(self, tiles):
        some = every = jnp.ones((1, 1, 1, 1), bool)
        queries = self._boxes(tiles.query_low, tiles.query_high)
        keys = self._boxes(tiles.key_low, tiles.key_high)
        for axis, query, key in zip(self.axes, queries, keys, strict=True):
            # A range of indices may span groups: the first is the longest, the last the
            # shortest, and a window starts and ends later in a longer one.
            short = jnp.where(query.alone, query.group, axis.dilation - 1)
            long = jnp.where(query.alone, query.group, 0)
            low, high = axis.range(short, query.low), axis.range(long, query.high)
            # Windows move with the query and overlap, so a range of queries sees the
            # range from the first start to the last end, and shares the one between.
            touched = (key.low < high[1]) & (low[0] <= key.high)
            shared = (high[0] <= key.low) & (key.high < low[1])
            alone, same = query.alone & key.alone, query.group == key.group
            some &= touched & (~alone | same)
            every &= shared & alone & same
        return some, every

    def _radices(self):
        """The digits of a token's index, most significant first."""
        if self.tile is None:
            return tuple(axis.length for axis in self.axes)
        groups = tuple(axis.dilation for axis in self.axes)
        return groups + tile_grid(self.axes, self.tile) + self.tile

    def _positions(self, index):
        return self._join(_digits(index, self._radices()))

    def _join(self, digits):
        """The (group, position) of each axis from the digits of an index."""
        rank = len(self.axes)
        if self.tile is None:
            return [
                axis.split(digit) for axis, digit in zip(self.axes, digits, strict=True)
            ]
        groups, blocks, inside = (digits[i * rank : (i + 1) * rank] for i in range(3))
        return [
            (group, block * size + offset)
            for group, block, size, offset in zip(
                groups, blocks, self.tile, inside, strict=True
            )
        ]

    def _boxes(self, low, high):
        """For each axis, what a range of indices spans: exact for whole tiles."""
        lows, highs, same = [], [], jnp.ones((), bool)
        radices = self._radices()
        for radix, a, b in zip(
            radices, _digits(low, radices), _digits(high, radices), strict=True
        ):
            # Below the first digit that differs, every value may occur.
            lows.append(jnp.where(same, a, 0))
            highs.append(jnp.where(same, b, radix - 1))
            same &= a == b
        boxes = []
        for i, ((group, start), (last_group, end)) in enumerate(
            zip(self._join(lows), self._join(highs), strict=True)
        ):
            alone = group == last_group
            if self.tile is None:
                alone = (lows[i] == highs[i]) | (self.axes[i].dilation == 1)
            boxes.append(_Box(group, start, end, alone))
        return boxes


@tree_class(meta=("shape", "kernel_size", "stride", "dilation", "is_causal", "tile"))
class TiledNeighborhood(Neighborhood):
    """A neighborhood asked about blocks that are tiles: the mask of `tile_lists`.

    The same predicate; only `at` is cheaper, and more is asked of who calls it.
    """

    def at(self, batch, head, query_start, row, key_start, column, /):
        """The predicate on a pair of one tile of queries and one of keys.

        Where the tile `fits_word`, the two starts must be starts of tiles, and `row`
        and `column` be less than the tokens of a tile. What a row sees of the tile of
        keys is then one word, a bit for each position along each axis. A column is one
        bit an axis, whatever the tile. A row sees it where its word has them all: an
        AND and a comparison for each pair.
        """
        tile = self.tile
        if tile is None or not fits_word(tile):
            return super().at(batch, head, query_start, row, key_start, column)
        queries = self._origins(query_start, tile)
        keys = self._origins(key_start, tile)
        rows, columns = _insides(row, tile), _insides(column, tile)
        seen = bits = jnp.int32(0)
        place = 0
        for axis, size, (group, origin), (key_group, key_origin), r, c in zip(
            self.axes, tile, queries, keys, rows, columns, strict=True
        ):
            # Bits [start, end) of the tile, moved to the axis' place in the word.
            start, end = (
                jnp.minimum(jnp.maximum(x - key_origin, 0), size)
                for x in axis.range(group, origin + r)
            )
            word = jnp.left_shift(1 << place, end) - jnp.left_shift(1 << place, start)
            if axis.dilation > 1:
                word = jnp.where(group == key_group, word, 0)
            seen |= word
            bits |= jnp.left_shift(1 << place, c)
            place += size
        return (seen & bits) == bits

    def _origins(self, start, tile):
        """For each axis the dilation group and the first position of a tile."""
        groups = tuple(axis.dilation for axis in self.axes)
        number = jnp.asarray(start, jnp.int32) >> (math.prod(tile).bit_length() - 1)
        digits = _digits(number, groups + tile_grid(self.axes, tile))
        groups, blocks = digits[: len(tile)], digits[len(tile) :]
        origins = (block * size for block, size in zip(blocks, tile, strict=True))
        return zip(groups, origins, strict=True)


def fits_word(tile: tuple[int, ...]) -> bool:
    """Whether the sizes are powers of two that sum to the bits of an int32."""
    return sum(tile) <= 31 and not any(n & (n - 1) for n in tile)


def tile_grid(axes: tuple[Window1D, ...], tile: tuple[int, ...]) -> tuple[int, ...]:
    """Tiles along each axis of one dilation group."""
    return tuple(
        -(-axis.length // (axis.dilation * size))
        for axis, size in zip(axes, tile, strict=True)
    )


def to_tiles(
    x: jax.Array, axes: tuple[Window1D, ...], tile: tuple[int, ...]
) -> jax.Array:
    """Orders tokens `[B, *space, ...]` by dilation group, then tile: `[B, T', ...]`.

    A box of neighbours becomes a run of tokens, so that a block of the score matrix is
    a box against a box. Axes are padded with zeros to whole tiles.
    """
    rank, grid = len(axes), tile_grid(axes, tile)
    batch, rest = x.shape[0], x.shape[rank + 1 :]
    padding = [
        (0, blocks * size * axis.dilation - axis.length)
        for axis, blocks, size in zip(axes, grid, tile, strict=True)
    ]
    x = jnp.pad(x, ((0, 0), *padding, *[(0, 0)] * len(rest)))
    x = x.reshape(batch, *_interleaved(axes, tile), *rest)
    x = x.transpose(0, *_order(rank), *range(3 * rank + 1, x.ndim))
    return x.reshape(batch, -1, *rest)


def from_tiles(
    x: jax.Array, axes: tuple[Window1D, ...], tile: tuple[int, ...]
) -> jax.Array:
    """The inverse of `to_tiles`, for `[B, T', ...]`."""
    rank, grid, rest = len(axes), tile_grid(axes, tile), x.shape[2:]
    groups = tuple(axis.dilation for axis in axes)
    x = x.reshape(x.shape[0], *groups, *grid, *tile, *rest)
    back = [_order(rank).index(axis + 1) + 1 for axis in range(3 * rank)]
    x = x.transpose(0, *back, *range(3 * rank + 1, x.ndim))
    padded = [a * b * c for a, b, c in zip(grid, tile, groups, strict=True)]
    x = x.reshape(x.shape[0], *padded, *rest)
    return x[(slice(None), *(slice(axis.length) for axis in axes))]


def choose_tile(axes: tuple[Window1D, ...]) -> tuple[int, ...]:
    """A tile nearly cubic, no larger than a dilation group."""
    preferred = {1: (128,), 2: (4, 8), 3: (2, 4, 4)}[len(axes)]
    return tuple(
        min(size, -(-axis.length // axis.dilation))
        for size, axis in zip(preferred, axes, strict=True)
    )


@dataclasses.dataclass(frozen=True)
class _Box:
    """Positions `low` to `high` of one dilation group, if the group is `alone`."""

    group: jax.Array
    low: jax.Array
    high: jax.Array
    alone: jax.Array


def _digits(index, radices):
    """The digits of an index that is not negative, the most significant first."""
    index, digits = jnp.asarray(index), []
    for radix in reversed(radices[1:]):
        # `//` and `%` would first ask for signs.
        rest = lax.div(index, index.dtype.type(radix))
        digits.append(index - rest * radix)
        index = rest
    return [index, *reversed(digits)]


def _insides(index, tile):
    """`_digits` for sizes that are powers of two."""
    index, digits = jnp.asarray(index, jnp.int32), []
    for size in reversed(tile):
        digits.append(index & (size - 1))
        index = index >> (size.bit_length() - 1)
    return reversed(digits)


def _interleaved(axes, tile):
    """An axis of length blocks * size * dilation, as those three."""
    return [
        part
        for axis, blocks, size in zip(axes, tile_grid(axes, tile), tile, strict=True)
        for part in (blocks, size, axis.dilation)
    ]


def _order(rank):
    """Groups, then blocks, then insides, out of (block, inside, group) an axis."""
    return [1 + 3 * axis + part for part in (2, 0, 1) for axis in range(rank)]


def _each(argument, value, rank):
    value = tuple(value) if isinstance(value, tuple | list) else (value,) * rank
    expect(len(value) == rank, argument, f"one value or {rank}", value)
    expect(all(isinstance(v, int) for v in value), argument, "Python integers", value)
    return value
