"""Softmax attention over a sequence cut in pieces: keys and values go round a ring."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from attnx._checks import expect
from attnx.parallel.axes import AxisName, axis_size, from_next
from attnx.parallel.pieces import key_ids, of_pieces
from attnx.softmax import KernelConfig
from attnx.softmax.engine import attend, check_arrays
from attnx.softmax.mask import Mask
from attnx.softmax.masks import Causal, Full
from attnx.softmax.steps import Step

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

    def attend(self, arrays, distance, step, query, key, value, ids, known=None):
        """Takes the step with the keys of the device that is so much further on."""
        remaining = iter(arrays)
        leaves = [next(remaining) if x is None else x for x in self.known]
        size = axis_size(self.axis_name)
        here = jax.lax.axis_index(self.axis_name)
        query_size, key_size = (x.shape[1] // self.pieces for x in (query, key))
        mask = of_pieces(
            jax.tree.unflatten(self.treedef, leaves),
            ids,
            self._starts(here, query_size),
            self._starts((here + distance) % size, key_size),
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
            step=step,
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

    def attend(distance, sums, travels, *, is_last=False):
        step = Step(sums, is_last=is_last)
        return call.attend(arrays, distance, step, query, *travels)

    def turn(carry, distance):
        sums, travels = carry
        # The next keys are on their way while these are attended to.
        coming = from_next(call.axis_name, travels)
        return _together(attend(distance, sums, travels), coming), None

    # Made from the query, so as to be laid out over devices as it is.
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    lse = jnp.full_like(query[..., 0], -jnp.inf, dtype)
    zero = jnp.zeros_like(query[..., :1], dtype)
    sums = jnp.broadcast_to(zero, (*lse.shape, value.shape[-1])), lse
    carry = _go_round(call, turn, (sums, (key, value, ids)))
    out, lse = attend(axis_size(call.axis_name) - 1, *carry, is_last=True)
    return (out, lse), (query, key, value, masking, out, lse)


def _backward(call, residuals, cotangents):
    query, key, value, (arrays, ids), out, lse = residuals
    dtype = jnp.promote_types(query.dtype, jnp.float32)

    def pull(distance, sums, travels, *, is_last=False):
        step = Step(sums, cotangents, is_last)
        return call.attend(arrays, distance, step, query, *travels, known=(out, lse))

    def turn(carry, distance):
        sums, travels = carry
        coming = from_next(call.axis_name, travels)
        d_query, *gradients = pull(distance, sums, travels)
        gradients = from_next(call.axis_name, gradients)
        return _together((d_query, *gradients), coming), None

    sums = tuple(jnp.zeros_like(x, dtype) for x in (query, key, value))
    carry = _go_round(call, turn, (sums, (key, value, ids)))
    last = axis_size(call.axis_name) - 1
    d_query, *gradients = pull(last, *carry, is_last=True)
    return d_query, *from_next(call.axis_name, gradients), None


def _go_round(call, turn, carry):
    """All turns but the last: `turn((sums, travels), distance)`."""
    last = axis_size(call.axis_name) - 1
    if last == 0:
        return carry
    # What a loop begins with it may write over: not these keys.
    carry, _ = turn(carry, 0)
    # Two at a time: what travels then goes from one place to another and back.
    return jax.lax.scan(turn, carry, jnp.arange(1, last), unroll=2)[0]


def _together(*carry):
    """A carry whose parts are there at once: none is sent on before all are used."""
    return jax.lax.optimization_barrier(carry)


_ring.defvjp(_forward, _backward)
