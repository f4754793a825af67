"""The generation step by the GPU kernel of `pallas_kernels`."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from attnx._dispatch import dispatch
from pallas_kernels.batching import mappable
from pallas_kernels.linear_step import linear_step
from pallas_kernels.mosaic import wrong_device

HEAD_SIZES = (64, 128, 256)
DTYPES = ("bfloat16", "float16", "float32")
# With a last column, whose rows are not aligned, a state is copied whole.
_LARGEST_NORMALIZED = 128


def linear_attention_step(
    state: jax.Array,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array | None,
    scale: jax.Array,
    *,
    normalize: bool,
    differentiate,
) -> tuple[jax.Array, jax.Array]:
    """See `attnx.linear_attention_step`; gradients are those of `differentiate`."""
    operands = state, query, key, value, log_decay, scale
    return _step(normalize, differentiate, *operands)


def unsupported(state, query, key, value, *, normalize: bool) -> str | None:
    """Why the kernel cannot serve a call, or None."""
    for x in (query, key, value):
        if x.dtype not in DTYPES:
            return f"the kernel takes {', '.join(DTYPES)}, not {x.dtype}"
        if x.shape[-1] not in HEAD_SIZES:
            return f"the kernel takes head sizes {HEAD_SIZES}, not {x.shape[-1]}"
    if state.dtype != jnp.float32:
        return f"the kernel takes states in float32, not {state.dtype}"
    if normalize and value.shape[-1] > _LARGEST_NORMALIZED:
        return (
            f"the kernel normalizes value sizes up to {_LARGEST_NORMALIZED}, "
            f"not {value.shape[-1]}"
        )
    return wrong_device()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _step(normalize, differentiate, state, query, key, value, log_decay, scale):
    decay = None if log_decay is None else jnp.exp(log_decay.astype(jnp.float32))
    shared = {"decay": None, "scale": scale.astype(jnp.float32)[None]}
    if decay is not None and decay.ndim == 1:
        shared["decay"], decay = decay[None], None
    run = mappable(_of_groups, normalize=normalize)
    return run((state, query, key, value, decay), (shared,))


def _of_groups(state, query, key, value, decay, shared, *, normalize):
    decay = shared["decay"] if decay is None else decay
    operands = state, query, key, value, decay, shared["scale"]
    return linear_step(*operands, normalize=normalize)


def _forward(normalize, differentiate, *operands):
    return _step(normalize, differentiate, *operands), operands


def _backward(normalize, differentiate, operands, cotangents):
    def of(*operands):
        # Said aloud, so that `explain` tells who takes the gradient.
        return dispatch(
            "gradient of linear_attention_step",
            "xla",
            {"xla": differentiate},
            lambda *_: None,
            *operands,
        )

    return jax.vjp(of, *operands)[1](cotangents)


_step.defvjp(_forward, _backward)
