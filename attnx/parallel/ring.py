"""Softmax attention over a sequence cut in pieces: keys and values go round a ring."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from attnx._checks import expect
from attnx.parallel.axes import AxisName, axis_size, from_next
from attnx.parallel.pieces import key_ids, of_pieces
from attnx.softmax import KernelConfig, merge_attention
from attnx.softmax.engine import attend, check_arrays
from attnx.softmax.mask import Mask
from attnx.softmax.masks import Causal, Full

ORDERS = ("contiguous", "zigzag")


def ring_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    axis_name: AxisName,
    *,
    mask: Mask | None = None,
    is_causal: bool = False,
    order: str = "contiguous",
    scale: float | jax.Array | None = None,
    implementation: str | KernelConfig | None = None,
    return_residual: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Computes `dot_product_attention` of a sequence that is cut over a mesh axis.

    Ring Attention (arXiv 2310.01889): each of P devices keeps its queries; keys and
    values visit all devices in P - 1 steps, and what each step gives is merged by
    log-sum-exp. The gradient goes round again, with the keys' and values' gradients in
    float32, and keeps nothing of the other devices.

    For the inside of `jax.shard_map`; `sharded(ring_attention)` takes whole arrays.

    Args:
      query: `[B, T / P, N, H]`, this device's.
      key: `[B, S / P, K, H]`; K divides N.
      value: `[B, S / P, K, V]`.
      axis_name: the mesh axis that the tokens are cut over.
      mask: who sees whom, by position in the whole sequence: any function of indices;
        of `Segments`, the ids of this device's tokens.
      is_causal: query i sees keys 0 to i.
      order: "contiguous", device i having the i-th piece of P; or "zigzag", pieces i
        and 2P - 1 - i of 2P, as `to_zigzag` orders tokens, which gives all devices as
        much to do under a causal mask.
      scale: factor on the scores, by default `H ** -0.5`.
      implementation: as in `dot_product_attention`.
      return_residual: also return the log-sum-exp.

    Returns:
      As `dot_product_attention`, for this device's queries.

    Raises:
      ValueError: arrays or options that do not fit, an axis that there is not, or a
        mask that cannot be cut.
      NotImplementedError: an `implementation` that does not serve the call.

    Example:
      >>> import jax
      >>> from attnx import parallel
      >>> mesh = jax.make_mesh((1,), ("context",))
      >>> tokens = jax.NamedSharding(mesh, jax.P(None, "context"))
      >>> attend = parallel.sharded(parallel.ring_attention, sharding=tokens)
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 64, 2, 16))
      >>> attend(q, k, v, is_causal=True).shape
      (1, 64, 2, 16)
    """
    query, key, value, batched = check_arrays(query, key, value)
    expect(batched, "query", "[B, T, N, H]", query.shape[1:])
    expect(order in ORDERS, "order", f"one of {ORDERS}", repr(order))
    axis_size(axis_name)
    mask = Full() if mask is None else mask
    expect(isinstance(mask, Mask), "mask", "a Mask", type(mask).__name__)
    if is_causal:
        mask = Causal() if isinstance(mask, Full) else mask & Causal()
    per_device = ORDERS.index(order) + 1
    for name, x in (("query", query), ("key", key)):
        expect(
            x.shape[1] % per_device == 0,
            name,
            f"a multiple of {per_device} tokens a device",
            x.shape[1],
        )
    if scale is None:
        scale = query.shape[-1] ** -0.5
    elif not isinstance(scale, int | float):
        query, scale = query * jnp.asarray(scale, query.dtype), 1.0
    # Numbers known now stay known: arrays alone are operands.
    leaves, treedef = jax.tree.flatten(mask)
    known = [None if isinstance(x, jax.Array) else x for x in leaves]
    arrays = [x for x in leaves if isinstance(x, jax.Array)]
    call = _Call(axis_name, per_device, float(scale), implementation, known, treedef)
    out, lse = _ring(call, query, key, value, (arrays, key_ids(mask)))
    return (out, lse) if return_residual else out


@dataclasses.dataclass(frozen=True, eq=False)
class _Call:
    """What of a call is not an array."""

    axis_name: AxisName
    pieces: int
    scale: float
    implementation: str | KernelConfig | None
    known: list
    treedef: jax.tree_util.PyTreeDef

    def attend(self, arrays, step, query, key, value, ids, known=None):
        """Attends to the keys of the device that is `step` further on."""
        remaining = iter(arrays)
        leaves = [next(remaining) if x is None else x for x in self.known]
        size = axis_size(self.axis_name)
        here = jax.lax.axis_index(self.axis_name)
        query_size, key_size = (x.shape[1] // self.pieces for x in (query, key))
        mask = of_pieces(
            jax.tree.unflatten(self.treedef, leaves),
            ids,
            self._starts(here, query_size),
            self._starts((here + step) % size, key_size),
            query_size,
            key_size,
        )
        return attend(
            "ring_attention",
            query,
            key,
            value,
            None,
            mask=mask,
            scale=self.scale,
            implementation=self.implementation,
            known=known,
        )

    def _starts(self, device, size):
        if self.pieces == 1:
            return (device * size,)
        last = 2 * axis_size(self.axis_name) - 1
        return device * size, (last - device) * size


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(call, query, key, value, masking):
    return _forward(call, query, key, value, masking)[0]


def _forward(call, query, key, value, masking):
    arrays, ids = masking

    def attend(step, merged, travels):
        part = call.attend(arrays, step, query, *travels)
        return merge_attention(*zip(merged, part, strict=True))

    def turn(carry, step):
        merged, travels = carry
        # The next keys are on their way while these are attended to.
        coming = from_next(call.axis_name, travels)
        return (attend(step, merged, travels), coming), None

    travels = key, value, ids
    # Made from the query, so as to be laid out over devices as it is.
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    lse = jnp.full_like(query[..., 0], -jnp.inf, dtype)
    merged = jnp.zeros_like(query[..., :1], dtype), lse
    out = jnp.broadcast_to(merged[0], (*lse.shape, value.shape[-1]))
    last = axis_size(call.axis_name) - 1
    # Two at a time: their merges then read and write the sums once.
    steps = jnp.arange(last)
    carry, _ = jax.lax.scan(turn, ((out, lse), travels), steps, unroll=2)
    out, lse = attend(last, *carry)
    out = out.astype(query.dtype)
    return (out, lse), (query, key, value, masking, out, lse)


def _backward(call, residuals, cotangents):
    query, key, value, (arrays, ids), out, lse = residuals
    dtype = jnp.promote_types(query.dtype, jnp.float32)

    def pull(step, d_query, travels, gradients):
        key, value, ids = travels

        def attend(*tokens):
            return call.attend(arrays, step, *tokens, ids, known=(out, lse))

        grads = jax.vjp(attend, query, key, value)[1](cotangents)
        sums = (d_query, *gradients)
        return tuple(x + y.astype(dtype) for x, y in zip(sums, grads, strict=True))

    def turn(carry, step):
        d_query, travels, gradients = carry
        coming = from_next(call.axis_name, travels)
        d_query, *gradients = pull(step, d_query, travels, gradients)
        return (d_query, coming, from_next(call.axis_name, gradients)), None

    zeros = [jnp.zeros_like(x, dtype) for x in (query, key, value)]
    carry = zeros[0], (key, value, ids), zeros[1:]
    last = axis_size(call.axis_name) - 1
    (d_query, *carry), _ = jax.lax.scan(turn, carry, jnp.arange(last))
    d_query, *gradients = pull(last, d_query, *carry)
    d_key, d_value = from_next(call.axis_name, gradients)
    grads = zip((d_query, d_key, d_value), (query, key, value), strict=True)
    return *(x.astype(like.dtype) for x, like in grads), None


_ring.defvjp(_forward, _backward)
