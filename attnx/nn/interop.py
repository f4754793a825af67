"""attnx functions inside flax's own attention layers."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from attnx._checks import expect


def attention_fn(fn: Callable[..., Any], *, rank: int = 1) -> Callable[..., jax.Array]:
    """Makes an attnx function serve as `attention_fn` of a flax attention layer.

    For `nnx.MultiHeadAttention` and `linen.MultiHeadDotProductAttention`, which pass
    different keywords. Settings of `fn` are given with `functools.partial`. Differs
    from flax's default in one place: a query that sees no key gets 0.

    Args:
      fn: `dot_product_attention`, `neighborhood_attention`, `linear_attention`, or any
        function of query, key and value in their layout.
      rank: how many axes before the heads `fn` attends over; all those before are
        batch. 2 for neighborhoods in images.

    Returns:
      A function of query, key, value `[*batch, *space, N, H]` and flax's keywords.
      `mask`, `bias` and `is_causal` reach `fn`; `dtype` casts the arrays. Called, it
      raises NotImplementedError where flax asks for what `fn` does not do: a mask or
      bias `fn` does not take, dropout, sown weights, a `precision` (set
      `jax.default_matmul_precision`, which holds for the gradients too), a custom
      einsum, positions.

    Raises:
      ValueError: `rank` is not positive.

    Example:
      >>> import functools, jax.numpy as jnp
      >>> from flax import nnx
      >>> from attnx.linear import linear_attention
      >>> from attnx.nn import attention_fn
      >>> layer = nnx.MultiHeadAttention(
      ...     num_heads=2,
      ...     in_features=8,
      ...     decode=False,
      ...     attention_fn=attention_fn(functools.partial(linear_attention, scale=1.0)),
      ...     rngs=nnx.Rngs(0),
      ... )
      >>> layer(jnp.ones((1, 5, 8))).shape
      (1, 5, 8)
    """
    expect(rank >= 1, "rank", "at least 1", rank)
    name = getattr(getattr(fn, "func", fn), "__name__", type(fn).__name__)
    takes = inspect.signature(fn).parameters

    # Linen passes only what it finds by name in this signature, nnx passes everything:
    # so each keyword is spelled out, those that can only be refused included.
    def attend(
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        bias: jax.Array | None = None,
        mask: jax.Array | None = None,
        *,
        is_causal: bool = False,
        dtype: jax.typing.DTypeLike | None = None,
        deterministic: bool = False,
        dropout_rate: float = 0.0,
        dropout_rng: jax.Array | None = None,
        broadcast_dropout: bool = True,
        precision: object = None,
        module: object = None,
        force_fp32_for_softmax: bool = False,
        qk_attn_weights_einsum: Callable | None = None,
        attn_weights_value_einsum: Callable | None = None,
        input_positions: jax.Array | None = None,
    ) -> jax.Array:
        del dropout_rng, broadcast_dropout  # Nothing without dropout.
        del force_fp32_for_softmax  # Always so here.
        if dropout_rate > 0 and not deterministic:
            _refuse(name, "dropout_rate", "attention weights are never held")
        if module is not None:
            _refuse(name, "module", "there are no attention weights to sow")
        if precision not in (None, jax.lax.Precision.DEFAULT):
            _refuse(name, "precision", "set jax.default_matmul_precision instead")
        if qk_attn_weights_einsum or attn_weights_value_einsum:
            _refuse(name, "einsum", "the products are inside the kernels")
        if input_positions is not None:
            _refuse(name, "input_positions", "it is given rotated queries and keys")

        dtype = jnp.result_type(query, key, value) if dtype is None else dtype
        arrays = [x.astype(dtype) for x in (query, key, value)]
        expect(query.ndim >= rank + 2, "query", f"rank {rank + 2} or more", query.ndim)
        batch = query.shape[: -2 - rank]
        size = math.prod(batch)
        query, key, value = (x.reshape(size, *x.shape[-2 - rank :]) for x in arrays)

        given = {}
        if mask is not None:
            # flax's own masks are floating-point numbers.
            given["mask"] = _flatten_batch(mask, batch).astype(bool)
        if bias is not None:
            given["bias"] = _flatten_batch(bias, batch)
        if is_causal:
            given["is_causal"] = True
        for argument in given:
            if argument not in takes:
                _refuse(name, argument, "it has no such argument")
            if not _is_unset(takes[argument].default):
                _refuse(name, argument, "the one it was made with would be lost")
        out = fn(query, key, value, **given)
        return out.reshape(*batch, *out.shape[1:])

    return attend


def _refuse(name: str, argument: str, reason: str) -> None:
    raise NotImplementedError(
        f"attention_fn({name}) cannot honour {argument}: {reason}"
    )


def _is_unset(default: object) -> bool:
    nothing = (None, False, inspect.Parameter.empty)
    return any(default is value for value in nothing)


def _flatten_batch(x: jax.Array, batch: tuple[int, ...]) -> jax.Array:
    """`[..., N, T, S]` that broadcasts to `[*batch, N, T, S]`, with one batch axis."""
    x = x.reshape((1,) * (len(batch) + 3 - x.ndim) + x.shape)
    if len(batch) != 1:
        x = jnp.broadcast_to(x, batch + x.shape[-3:])
    return x.reshape(x.shape[0] if len(batch) == 1 else math.prod(batch), *x.shape[-3:])
