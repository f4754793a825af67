"""The mixer of the Routing Transformer, and one that shares heads out to mixers."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from attnx._checks import expect
from attnx.nn.mixers import Mixer
from attnx.select import Centroids, routing_attention, unit_variance


class CentroidStat(nnx.Variable):
    """A moving average that centroids come from: not a parameter."""


class CommitmentLoss(nnx.Variable):
    """How far the tokens of the last call in training were from their centroids."""


class RoutingMixer(Mixer):
    """Attention inside clusters of queries and keys, whose centroids follow them.

    Outside of evaluation (`model.eval()`, or `use_running_average=True`) a call moves
    the centroids towards the queries and keys it sees, under `nnx.jit` and other
    transforms that carry state, and leaves in `commitment` the loss that moves these
    towards their centroids: add 1e-4 of it to the model's.

    It does not generate by steps: which tokens share a cluster depends on all of them.

    Args:
      num_heads: N, query heads.
      head_dim: H.
      num_clusters: c, about sqrt(T).
      cluster_size: tokens of a cluster; by default `T / c`, rounded up.
      is_causal: whether later keys are hidden. Membership looks ahead nevertheless.
      decay: of the moving averages, a call.
      scale: multiplies the scores; `H ** -0.5` by default.
      implementation: as in `attnx.routing_attention`.
      use_running_average: whether centroids stay as they are.
      rngs: keys for the first centroids.

    Example:
      >>> from attnx import masks
      >>> from attnx.nn import RoutingMixer, SoftmaxMixer, SplitMixer
      >>> from flax import nnx
      >>> local = SoftmaxMixer(masks.Causal() & masks.Window(255, 0))
      >>> routing = RoutingMixer(2, 16, num_clusters=16, rngs=nnx.Rngs(0))
      >>> mixer = SplitMixer((6, local), (2, routing))
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        num_clusters: int,
        *,
        cluster_size: int | None = None,
        is_causal: bool = True,
        decay: float = 0.999,
        scale: float | None = None,
        implementation: str | None = None,
        use_running_average: bool = False,
        rngs: nnx.Rngs,
    ):
        expect(num_clusters >= 1, "num_clusters", "at least 1", num_clusters)
        start = Centroids.create(rngs.params(), num_heads, num_clusters, head_dim)
        self.sums = CentroidStat(start.sums)
        self.counts = CentroidStat(start.counts)
        self.commitment = CommitmentLoss(jnp.zeros(()))
        self.cluster_size = cluster_size
        self.is_causal = is_causal
        self.decay = decay
        self.scale = scale
        self.implementation = implementation
        self.use_running_average = use_running_average

    def __call__(self, query, key, value, *, inputs=None, segment_ids=None):
        if segment_ids is not None:
            raise NotImplementedError(
                "RoutingMixer takes no segment_ids: all tokens of a row compete for "
                "places in a cluster"
            )
        centroids = Centroids(self.sums[...], self.counts[...])
        size = self.cluster_size
        if size is None:
            size = -(-query.shape[1] // centroids.counts.shape[1])
        out = routing_attention(
            query,
            key,
            value,
            centroids.means(),
            cluster_size=size,
            is_causal=self.is_causal,
            scale=self.scale,
            implementation=self.implementation,
        )
        if not self.use_running_average:
            query, key = unit_variance(query), unit_variance(key)
            loss = centroids.distance(query) + centroids.distance(key)
            self.commitment[...] = loss / 2
            sums, counts = centroids.update(query, key, decay=self.decay)
            self.sums[...], self.counts[...] = sums, counts
        return out


class SplitMixer(Mixer):
    """Gives the first heads to one mixer, the next to another, and so on.

    Args:
      *parts: pairs (query heads, mixer). Together they take all; each takes whole
        groups of those that share a key head. Mixers with one value size.

    Example:
      >>> from attnx import masks
      >>> from attnx.nn import SoftmaxMixer, SplitMixer
      >>> local = SoftmaxMixer(masks.Causal() & masks.Window(255, 0))
      >>> mixer = SplitMixer((6, local), (2, SoftmaxMixer()))
    """

    def __init__(self, *parts: tuple[int, Mixer]):
        expect(len(parts) >= 1, "parts", "at least one", len(parts))
        self.sizes = tuple(size for size, _ in parts)
        self.mixers = nnx.List([mixer for _, mixer in parts])

    def __call__(self, query, key, value, *, inputs=None, segment_ids=None):
        arrays = [self._split(x, query.shape[-2]) for x in (query, key, value)]
        outputs = [
            mixer(*heads, inputs=inputs, segment_ids=segment_ids)
            for mixer, *heads in zip(self.mixers, *arrays, strict=True)
        ]
        return jnp.concatenate(outputs, -2)

    def _split(self, x, num_heads) -> Sequence[jax.Array]:
        group = num_heads // x.shape[-2]
        fits = sum(self.sizes) == num_heads and not any(n % group for n in self.sizes)
        wanted = f"multiples of {group} that add up to {num_heads}"
        expect(fits, "parts", wanted, self.sizes)
        ends = [sum(self.sizes[: i + 1]) // group for i in range(len(self.sizes) - 1)]
        return jnp.split(x, ends, -2)
