"""Pictures of masks."""

from __future__ import annotations

from attnx.softmax.mask import Mask, Tiles


def plot(
    mask: Mask,
    query_len: int,
    key_len: int,
    *,
    block_size: tuple[int, int] | None = None,
    ax=None,
):
    """Draws a mask: visible pairs dark, and with `block_size` the tiles it visits.

    Args:
      mask: the mask; the first sequence and head are drawn.
      query_len: rows.
      key_len: columns.
      block_size: `(queries, keys)` of a tile. Partial tiles are tinted, full ones more.
      ax: matplotlib axes; by default new ones.

    Returns:
      The axes.
    """
    import matplotlib.pyplot as plt
    import numpy as np

    ax = plt.subplots(figsize=(3, 3), layout="constrained")[1] if ax is None else ax
    shade = np.zeros((query_len, key_len))
    if block_size is not None:
        some, every = mask.bounds(Tiles.grid(query_len, key_len, block_size))
        grid = (-(-query_len // block_size[0]), -(-key_len // block_size[1]))
        tint = np.broadcast_to(0.15 * some + 0.15 * every, (1, 1, *grid))[0, 0]
        shade += np.kron(tint, np.ones(block_size))[:query_len, :key_len]
    seen = np.asarray(mask.to_dense(query_len, key_len)[0, 0])
    image = np.where(seen, 0.85, shade)
    ax.imshow(image, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    ax.set(xlabel="key", ylabel="query", xticks=[], yticks=[])
    return ax
