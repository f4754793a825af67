"""Softmax attention over a sequence cut in pieces: all tokens, some heads a device."""

from __future__ import annotations

import jax

from attnx._checks import expect
from attnx.parallel.axes import AxisName, axis_size
from attnx.parallel.pieces import of_heads
from attnx.softmax import KernelConfig, dot_product_attention
from attnx.softmax.engine import check_arrays
from attnx.softmax.mask import Mask


def ulysses_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    axis_name: AxisName,
    *,
    mask: Mask | None = None,
    is_causal: bool = False,
    scale: float | jax.Array | None = None,
    implementation: str | KernelConfig | None = None,
    return_residual: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Computes `dot_product_attention` of a sequence that is cut over a mesh axis.

    DeepSpeed Ulysses (arXiv 2309.14509): exchanges pieces of the sequence for heads,
    attends as on one device, and exchanges back. It sends less than a ring and keeps
    tiles that are known beforehand, but needs P to divide the heads.

    For the inside of `jax.shard_map`; `sharded(ulysses_attention)` takes whole arrays.

    Args:
      query: `[B, T / P, N, H]`, this device's; P divides N.
      key: `[B, S / P, K, H]`; K divides N, and P divides K.
      value: `[B, S / P, K, V]`.
      axis_name: the mesh axis that the tokens are cut over.
      mask: as in `ring_attention`; the ids of `Segments` are gathered.
      is_causal: query i sees keys 0 to i.
      scale: factor on the scores, by default `H ** -0.5`.
      implementation: as in `dot_product_attention`.
      return_residual: also return the log-sum-exp.

    Returns:
      As `dot_product_attention`, for this device's queries.

    Raises:
      ValueError: arrays that do not fit, heads that the devices do not divide, an axis
        that there is not, or a mask that cannot be cut.
      NotImplementedError: an `implementation` that does not serve the call.

    Example:
      >>> import jax
      >>> from attnx import parallel
      >>> mesh = jax.make_mesh((1,), ("context",))
      >>> tokens = jax.NamedSharding(mesh, jax.P(None, "context"))
      >>> attend = parallel.sharded(parallel.ulysses_attention, sharding=tokens)
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 64, 2, 16))
      >>> attend(q, k, v, is_causal=True).shape
      (1, 64, 2, 16)
    """
    query, key, value, batched = check_arrays(query, key, value)
    expect(batched, "query", "[B, T, N, H]", query.shape[1:])
    size = axis_size(axis_name)
    for name, x in (("query", query), ("key", key)):
        wanted = f"a number of heads that is a multiple of {axis_name!r}, {size}"
        expect(x.shape[2] % size == 0, name, wanted, x.shape[2])
    if mask is not None:
        expect(isinstance(mask, Mask), "mask", "a Mask", type(mask).__name__)
        heads = query.shape[2] // size
        mask = of_heads(
            mask,
            jax.lax.axis_index(axis_name) * heads,
            lambda ids: jax.lax.all_gather(
                ids, axis_name, axis=-1 + ids.ndim, tiled=True
            ),
        )

    def exchange(x, tokens_to_heads):
        split, concat = (2, 1) if tokens_to_heads else (1, 2)
        return jax.lax.all_to_all(x, axis_name, split, concat, tiled=True)

    out, lse = dot_product_attention(
        *(exchange(x, True) for x in (query, key, value)),
        mask=mask,
        is_causal=is_causal,
        scale=scale,
        implementation=implementation,
        return_residual=True,
    )
    out = exchange(out, False)
    return (out, exchange(lse, False)) if return_residual else out
