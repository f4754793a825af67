"""One program for any number of processes: what `test_parallel_processes` runs.

python processes.py ADDRESS COUNT INDEX FILE
"""

import os
import sys

import numpy as np

DEVICES, T = 4, 52
IDS = np.repeat(np.arange(4), [11, 1, 20, 20])[None]


def results():
    """Losses and gradients of a ring and of states on all devices, as NumPy arrays."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.multihost_utils import process_allgather
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    from attnx import masks, parallel

    devices = jax.devices()[:DEVICES]
    kinds = (AxisType.Auto,)
    mesh = jax.make_mesh((DEVICES,), ("context",), kinds, devices=devices)
    tokens = NamedSharding(mesh, PartitionSpec(None, "context"))
    random = np.random.default_rng(0)

    def spread(x):
        return jax.make_array_from_callback(x.shape, tokens, lambda index: x[index])

    arrays = [spread(random.standard_normal((1, T, 2, 16), np.float32)) for _ in "qkv"]
    ids = spread(IDS)

    def loss(query, key, value, ids):
        mask = masks.Causal() & masks.Segments(ids)
        ring = parallel.sharded(parallel.ring_attention, sharding=tokens)
        linear = parallel.sharded(parallel.linear_attention, sharding=tokens)
        out = ring(query, key, value, mask=mask)
        out += linear(query, key, value, segment_ids=ids)
        # Of one sign, so that the order in which devices are summed is rounding alone.
        return jnp.square(out).sum()

    value, grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*arrays, ids)
    return [np.asarray(process_allgather(x, tiled=True)) for x in (value, *grads)]


def main(address: str, count: str, index: str, file: str) -> None:
    local = DEVICES // int(count)
    os.environ["XLA_FLAGS"] = (
        "--xla_backend_optimization_level=0 "
        f"--xla_force_host_platform_device_count={local}"
    )
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, int(count), int(index))
    assert jax.process_count() == int(count)
    assert jax.local_device_count() == local
    np.savez(file, *results())
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
