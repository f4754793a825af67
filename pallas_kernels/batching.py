"""Kernels under `vmap`."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp


def mappable(kernel: Callable, *args, **options) -> Callable:
    """`(tokens, shared) -> kernel(*tokens, *shared, *args, **options)` under `vmap`.

    Mapped axes join the batch, which kernels walk anyway. All arrays lead with the
    batch, those of `shared` perhaps with 1 in its place.
    """

    @jax.custom_batching.custom_vmap
    def run(tokens, shared):
        return kernel(*tokens, *shared, *args, **options)

    @run.def_vmap
    def _(size, mapped, tokens, shared):
        first, is_mapped = (jax.tree.leaves(x)[0] for x in (tokens, mapped[0]))
        batch = first.shape[is_mapped]

        def join(x, is_mapped):
            if not is_mapped:
                x = jnp.broadcast_to(x, (size, *x.shape))
            elif x.shape[1] < batch:
                x = jnp.repeat(x, batch, axis=1)
            return x.reshape(-1, *x.shape[2:])

        def join_shared(x, is_mapped):
            return join(x, is_mapped) if is_mapped or x.shape[0] > 1 else x

        tokens = jax.tree.map(join, tokens, mapped[0])
        shared = jax.tree.map(join_shared, shared, mapped[1])
        out = run(tokens, shared)
        split = lambda x: x.reshape(size, batch, *x.shape[1:])
        return jax.tree.map(split, out), jax.tree.map(lambda _: True, out)

    return run
