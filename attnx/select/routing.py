"""Routing Transformer: tokens attend to those that centroids put beside them."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from attnx._checks import expect, expect_shape
from attnx._tree import tree_class
from attnx.softmax import KernelConfig, dot_product_attention
from attnx.softmax.engine import check_arrays
from attnx.softmax.mask import Mask


def routing_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    centroids: jax.Array,
    *,
    cluster_size: int,
    is_causal: bool = False,
    lengths: jax.Array | None = None,
    scale: float | jax.Array | None = None,
    implementation: str | KernelConfig | None = None,
) -> jax.Array:
    """Attends inside clusters of the queries and keys that fit a centroid best.

    Routing Transformer (arXiv 2003.05997). Queries and keys are normalized as by a
    layer norm without parameters. Each centroid takes the `cluster_size` queries and as
    many keys that have the largest products with it, and its queries attend to its
    keys. A query in several clusters gets the mean of their outputs; in a cluster whose
    keys it may not see, 0 for that cluster; in none, 0. Have other heads attend
    locally. With sqrt(T) clusters of sqrt(T) tokens the time is O(T ** 1.5).

    No value comes from the future of a causal query, but what it attends to does look
    ahead: tokens compete for places in a cluster with all others, later ones included.
    That is the method's definition, which is why it does not generate by steps.

    Membership has no gradient; centroids learn by `Centroids.update`.

    Args:
      query: `[B, T, N, H]`.
      key: `[B, S, K, H]`; K divides N.
      value: `[B, S, K, V]`.
      centroids: `[N, c, H]`, of each query head.
      cluster_size: queries and keys of each cluster; all where there are fewer. T / c
        balances.
      is_causal: query i sees keys 0 to i.
      lengths: int `[B]`, tokens that count in each row; the others are in no cluster.
      scale: factor on the scores of attention, by default `H ** -0.5`.
      implementation: of the attention inside clusters, as in `dot_product_attention`.

    Returns:
      `[B, T, N, V]` in query's dtype.

    Raises:
      ValueError: shapes or options that do not fit.
      NotImplementedError: an `implementation` that does not serve the call.

    Example:
      >>> import jax, attnx
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 64, 2, 16))
      >>> centroids = jax.random.normal(jax.random.key(1), (2, 8, 16))
      >>> attnx.routing_attention(
      ...     q, k, v, centroids, cluster_size=8, is_causal=True
      ... ).shape
      (1, 64, 2, 16)
    """
    query, key, value, batched = check_arrays(query, key, value)
    expect(batched, "query", "[B, T, N, H]", query.shape[1:])
    batch, length, heads, _ = query.shape
    if is_causal:
        expect(key.shape[1] == length, "key", "query's length", key.shape)
    if lengths is not None:
        lengths = jnp.asarray(lengths)
        expect_shape("lengths", lengths, (batch,))
    query, key = unit_variance(query), unit_variance(key)
    # [B, N, c, w]: the members of each cluster, in the order of the sequence.
    queries = cluster_members(query, centroids, cluster_size, lengths=lengths)
    keys = cluster_members(key, centroids, cluster_size, lengths=lengths)
    clusters = queries.shape[2]

    def gather(x, index):
        """`[B, T, N, H]` at `[B, N, c, w]`, a row of the batch for each cluster."""
        x = jnp.repeat(jnp.swapaxes(x, 1, 2), heads // x.shape[2], 1)
        index = index.reshape(batch, heads, -1, 1)
        x = jnp.take_along_axis(x, index, 2, mode="clip")
        return x.reshape(batch * heads * clusters, -1, 1, x.shape[-1])

    flat_queries, flat_keys = (
        x.reshape(batch * heads * clusters, -1) for x in (queries, keys)
    )
    out, _ = dot_product_attention(
        gather(query, queries),
        gather(key, keys),
        gather(value, keys),
        mask=_Members(flat_queries, flat_keys, length, key.shape[1], is_causal),
        scale=scale,
        implementation=implementation,
        return_residual=True,
    )
    # Back to where they came from; the mean over clusters.
    dtype = jnp.promote_types(out.dtype, jnp.float32)
    out = out.reshape(batch, heads, -1, out.shape[-1]).astype(dtype)
    index = queries.reshape(batch, heads, -1)
    where = jnp.arange(batch)[:, None, None], jnp.arange(heads)[:, None], index
    total = jnp.zeros((batch, heads, length, out.shape[-1]), dtype)
    total = total.at[where].add(out, mode="drop")
    count = jnp.zeros((batch, heads, length), dtype).at[where].add(1, mode="drop")
    mean = total / jnp.maximum(count, 1)[..., None]
    return jnp.swapaxes(mean, 1, 2).astype(query.dtype)


def unit_variance(x: jax.Array) -> jax.Array:
    """A layer norm over the last axis without scale and bias: on a sphere of sqrt(H).

    Example:
      >>> import jax.numpy as jnp
      >>> from attnx.select import unit_variance
      >>> unit_variance(jnp.array([1.0, 3.0])).round(3).tolist()
      [-1.0, 1.0]
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    wide -= wide.mean(-1, keepdims=True)
    wide /= jnp.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6)
    return wide.astype(x.dtype)


def cluster_members(
    x: jax.Array,
    centroids: jax.Array,
    cluster_size: int,
    *,
    lengths: jax.Array | None = None,
) -> jax.Array:
    """Says which tokens have the largest products with each centroid.

    Args:
      x: `[B, T, K, H]`; K divides N.
      centroids: `[N, c, H]`.
      cluster_size: w, tokens of a cluster; all T where there are fewer.
      lengths: int `[B]`, tokens that count.

    Returns:
      int32 `[B, N, c, w]`: indices of tokens, growing; T in place of tokens that do not
      count. Of equal products the first. No gradient.

    Raises:
      ValueError: shapes or options that do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from attnx.select import cluster_members
      >>> x = jnp.array([0.0, 2.0, -1.0, 1.0])[None, :, None, None]
      >>> cluster_members(x, jnp.array([[[1.0], [-1.0]]]), 2).tolist()
      [[[[1, 3], [0, 2]]]]
    """
    expect(x.ndim == 4, "x", "shape [B, T, K, H]", x.shape)
    scores = _products(x, centroids)
    expect(cluster_size >= 1, "cluster_size", "at least 1", cluster_size)
    length = x.shape[1]
    if lengths is not None:
        counts = jnp.arange(length) < lengths[:, None, None, None]
        scores = jnp.where(counts, scores, -jnp.inf)
    scores, index = jax.lax.top_k(scores, min(cluster_size, length))
    index = jnp.where(scores > -jnp.inf, index, length)
    return jnp.sort(index.astype(jnp.int32), -1)


class Centroids(NamedTuple):
    """Centroids of N heads and the moving averages that they come from.

    Online k-means as of a VQ-VAE: each centroid is the mean of the tokens that were
    nearest to it, the older the less they weigh. A pytree.

    Attributes:
      sums: `[N, c, H]`, moving average of the sum of each cluster's tokens.
      counts: `[N, c]`, moving average of their number.
    """

    sums: jax.Array
    counts: jax.Array

    @classmethod
    def create(
        cls, key: jax.Array, num_heads: int, num_clusters: int, head_size: int
    ) -> Centroids:
        """Random ones, normalized as queries and keys are."""
        sums = jax.random.normal(key, (num_heads, num_clusters, head_size))
        return cls(unit_variance(sums), jnp.ones((num_heads, num_clusters)))

    def means(self) -> jax.Array:
        """The centroids `[N, c, H]`, with Laplace smoothing of small counts."""
        total = self.counts.sum(-1, keepdims=True)
        clusters = self.counts.shape[-1]
        counts = (self.counts + 1e-5) / (total + clusters * 1e-5) * total
        return self.sums / counts[..., None]

    def update(
        self,
        query: jax.Array,
        key: jax.Array,
        *,
        decay: float = 0.999,
        lengths: jax.Array | None = None,
    ) -> Centroids:
        """Moves each centroid towards the queries and keys nearest to it.

        Args:
          query: `[B, T, N, H]`, from `unit_variance`.
          key: `[B, S, K, H]`; K divides N.
          decay: of the moving averages, a step.
          lengths: int `[B]`, tokens that count.

        Returns:
          The centroids after the step. No gradient.
        """
        expect(0 <= decay <= 1, "decay", "0 to 1", decay)
        sums, counts = decay * self.sums, decay * self.counts
        heads = counts.shape[0]
        for x in (query, key):
            nearest = self._one_hot(x, lengths)
            x = jnp.repeat(x, heads // x.shape[2], 2).astype(sums.dtype)
            x = jax.lax.stop_gradient(x)
            # Half of the weight for the queries, half for the keys.
            part = (1 - decay) / 2
            sums += part * jnp.einsum("bntc,btnh->nch", nearest, x, precision="highest")
            counts += part * nearest.sum((0, 2))
        return Centroids(sums, counts)

    def distance(self, x: jax.Array, *, lengths: jax.Array | None = None) -> jax.Array:
        """The mean square of tokens less their nearest centroids, a scalar.

        The commitment loss, of weight 1e-4: its gradient moves tokens, not centroids.

        Args:
          x: `[B, T, N, H]` or `[B, T, K, H]`, from `unit_variance`.
          lengths: int `[B]`, tokens that count.
        """
        nearest = self._one_hot(x, lengths)
        centroids = jnp.einsum(
            "bntc,nch->btnh", nearest, self.means(), precision="highest"
        )
        centroids = jax.lax.stop_gradient(centroids)
        counts = jnp.swapaxes(nearest.sum(-1), 1, 2)[..., None]
        x = jnp.repeat(x, self.counts.shape[0] // x.shape[2], 2)
        error = counts * (x.astype(centroids.dtype) - centroids) ** 2
        return error.sum() / (jnp.maximum(counts.sum(), 1) * x.shape[-1])

    def _one_hot(self, x, lengths):
        """`[B, N, T, c]`: 1 at the nearest centroid, 0 for padding."""
        means = self.means()
        # Of smallest distance: of largest product less half the centroid's square.
        nearness = _products(x, means) - (means**2).sum(-1)[..., None] / 2
        nearest = nearness.argmax(2)
        one_hot = jax.nn.one_hot(nearest, self.counts.shape[-1], dtype=self.sums.dtype)
        if lengths is not None:
            one_hot *= (jnp.arange(x.shape[1]) < lengths[:, None])[:, None, :, None]
        return one_hot


@tree_class(meta=("is_causal",))
class _Members(Mask):
    """Members of one cluster by their indices in the sequence, `[B * N * c, w]`."""

    queries: jax.Array
    keys: jax.Array
    query_len: int
    key_len: int
    is_causal: bool

    def __call__(self, batch, head, query, key):
        query = jnp.asarray(self.queries)[batch, query]
        key = jnp.asarray(self.keys)[batch, key]
        seen = (query < self.query_len) & (key < self.key_len)
        return seen & (key <= query) if self.is_causal else seen


def _products(x, centroids):
    """`[B, N, c, T]`, without a gradient."""
    heads, _, size = centroids.shape
    fits = x.shape[-1] == size and heads % x.shape[2] == 0
    wanted = f"[N, c, {x.shape[-1]}], N a multiple of {x.shape[2]}"
    expect(fits, "centroids", wanted, centroids.shape)
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    x = jnp.repeat(x, heads // x.shape[2], 2).astype(dtype)
    # Who is where hangs on these: no TF32.
    return jax.lax.stop_gradient(
        jnp.einsum("btnh,nch->bnct", x, centroids.astype(dtype), precision="highest")
    )
