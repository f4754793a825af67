"""Softmax attention over block lists in plain XLA: work and memory follow the lists.

Query blocks are taken in turn. Each walks its list a few key blocks at a time with a
running softmax, so nothing larger than a strip of scores exists. The gradient walks the
same lists and computes the strips again.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from attnx.softmax.block_mask import BlockMask

# A strip of scores this large stays in the cache of a CPU core.
_STRIP_BYTES = 1 << 19


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    *,
    block_mask: BlockMask,
    scale: float,
    known: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attends over the listed blocks, as `reference.attention` over its mask.

    `known` is as in `engine.attend`.
    """
    return _compiled(query, key, value, bias, block_mask, known, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attention(*operands):
    return _forward(*operands)[0]


def _forward(query, key, value, bias, block_mask, known, scale):
    if known is not None:
        return known, (query, key, value, bias, block_mask, *known)
    cut = _Cut.of(query, key, block_mask)
    q, k, v, b = cut.arrays(query, key, value, bias)

    def query_block(_, item):
        q_block = cut.queries(q, item)

        def step(i, carry):
            peak, total, out = carry
            strip = cut.strip(item, i)
            scores = cut.scores(q_block, k, b, item, strip, scale)
            new_peak = jnp.maximum(peak, scores.max(-1, keepdims=True))
            # Until a query has seen a key its peak is -inf: keep exponents finite.
            base = jnp.where(jnp.isfinite(new_peak), new_peak, 0)
            weights, decay = jnp.exp(scores - base), jnp.exp(peak - base)
            total = total * decay + weights.sum(-1, keepdims=True)
            values = cut.keys(v, item, strip)
            out = out * decay + _dot("bkgts,bskv->bkgtv", weights, values, cut.dtype)
            return new_peak, total, out

        # Made from the query, so as to be laid out over devices as it is.
        zero = jnp.zeros_like(q_block[..., :1], cut.dtype)
        out = jnp.broadcast_to(zero, (*zero.shape[:-1], v.shape[-1]))
        start = (jnp.full_like(zero, -jnp.inf), zero, out)
        peak, total, out = lax.fori_loop(0, cut.steps(item), step, start)
        empty = total == 0
        total = jnp.where(empty, 1, total)
        lse = jnp.where(empty, -jnp.inf, peak + jnp.log(total))
        return None, ((out / total).astype(query.dtype), lse)

    _, (out, lse) = lax.scan(query_block, None, cut.items())
    out, lse = cut.join(out), cut.join(lse)[..., 0]
    return (out, lse), (query, key, value, bias, block_mask, out, lse)


def _backward(scale, residuals, cotangents):
    query, key, value, bias, block_mask, out, lse = residuals
    d_out, d_lse = cotangents
    cut = _Cut.of(query, key, block_mask)
    q, k, v, b = cut.arrays(query, key, value, bias)
    # A score's gradient is p (dp - delta); the log-sum-exp's own adds p d_lse to it.
    delta = (d_out.astype(cut.dtype) * out.astype(cut.dtype)).sum(-1) - d_lse
    # A query that saw nothing gets the weight exp(-inf) everywhere.
    lse = jnp.where(jnp.isfinite(lse), lse, jnp.inf)
    rows = [cut.pad(x, cut.block_q) for x in (d_out, lse[..., None], delta[..., None])]

    def query_block(carry, item):
        q_block, d_out, lse, delta = (cut.queries(x, item) for x in (q, *rows))

        def step(i, carry):
            d_query, d_key, d_value, d_bias = carry
            strip = cut.strip(item, i)
            scores = cut.scores(q_block, k, b, item, strip, scale)
            weights = jnp.exp(scores - lse)
            values = cut.keys(v, item, strip)
            d_weights = _dot("bkgtv,bskv->bkgts", d_out, values, cut.dtype)
            d_scores = weights * (d_weights - delta)
            if b is not None:
                d_bias = cut.add_bias(d_bias, item, strip, d_scores)
            d_scores *= scale
            keys = cut.keys(k, item, strip)
            d_query += _dot("bkgts,bskh->bkgth", d_scores, keys, cut.dtype)
            d_keys = _dot("bkgts,bkgth->bskh", d_scores, q_block, cut.dtype)
            d_values = _dot("bkgts,bkgtv->bskv", weights, d_out, cut.dtype)
            d_key = cut.add_keys(d_key, item, strip, d_keys)
            d_value = cut.add_keys(d_value, item, strip, d_values)
            return d_query, d_key, d_value, d_bias

        start = (jnp.zeros_like(q_block, cut.dtype), *carry)
        d_query, *carry = lax.fori_loop(0, cut.steps(item), step, start)
        return tuple(carry), d_query.astype(query.dtype)

    zeros = (None if x is None else jnp.zeros_like(x, cut.dtype) for x in (k, v, b))
    carry, d_query = lax.scan(query_block, tuple(zeros), cut.items())
    d_key, d_value, d_bias = carry
    return (
        cut.join(d_query),
        _crop(d_key, key),
        _crop(d_value, value),
        None if bias is None else _crop(d_bias, bias),
        None,
        None,
    )


_attention.defvjp(_forward, _backward)
_compiled = jax.jit(_attention, static_argnums=6)


@dataclasses.dataclass(frozen=True)
class _Cut:
    """How the arrays are cut, and the slices one item of work reads and adds to.

    Tokens are padded to whole blocks. Batch rows and heads that share a list are worked
    on together: B = outer * inner, and so N. An item is (outer batch row, outer head,
    query block). Inside it arrays are `[inner batch, key heads, query heads for each,
    ...]`.
    """

    lists: BlockMask
    dtype: jnp.dtype
    inner_batch: int
    inner_heads: int
    key_heads: int
    groups: int
    width: int

    @classmethod
    def of(cls, query, key, block_mask):
        dtype = jnp.promote_types(query.dtype, jnp.float32)
        outer_batch, outer_heads, _, slots = block_mask.indices.shape
        batch, heads = query.shape[0] // outer_batch, query.shape[2] // outer_heads
        groups = query.shape[2] // key.shape[2]
        block_q, block_k = block_mask.block_size
        block_bytes = batch * heads * block_q * block_k * dtype.itemsize
        width = min(max(1, _STRIP_BYTES // block_bytes), slots)
        indices = jnp.pad(
            block_mask.indices, [(0, 0)] * 3 + [(0, -slots % width)], "edge"
        )
        return cls(
            lists=dataclasses.replace(block_mask, indices=indices),
            dtype=dtype,
            inner_batch=batch,
            inner_heads=heads,
            key_heads=max(1, heads // groups),
            groups=groups,
            width=width,
        )

    @property
    def block_q(self):
        return self.lists.block_size[0]

    @property
    def block_k(self):
        return self.lists.block_size[1]

    def arrays(self, query, key, value, bias):
        q = self.pad(query, self.block_q)
        k, v = self.pad(key, self.block_k), self.pad(value, self.block_k)
        if bias is not None:
            sizes = (1, 1, self.block_q, self.block_k)
            pad = [
                (0, 0 if n == 1 else -n % size)
                for n, size in zip(bias.shape, sizes, strict=True)
            ]
            bias = jnp.pad(bias, pad)
        return q, k, v, bias

    def pad(self, x, block):
        """Pads the tokens of `[B, T, N, H]` to whole blocks."""
        return jnp.pad(x, [(0, 0), (0, -x.shape[1] % block), (0, 0), (0, 0)])

    def join(self, x):
        """Stacked results of the items to `[B, T, N, H]`."""
        batch, heads, blocks = self.lists.counts.shape
        shape = (self.inner_batch, self.inner_heads, self.block_q, x.shape[-1])
        x = x.reshape(batch, heads, blocks, *shape).transpose(0, 3, 2, 5, 1, 4, 6)
        x = x.reshape(
            batch * self.inner_batch, -1, heads * self.inner_heads, x.shape[-1]
        )
        return x[:, : self.lists.query_len]

    def items(self):
        grid = jnp.indices(self.lists.counts.shape, dtype=jnp.int32)
        return tuple(grid.reshape(3, -1))

    def steps(self, item):
        return (self.lists.counts[item] + self.width - 1) // self.width

    def strip(self, item, i):
        """The key blocks of step `i`, and which of them count and need no predicate."""
        slots = i * self.width + jnp.arange(self.width)
        chosen = lax.dynamic_slice_in_dim(
            self.lists.indices[item], i * self.width, self.width
        )
        is_listed = slots < self.lists.counts[item]
        is_full = slots >= self.lists.partial_counts[item]
        return chosen, is_listed, is_full

    def scores(self, q_block, k, bias, item, strip, scale):
        chosen, is_listed, is_full = strip
        keys = self.keys(k, item, strip)
        scores = _dot("bkgth,bskh->bkgts", q_block, keys, self.dtype) * scale
        if bias is not None:
            parts = [self._bias(bias, item, j) for j in chosen]
            one = bias.shape[-1] == 1
            scores += self._per_head(parts[0] if one else jnp.concatenate(parts, -1))

        batch, head, block = item
        offset = jnp.arange(self.block_k)
        key = (chosen[:, None] * self.block_k + offset).reshape(1, 1, 1, -1)
        visible = self.lists.mask(
            (batch * self.inner_batch + jnp.arange(self.inner_batch))[
                :, None, None, None
            ],
            (head * self.inner_heads + jnp.arange(self.inner_heads))[
                None, :, None, None
            ],
            (block * self.block_q + jnp.arange(self.block_q))[None, None, :, None],
            key,
        )
        visible = visible | jnp.repeat(is_full, self.block_k)
        visible &= jnp.repeat(is_listed, self.block_k) & (key < self.lists.key_len)
        return jnp.where(self._per_head(visible), scores, -jnp.inf)

    def queries(self, x, item):
        batch, head, block = item
        start = (
            batch * self.inner_batch,
            block * self.block_q,
            head * self.inner_heads,
            0,
        )
        sizes = (self.inner_batch, self.block_q, self.inner_heads, x.shape[-1])
        x = jnp.swapaxes(_slice(x, start, sizes), 1, 2)
        return x.reshape(self.inner_batch, self.key_heads, -1, *x.shape[2:])

    def keys(self, x, item, strip):
        parts = [_slice(x, *self._at(x, item, j)) for j in strip[0]]
        return jnp.concatenate(parts, 1)

    def add_keys(self, total, item, strip, update):
        parts = jnp.split(update, self.width, 1)
        for j, part in zip(strip[0], parts, strict=True):
            total = _add(total, part, *self._at(total, item, j))
        return total

    def add_bias(self, total, item, strip, update):
        shape = (self.inner_batch, self.inner_heads, *update.shape[3:])
        for j, part in zip(
            strip[0], jnp.split(update.reshape(shape), self.width, 3), strict=True
        ):
            start, sizes = self._bias_at(total, item, j)
            axes = [axis for axis, size in enumerate(sizes) if size == 1]
            total = _add(total, part.sum(axes, keepdims=True), start, sizes)
        return total

    def _at(self, x, item, j):
        batch, head, _ = item
        head = head * self.inner_heads // self.groups
        start = (batch * self.inner_batch, j * self.block_k, head, 0)
        return start, (self.inner_batch, self.block_k, self.key_heads, x.shape[-1])

    def _bias(self, bias, item, j):
        return _slice(bias, *self._bias_at(bias, item, j)).astype(self.dtype)

    def _bias_at(self, bias, item, j):
        batch, head, block = item
        sizes = (self.inner_batch, self.inner_heads, self.block_q, self.block_k)
        index = (batch, head, block, j)
        # An axis of size 1 serves every index.
        one = [n == 1 for n in bias.shape]
        start = tuple(
            0 if o else i * size for o, i, size in zip(one, index, sizes, strict=True)
        )
        return start, tuple(1 if o else s for o, s in zip(one, sizes, strict=True))

    def _per_head(self, x):
        """`[batch, heads, t, s]`, axes possibly 1, beside `[batch, k, g, t, s]`."""
        x = jnp.reshape(x, (1,) * (4 - jnp.ndim(x)) + jnp.shape(x))
        heads = (1, 1) if x.shape[1] == 1 else (self.key_heads, -1)
        return x.reshape(x.shape[0], *heads, *x.shape[2:])


def _dot(equation, x, y, dtype):
    """Contracts in y's precision, accumulating in `dtype`."""
    return jnp.einsum(equation, x.astype(y.dtype), y, preferred_element_type=dtype)


def _slice(x, start, sizes):
    return lax.dynamic_slice(x, _int32(start), sizes)


def _add(total, update, start, sizes):
    update = _slice(total, start, sizes) + update.astype(total.dtype)
    return lax.dynamic_update_slice(total, update, _int32(start))


def _int32(start):
    """Indices of one type: constants are longer than those of lists in x64 mode."""
    return [jnp.asarray(i, jnp.int32) for i in start]


def _crop(padded, like):
    return padded[tuple(slice(n) for n in like.shape)].astype(like.dtype)
