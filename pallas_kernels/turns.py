"""Tiles that blocks of threads serve one after the other."""

from __future__ import annotations

import jax.experimental.pallas as pl
import jax.numpy as jnp
import numpy as np
from jax import lax

# An H100's multiprocessors, each of which runs one block of threads at a time.
PROCESSORS = 132


def place(number, shape: tuple[int, int, int], late: int = 0):
    """The batch, head and tile of a number that counts all tiles, batches first.

    Tiles come from the last to the first, head by head. The first `late` of each come
    after all others: as blocks of threads end, they fill what is left of time.

    Args:
      number: of a tile.
      shape: batches, heads and tiles of a head.
      late: a number of tiles.
    """
    batches, heads, tiles = shape
    number, batch = divided(number, batches)
    if not late:
        head, i = divided(number, tiles)
        return batch, head, tiles - 1 - i
    rest = number - heads * (tiles - late)
    head, i = divided(number, tiles - late)
    turn, late_head = divided(rest, heads)
    is_late = rest >= 0
    return (
        batch,
        jnp.where(is_late, late_head, head),
        jnp.where(is_late, late - 1 - turn, tiles - 1 - i),
    )


def in_order(costs: np.ndarray, late: int = 0) -> np.ndarray:
    """Numbers of tiles `[B, N, tiles]` in the order of `place`."""
    before, after = costs[..., late:], costs[..., :late]
    before = before[..., ::-1].transpose(1, 2, 0).ravel()
    return np.concatenate([before, after[..., ::-1].transpose(2, 1, 0).ravel()])


class Turns:
    """Which of `total` tiles each block of threads serves, so many in turn.

    At any time blocks of threads serve neighbouring tiles, whose operands meet in the
    cache: those that follow each other in turn are far apart. Every other turn goes
    backwards, so that where tiles grow longer or shorter each block's come to the same.

    Attributes:
      blocks: blocks of threads.
    """

    def __init__(self, total: int, tiles: int):
        self._total, self._tiles = total, tiles
        self.blocks = pl.cdiv(total, tiles)
        # A few more leave no multiprocessor idle.
        idle = -self.blocks % PROCESSORS
        if tiles > 1 and idle * 16 < self.blocks:
            self.blocks += idle

    def number(self, me, t):
        """The number of a block's tile; the last where `exists` says there is none."""
        return me if self._tiles == 1 else jnp.minimum(self._at(me, t), self._total - 1)

    def exists(self, me, t):
        """Whether there is a tile: the last turn may have fewer."""
        return self._at(me, t) < self._total

    def _at(self, me, t):
        is_odd = lax.rem(jnp.int32(t), jnp.int32(2)) == 1
        return t * self.blocks + jnp.where(is_odd, self.blocks - 1 - me, me)

    def each(self, body):
        """`body(turn, steps done before) -> steps done`."""
        if self._tiles == 1:
            return body(0, 0)
        return lax.fori_loop(0, self._tiles, body, jnp.int32(0))


def loads(costs: np.ndarray, tiles: int) -> np.ndarray:
    """What each block of threads has to do if tiles in this order cost so much."""
    turns = Turns(costs.size, tiles)
    costs = np.pad(costs, (0, turns.blocks * tiles - costs.size))
    costs = costs.reshape(tiles, turns.blocks)
    costs[1::2] = costs[1::2, ::-1]
    return costs.sum(0)


def divided(number, by: int):
    """The quotient and what remains."""
    if by == 1:
        return number, jnp.int32(0)
    quotient = lax.div(number, jnp.int32(by))
    return quotient, number - quotient * by
