"""What context parallelism sends, for `docs/scaling.md`: `-m benchmarks.scaling`."""

from __future__ import annotations

import dataclasses

# An H100 SXM, by its data sheet: what one direction of a link carries, the memory, and
# dense bfloat16 products. Nothing here is measured.
NVLINK, INFINIBAND, MEMORY, PEAK = 450e9, 50e9, 3.35e12, 989e12


@dataclasses.dataclass(frozen=True)
class Sizes:
    """One layer's sizes; H for keys and values alike.

    Attributes:
      devices: P.
      tokens: L, of a device; P L in all.
      heads: N.
      key_heads: K.
      head_size: H.
      itemsize: e, bytes of a number.
      reach: tokens before and behind a piece that windows reach.
      window: tokens that a query of a neighborhood sees.
    """

    devices: int = 8
    tokens: int = 16384
    heads: int = 32
    key_heads: int = 8
    head_size: int = 128
    itemsize: int = 2
    reach: int = 1024
    window: int = 1024

    def keys(self, itemsize: int) -> int:
        """Bytes of a token's keys and values."""
        return 2 * self.key_heads * self.head_size * itemsize


def sent(sizes: Sizes) -> dict[str, tuple[float, float]]:
    """Bytes that a device receives, forward and backward, by mode; of one sequence."""
    others, tokens = sizes.devices - 1, sizes.tokens
    keys = tokens * sizes.keys(sizes.itemsize)
    # Sums, and at last what they came to.
    gradients = others * tokens * sizes.keys(4) + keys
    exchanged = 2 * (sizes.heads + sizes.key_heads) * sizes.head_size * sizes.itemsize
    exchanged = others / sizes.devices * tokens * exchanged
    state = 4.0 * others * sizes.heads * sizes.head_size * (sizes.head_size + 1)
    halo = float(sizes.reach * sizes.keys(sizes.itemsize))
    return {
        "ring": (others * keys, others * keys + gradients),
        "all-to-all": (exchanged, exchanged),
        "states": (state, state),
        "halo": (halo, halo),
    }


def work(sizes: Sizes) -> dict[str, float]:
    """Seconds that the forward computes at least: products, or reading and writing."""
    per_pair = 4 * sizes.heads * sizes.head_size / PEAK
    causal = sizes.tokens * sizes.devices * sizes.tokens / 2 * per_pair
    arrays = 2 * (sizes.heads + sizes.key_heads) * sizes.head_size * sizes.itemsize
    return {
        "ring": causal,
        "all-to-all": causal,
        "states": sizes.tokens * arrays / MEMORY,
        "halo": sizes.tokens * sizes.window * per_pair,
    }


def least_tokens(sizes: Sizes, link: float, *, backward: bool) -> float:
    """Tokens a device from which a causal zig-zag ring hides what it sends."""
    per_token = sizes.keys(sizes.itemsize) + (sizes.keys(4) if backward else 0)
    # Half of the pairs are visible; the backward has five products to two.
    products = (10 if backward else 4) / 2 * sizes.heads * sizes.head_size
    return per_token / link * PEAK / products


def markdown() -> str:
    """The tables."""
    sizes = Sizes()
    lines = [
        "| mode | bytes a token, forward | backward | NVLink, ms | InfiniBand, ms "
        "| forward's own work, ms |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for mode, (forward, backward) in sent(sizes).items():
        each = [f"{x / sizes.tokens:,.0f}" for x in (forward, backward)]
        times = (forward / NVLINK, forward / INFINIBAND, work(sizes)[mode])
        each += [f"{1e3 * x:.2f}" for x in times]
        lines.append(f"| {mode} | " + " | ".join(each) + " |")
    lines += [
        "",
        "| tokens a device, from which a ring's step hides its sending | NVLink "
        "| InfiniBand |",
        "|---|--:|--:|",
    ]
    for heads in (sizes.heads, sizes.key_heads):
        for backward in (False, True):
            of = dataclasses.replace(sizes, key_heads=heads)
            name = f"{'backward' if backward else 'forward'}, K = {heads}"
            least = (
                f"{least_tokens(of, link, backward=backward):,.0f}"
                for link in (NVLINK, INFINIBAND)
            )
            lines.append(f"| {name} | " + " | ".join(least) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown())
