"""Mixture-of-Head attention: each token chooses among the heads."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from attnx._checks import expect
from attnx.nn.mixers import Mixer


class MoHMixer(Mixer):
    """Weighs the heads of any mixer, token by token (arXiv 2410.11842 eq. 5).

    All heads are computed: a head of weight 0 adds nothing to the output, and saves no
    time.

    Args:
      mixer: the mixer whose heads are weighed.
      router: `(inputs [B, T, D], query [B, T, N, H]) -> weights [B, T, N]`: a
        `HeadRouter`, or a `QueryRouter` to go on from a dense model.

    Example:
      >>> from attnx.nn import HeadRouter, MoHMixer, SoftmaxMixer
      >>> from flax import nnx
      >>> router = HeadRouter(64, 8, num_shared=2, top_k=4, rngs=nnx.Rngs(0))
      >>> mixer = MoHMixer(SoftmaxMixer(), router)
    """

    def __init__(self, mixer: Mixer, router: HeadRouter | QueryRouter):
        self.mixer = mixer
        self.router = router

    def __call__(self, query, key, value, *, inputs=None, segment_ids=None):
        out = self.mixer(query, key, value, inputs=inputs, segment_ids=segment_ids)
        return self._weighed(out, query, inputs)

    def init_cache(self, query, key, value, max_length=None):
        return self.mixer.init_cache(query, key, value, max_length)

    def step(self, query, key, value, cache, *, inputs=None):
        out, cache = self.mixer.step(query, key, value, cache, inputs=inputs)
        return self._weighed(out, query, inputs), cache

    def _weighed(self, out, query, inputs):
        return out * self.router(inputs, query).astype(out.dtype)[..., None]


class HeadRouter(nnx.Module):
    """The two-stage router of Mixture-of-Head: shared heads, and the best of others.

    As the released code has it: the weights of shared heads are a softmax times their
    number, those of routed heads a softmax over the `top_k` best times `top_k`, and
    both kinds are balanced by a softmax over the two, times 2. So all weights are 1
    where the kernels are 0 and every head is active. Computed in float32.

    Args:
      in_features: D.
      num_heads: N.
      num_shared: heads that are always active, the first ones.
      top_k: routed heads that each token activates.
      param_dtype: of the parameters.
      rngs: keys for the parameters.

    Raises:
      ValueError: counts that do not fit in N.

    Example:
      >>> import jax.numpy as jnp
      >>> from attnx.nn import HeadRouter
      >>> from flax import nnx
      >>> router = HeadRouter(64, 8, num_shared=2, top_k=4, rngs=nnx.Rngs(0))
      >>> weights = router(jnp.ones((1, 3, 64)))
      >>> weights.shape, (weights > 0).sum(-1).tolist()
      ((1, 3, 8), [[6, 6, 6]])
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        *,
        num_shared: int,
        top_k: int,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        _check_counts(num_heads, num_shared, top_k)
        linear = lambda features: nnx.Linear(
            in_features,
            features,
            use_bias=False,
            dtype=jnp.float32,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.num_shared = num_shared
        self.top_k = top_k
        self.routed = linear(num_heads - num_shared)
        # One shared head has no other to be weighed against.
        self.shared = linear(num_shared) if num_shared > 1 else None
        self.balance = linear(2) if num_shared > 0 else None

    def __call__(self, inputs: jax.Array, query: jax.Array | None = None) -> jax.Array:
        """Weighs heads: inputs `[B, T, D]` to float32 `[B, T, N]`. No query is read."""
        probability, chosen = self._route(inputs)
        weights = probability * chosen
        weights = self.top_k * weights / weights.sum(-1, keepdims=True)
        if self.balance is None:
            return weights
        shared = jnp.ones((*inputs.shape[:-1], 1), weights.dtype)
        if self.shared is not None:
            shared = self.num_shared * jax.nn.softmax(self.shared(inputs), -1)
        kinds = 2 * jax.nn.softmax(self.balance(inputs), -1)
        return jnp.concatenate([kinds[..., :1] * shared, kinds[..., 1:] * weights], -1)

    def load_balance_loss(self, inputs: jax.Array) -> jax.Array:
        """Says how unevenly tokens choose among the routed heads.

        `R sum_i mean(probability of head i) mean(whether head i is chosen)` over R
        routed heads: `top_k` where they are chosen evenly, more where they are not. Add
        0.01 of it to the loss (arXiv 2410.11842 eq. 8, scaled as in its code).

        Args:
          inputs: `[B, T, D]`.

        Returns:
          float32 scalar.
        """
        probability, chosen = self._route(inputs)
        tokens = tuple(range(inputs.ndim - 1))
        shares = chosen.astype(probability.dtype).mean(tokens)
        return len(shares) * (probability.mean(tokens) * shares).sum()

    def _route(self, inputs):
        """The probability of each routed head, and whether it is chosen."""
        probability = jax.nn.softmax(self.routed(inputs), -1)
        return probability, _chosen(probability, self.top_k)


class QueryRouter(nnx.Module):
    """The router that a dense model can go on with: no parameters, weights 0 and 1.

    Heads are scored by the norms of their queries (arXiv 2410.11842 sec. 3.4): the norm
    over the standard deviation of all routed heads' norms, and a softmax. The best have
    weight 1, the others 0; gradients are those of the chosen heads' probabilities,
    straight through the rounding.

    Args:
      num_heads: N.
      num_shared: heads that are always active, the first ones.
      top_k: routed heads that each token activates.

    Raises:
      ValueError: counts that do not fit in N.

    Example:
      >>> import jax.numpy as jnp
      >>> from attnx.nn import QueryRouter
      >>> query = jnp.arange(1.0, 5.0)[:, None] * jnp.ones((1, 1, 4, 16))
      >>> QueryRouter(4, num_shared=1, top_k=2)(None, query).tolist()
      [[[1.0, 0.0, 1.0, 1.0]]]
    """

    def __init__(self, num_heads: int, *, num_shared: int, top_k: int):
        _check_counts(num_heads, num_shared, top_k)
        self.num_shared = num_shared
        self.top_k = top_k

    def __call__(self, inputs: jax.Array | None, query: jax.Array) -> jax.Array:
        """Weighs heads: query `[B, T, N, H]` to `[B, T, N]`; inputs are not read."""
        query = query.astype(jnp.promote_types(query.dtype, jnp.float32))
        # The root of a sum, kept from 0, where its gradient would be infinite.
        norms = jnp.sqrt(jnp.square(query).sum(-1) + 1e-12)
        routed = norms[..., self.num_shared :]
        spread = jnp.sqrt(routed.var(-1, keepdims=True) + 1e-12)
        probability = jax.nn.softmax(routed / spread, -1)
        chosen = _chosen(probability, self.top_k).astype(probability.dtype)
        soft = probability * chosen
        weights = soft + jax.lax.stop_gradient(chosen - soft)
        shared = jnp.ones_like(norms[..., : self.num_shared])
        return jnp.concatenate([shared, weights], -1)


def _check_counts(num_heads, num_shared, top_k):
    expect(
        0 <= num_shared < num_heads,
        "num_shared",
        f"0 to {num_heads - 1} of {num_heads} heads",
        num_shared,
    )
    routed = num_heads - num_shared
    expect(1 <= top_k <= routed, "top_k", f"1 to {routed} routed heads", top_k)


def _chosen(probability, top_k):
    """Whether each head is among the likeliest; of equal ones the first."""
    rank = jnp.argsort(jnp.argsort(probability, descending=True), stable=True)
    return rank < top_k
