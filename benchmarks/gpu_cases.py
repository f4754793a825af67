"""What is timed on a GPU, in bfloat16. Needs JAX and NumPy alone."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

import attnx
from attnx import masks, parallel, select
from attnx.select.boxes import Boxes
from benchmarks import peers
from benchmarks.cases import Case
from benchmarks.gpu_cases_linear import linear, step, taylor

BLOCK = 128
PIECES = 8
# Of all sequences of a batch, where time against length is measured.
TOKENS = 1 << 20


def cases() -> Iterator[Case]:
    """Every case. Makes no array, so that no GPU is taken by listing them."""
    for heads, kv_heads, size in ((16, 16, 128), (32, 32, 64), (16, 4, 128)):
        yield dense("dense", 4, 4096, heads, kv_heads, size)
        yield dense("causal", 1, 16384, heads, kv_heads, size)
    yield dense("window 1024", 1, 16384, 16, 16, 128, left=1024)
    yield neighborhood(1, (256, 256), (80, 80), (1, 1), 24, 128)
    yield neighborhood(1, (256, 256), (80, 80), (16, 16), 24, 128)
    yield neighborhood(1, (30, 48, 80), (18, 24, 24), (1, 1, 1), 24, 128)
    yield neighborhood(1, (30, 48, 80), (18, 24, 24), (16, 8, 8), 24, 128)
    yield neighborhood(64, (56, 56), (7, 7), (1, 1), 12, 32)
    for percent in (5, 10, 25, 50):
        yield blocks(percent, 1, 32768, 16, 128)
    for length in (65536, 131072):
        yield moba(1, length, 16, 128)
    yield vmoba("top", 1, (30, 48, 80), (10, 16, 10), 18, 16, 128)
    yield vmoba("threshold", 1, (30, 48, 80), (10, 16, 10), 18, 16, 128)
    yield power(1, 131072, 16, 128)
    yield decode(32, 32768, 32, 8, 128)
    for batch, length, heads in ((8, 2048, 16), (4, 4096, 32), (1, 16384, 32)):
        yield linear("per head", batch, length, heads, 128)
    yield linear("per token", 4, 4096, 32, 128)
    yield linear("per channel", 4, 4096, 32, 128)
    for batch, length in ((1, 16384), (8, 16384), (1, 131072)):
        yield linear("per head", batch, length, 16, 128)
    for bits in (10, 12, 14, 16, 18, 20):
        yield linear("per head", TOKENS >> bits, 1 << bits, 4, 128)
    for kind in ("ring", "states"):
        yield in_pieces(kind, 1, 131072, 16, 128)
    yield step(256, 32, 128)
    yield taylor(4, 4096, 32, 64)
    yield taylor(4, 4096, 32, 128)
    yield taylor(1, 16384, 32, 64)


def dense(
    kind: str,
    batch: int,
    length: int,
    heads: int,
    kv_heads: int,
    size: int,
    *,
    left: int = 0,
) -> Case:
    """Attention to all tokens, to the earlier ones, or to the last `left`."""
    options = {"is_causal": kind != "dense"}
    if left:
        options["local_window_size"] = (left - 1, 0)
    of_keys = "" if kv_heads == heads else f" K{kv_heads}"
    small = functools.partial(
        dense, kind, 2, 512, heads, kv_heads, size, left=min(left, 100)
    )
    return Case(
        "dot_product_attention",
        f"{kind} B{batch} T{length} N{heads}{of_keys} H{size}",
        ((batch, length, heads, size), *((batch, length, kv_heads, size),) * 2),
        {
            "cudnn": peers.cudnn(**options),
            **peers.ours(attnx.dot_product_attention, **options),
        },
        small,
        "bfloat16",
    )


def neighborhood(
    batch: int,
    space: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    heads: int,
    size: int,
) -> Case:
    """Neighborhood attention over an image or a volume."""
    options = {"kernel_size": kernel, "stride": stride}
    strided = f" stride {_by(stride)}" if max(stride) > 1 else ""
    fewer = ((32, 32), (10, 10)) if len(space) == 2 else ((8, 12, 16), (5, 6, 6))
    small = functools.partial(
        neighborhood, 1, *fewer, tuple(min(s, 4) for s in stride), 2, size
    )
    return Case(
        "neighborhood_attention",
        f"{_by(space)} kernel {_by(kernel)}{strided} B{batch} N{heads} H{size}",
        ((batch, *space, heads, size),) * 3,
        peers.ours(attnx.neighborhood_attention, **options),
        small,
        "bfloat16",
    )


def blocks(percent: int, batch: int, length: int, heads: int, size: int) -> Case:
    """Attention to a random share of all blocks, beside attention to all of them."""

    def chosen() -> attnx.BlockMask:
        count = length // BLOCK
        tiles = np.random.default_rng(0).random((count, count)) < percent / 100
        tiles[~tiles.any(1), 0] = True  # at least one block a row
        return attnx.BlockMask.from_tiles(
            tiles, length, length, block_size=(BLOCK, BLOCK)
        )

    def attention(query, key, value, implementation):
        return attnx.block_sparse_attention(
            query, key, value, chosen(), implementation=implementation
        )

    return Case(
        "block_sparse_attention",
        f"blocks {percent}% B{batch} T{length} N{heads} H{size}",
        ((batch, length, heads, size),) * 3,
        peers.ours(attention),
        functools.partial(blocks, percent, 1, 1024, 2, size),
        "bfloat16",
        yardsticks={"dense cudnn": peers.cudnn()},
    )


def moba(batch: int, length: int, heads: int, size: int) -> Case:
    """Each query's own block and the seven best before it, the choice included."""
    options = {"block_size": BLOCK, "top_k": 8}
    return Case(
        "moba_attention",
        f"moba block 128 top 8 B{batch} T{length} N{heads} H{size}",
        ((batch, length, heads, size),) * 3,
        peers.ours(select.moba_attention, ("reference", "pallas"), **options),
        functools.partial(moba, 1, 2048, 2, size),
        "bfloat16",
        yardsticks={"causal cudnn": peers.cudnn(is_causal=True)},
    )


def vmoba(
    kind: str,
    batch: int,
    space: tuple[int, int, int],
    block: tuple[int, int, int],
    most: int,
    heads: int,
    size: int,
) -> Case:
    """Boxes of a video chosen over whole heads, the choice included.

    By "top" so many a query, beside dense attention; by "threshold" as many as hold a
    quarter of the scores, beside the choice alone.
    """
    tokens = math.prod(space)

    def dense(*arrays):
        flat = (x.reshape(batch, tokens, heads, size) for x in arrays)
        return peers.cudnn()(*flat).reshape(arrays[0].shape)

    def choice(query, key, _):
        query, key = (x.reshape(batch, tokens, heads, size) for x in (query, key))
        boxes = Boxes(space, block, "min_max", "head", most)
        return boxes.choose(query, key, options["threshold"], implementation=None).words

    modes, yardsticks = Case._field_defaults["modes"], {"cudnn": dense}
    options, label = {"top_k": most}, f"top {most}"
    if kind == "threshold":
        options, label = {"threshold": 0.25, "max_blocks": most}, kind
        modes, yardsticks = ("forward",), {"choice": choice}
    return Case(
        "vmoba_attention",
        f"vmoba {_by(space)} block {_by(block)} {label} B{batch} N{heads} H{size}",
        ((batch, *space, heads, size),) * 3,
        peers.ours(
            select.vmoba_attention,
            ("reference", "pallas"),
            block_size=block,
            **options,
        ),
        functools.partial(vmoba, kind, 1, (20, 16, 10), (10, 8, 5), 2, 2, size),
        "bfloat16",
        modes,
        yardsticks,
    )


def power(batch: int, length: int, heads: int, size: int) -> Case:
    """PowerAttention, beside a window that visits as many blocks."""
    mask = masks.Power(BLOCK, window=2)

    def window(query, key, value):
        lists = attnx.BlockMask.from_mask(
            mask, length, length, block_size=(BLOCK, BLOCK)
        )
        # A window of w blocks' length visits w + 1 of them, at the start what there is.
        order = np.arange(length // BLOCK)
        visits = np.minimum.outer(order, order).sum(1) + len(order)
        blocks = int(np.searchsorted(visits, lists.counts.sum()))
        return attnx.dot_product_attention(
            query,
            key,
            value,
            is_causal=True,
            local_window_size=(blocks * BLOCK - 1, 0),
            implementation="pallas",
        )

    return Case(
        "dot_product_attention",
        f"power block 128 B{batch} T{length} N{heads} H{size}",
        ((batch, length, heads, size),) * 3,
        peers.ours(attnx.dot_product_attention, ("reference", "pallas"), mask=mask),
        functools.partial(power, 1, 2048, 2, size),
        "bfloat16",
        yardsticks={"window": window, "causal cudnn": peers.cudnn(is_causal=True)},
    )


def decode(batch: int, length: int, heads: int, kv_heads: int, size: int) -> Case:
    """Attention of one new token a sequence to a full cache, beside a copy."""

    def attention(query, key, value, implementation):
        # Hidden from XLA, which would otherwise prepare the lists at compile time.
        lengths = jax.lax.optimization_barrier(jnp.full(batch, length))
        return attnx.decode_attention(
            query, key, value, lengths, implementation=implementation
        )

    def copy(query, key, value):
        # As many bytes read and written as attention reads; changed, because XLA
        # leaves a plain copy to the driver, where no kernel shows.
        return -key

    return Case(
        "decode_attention",
        f"decode B{batch} S{length} N{heads} K{kv_heads} H{size}",
        ((batch, 1, heads, size), *((batch, length, kv_heads, size),) * 2),
        {
            "cudnn": peers.cudnn(),
            "jax.nn": jax.nn.dot_product_attention,
            **peers.ours(attention),
        },
        functools.partial(decode, 2, 1024, heads, kv_heads, size),
        "bfloat16",
        ("forward",),
        {"copy": copy},
    )


def in_pieces(kind: str, batch: int, length: int, heads: int, size: int) -> Case:
    """A sequence cut in eight as over devices, all of them on one: the extra work."""
    if kind == "ring":
        whole = functools.partial(attnx.dot_product_attention, is_causal=True)
        fn = functools.partial(parallel.ring_attention, is_causal=True, order="zigzag")
    else:
        options = {"log_decay": attnx.decay.retnet(heads)}
        whole = functools.partial(attnx.linear_attention, **options)
        fn = functools.partial(parallel.linear_attention, **options)

    def pieces(*arrays):
        if kind == "ring":
            arrays = [parallel.to_zigzag(x, PIECES) for x in arrays]
        cut = (x.reshape(batch, PIECES, -1, heads, size) for x in arrays)
        attend = functools.partial(fn, axis_name="pieces", implementation="pallas")
        out = _mapped(attend, "pieces")(*cut)
        out = out.reshape(batch, -1, heads, size)
        return parallel.from_zigzag(out, PIECES) if kind == "ring" else out

    def zigzag(*arrays):
        # A model orders its tokens once, not in each layer.
        out = parallel.from_zigzag(-arrays[0], PIECES)
        return *(parallel.to_zigzag(x, PIECES) for x in arrays), out

    def sending(_, *arrays):
        # Copies of keys and values, which between devices would be messages.
        for _ in range(PIECES - 1):
            arrays = [jnp.roll(x, length // PIECES, 1) for x in arrays]
            arrays = jax.lax.optimization_barrier(arrays)
        return tuple(arrays)

    return Case(
        "parallel",
        f"{kind} in {PIECES} pieces B{batch} T{length} N{heads} H{size}",
        ((batch, length, heads, size),) * 3,
        {**peers.ours(whole, ("reference", "pallas")), "pieces": pieces},
        functools.partial(in_pieces, kind, 1, 2048, 2, size),
        "bfloat16",
        yardsticks={"zigzag": zigzag, "sending": sending} if kind == "ring" else {},
    )


def _mapped(fn: Callable, axis_name: str) -> Callable:
    """`fn` over an axis with a name, which its own gradient may ask for as well."""

    @jax.custom_vjp
    def run(*arrays):
        return jax.vmap(fn, 1, 1, axis_name=axis_name)(*arrays)

    def forward(*arrays):
        both = lambda *arrays: jax.vjp(fn, *arrays)
        return jax.vmap(both, 1, (1, 0), axis_name=axis_name)(*arrays)

    def backward(pull, d_out):
        back = lambda pull, d_out: pull(d_out)
        return jax.vmap(back, (0, 1), 1, axis_name=axis_name)(pull, d_out)

    run.defvjp(forward, backward)
    return run


def _by(numbers: tuple[int, ...]) -> str:
    return "x".join(map(str, numbers))
