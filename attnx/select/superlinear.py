"""Superlinear attention: spans are searched for at anchors, then attended."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnx._checks import expect, expect_shape
from attnx._tree import tree_class
from attnx.select.blocks import document_starts
from attnx.softmax import dot_product_attention, merge_attention
from attnx.softmax.engine import check_arrays
from attnx.softmax.mask import Mask
from attnx.softmax.masks import Causal, Offset, Segments, Window

# Numbers that are gathered at a time.
_GATHERED = 1 << 22


def superlinear_attention(
    router: jax.Array,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    num_spans: int = 3,
    window_index: int = 3,
    backward: float = 2.0,
    forward: float = 0.0,
    search_power: float = 0.5,
    span_power: float = 0.5,
    segment_ids: jax.Array | None = None,
    query_start: jax.Array | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Attends causally to a window and to the spans around the anchors that score best.

    Superlinear Multi-Step Attention (arXiv 2601.18401), two steps. A query at position
    t looks for spans at the anchors `t - F(i) + 1`, `F(i) = floor(i ** (1 /
    search_power))`, i above `window_index`; an anchor's score is the unscaled product
    of the routing query with its key. Around each of the best anchors lies a span of
    O(t ** span_power) keys. The query attends to window and span together, for each
    span anew, and the outputs are averaged with the softmax of the anchors' scores.

    O(T ** 1.5) in time with the powers 0.5. The router learns through the weights of
    the average; which anchors are taken has no gradient. A key says what is near it
    only if a layer below, a recurrence for one, gathers it there.

    Args:
      router: `[B, T, N, H]`, queries that search.
      query: `[B, T, N, H]`, queries that attend.
      key: `[B, S, K, H]`; K divides N.
      value: `[B, S, K, V]`.
      num_spans: anchors that each query takes, at most.
      window_index: the window has the `F(window_index + 1) - 1` newest keys, the
        query's own included.
      backward: keys of a span before its anchor, in units of `n ** span_power`, n being
        the keys up to the query. With powers of 0.5 and without `forward`, spans leave
        no key out of reach from 2 on.
      forward: keys of a span after its anchor, in the same units.
      search_power: the power of the number of keys that are anchors, 0 to 1.
      span_power: the power of the number of keys in a span, 0 to 1.
      segment_ids: integers `[B, S]` that tell packed documents apart: each run of equal
        ids is a document and comes out as it would alone. Padding is one like any
        other.
      query_start: int `[B]`, the position of the first query among the keys, for the
        newest queries against a cache; by default 0.
      scale: factor on the scores of attention, by default `H ** -0.5`.
      implementation: "reference" masks the whole score matrix; None and "xla" gather
        the spans of each query.

    Returns:
      `[B, T, N, V]` in query's dtype.

    Raises:
      ValueError: shapes or options that do not fit.
      NotImplementedError: "pallas", or another unknown name.

    Example:
      >>> import jax, attnx
      >>> r, q, k, v = jax.random.normal(jax.random.key(0), (4, 1, 64, 2, 16))
      >>> attnx.superlinear_attention(r, q, k, v).shape
      (1, 64, 2, 16)
    """
    if implementation not in (None, "reference", "xla"):
        raise NotImplementedError(
            f"implementation={implementation!r}: spans differ from query to query, and "
            "only 'xla' gathers them"
        )
    query, key, value, batched = check_arrays(query, key, value)
    expect(batched, "query", "[B, T, N, H]", query.shape[1:])
    router = jnp.asarray(router)
    expect_shape("router", router, query.shape)
    spans = superlinear_spans(
        router,
        key,
        num_spans=num_spans,
        window_index=window_index,
        backward=backward,
        forward=forward,
        search_power=search_power,
        span_power=span_power,
        segment_ids=segment_ids,
        query_start=query_start,
    )
    attend = functools.partial(
        dot_product_attention,
        query,
        key,
        value,
        scale=scale,
        implementation=implementation,
        return_residual=True,
    )
    width = int(_reach(window_index + 1, search_power)) - 1
    window = None
    if width:
        window = Causal() & Window(width - 1, 0)
        if segment_ids is not None:
            window &= Segments(jnp.asarray(segment_ids))
        if query_start is not None:
            window = Offset(window, query=jnp.asarray(query_start))

    count = spans.score.shape[-1]
    if implementation == "reference":
        each = [Between(spans.first[..., i], spans.last[..., i]) for i in range(count)]
        masks = [span if window is None else window | span for span in each]
        outputs = jnp.stack([attend(mask=mask)[0] for mask in masks], 3)
    else:
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        longest = 1 + sum(
            int(_sizes(x, span_power, key.shape[1])[-1]) for x in (backward, forward)
        )
        outputs, lses = _attend_spans(query, key, value, spans, longest, scale)
        if window is not None:
            near = (jnp.repeat(x[:, :, :, None], count, 3) for x in attend(mask=window))
            outputs, _ = merge_attention(*zip((outputs, lses), near, strict=True))
    # Of a query without anchors all outputs are that of its window.
    weights = jnp.where(jnp.isfinite(spans.score), spans.score, -1e9)
    weights = jnp.moveaxis(jax.nn.softmax(weights, -1), 1, 2)[..., None]
    return (weights * outputs.astype(weights.dtype)).sum(3).astype(query.dtype)


class Spans(NamedTuple):
    """The runs of keys that each query chose, the best first; `[B, N, T, spans]`.

    Attributes:
      first: int32, the first key of each.
      last: int32, its last key; less than `first` where it is empty.
      score: float32 or better, the anchor's; -inf where there is none.
    """

    first: jax.Array
    last: jax.Array
    score: jax.Array


def superlinear_spans(
    router: jax.Array,
    key: jax.Array,
    *,
    num_spans: int = 3,
    window_index: int = 3,
    backward: float = 2.0,
    forward: float = 0.0,
    search_power: float = 0.5,
    span_power: float = 0.5,
    segment_ids: jax.Array | None = None,
    query_start: jax.Array | None = None,
) -> Spans:
    """Searches for the spans that each query of `superlinear_attention` attends.

    Args:
      router: `[B, T, N, H]`.
      key: `[B, S, K, H]`; K divides N.
      num_spans: as in `superlinear_attention`, like all that follow.
      window_index: see there.
      backward: see there.
      forward: see there.
      search_power: see there.
      span_power: see there.
      segment_ids: see there.
      query_start: see there.

    Returns:
      At most `num_spans` a query, fewer where there are fewer anchors, disjoint from
      the query's window. Scores have a gradient.

    Raises:
      ValueError: shapes or options that do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from attnx.select import superlinear_spans
      >>> x = jnp.ones((1, 10, 1, 4))
      >>> spans = superlinear_spans(x, x, num_spans=1, window_index=1)
      >>> spans.first[0, 0, :, 0].tolist(), spans.last[0, 0, :, 0].tolist()
      ([0, 0, 0, 0, 0, 0, 0, 0, 0, 0], [-1, -1, -1, 0, 1, 2, 3, 4, 5, 6])
    """
    router, key, _, batched = check_arrays(router, key, key)
    expect(batched, "router", "[B, T, N, H]", router.shape[1:])
    batch, length, heads, _ = router.shape
    key_len, key_heads = key.shape[1:3]
    group = heads // key_heads
    expect(num_spans >= 1, "num_spans", "at least 1", num_spans)
    expect(window_index >= 0, "window_index", "at least 0", window_index)
    for name, x in (("search_power", search_power), ("span_power", span_power)):
        expect(0 < x <= 1, name, "more than 0, at most 1", x)
    for name, x in (("backward", backward), ("forward", forward)):
        expect(x >= 0, name, "at least 0", x)
    position = jnp.broadcast_to(jnp.arange(length), (batch, length))
    if query_start is None:
        expect(key_len == length, "key", "router's length", key.shape)
    else:
        query_start = jnp.asarray(query_start)
        expect_shape("query_start", query_start, (batch,))
        position += query_start[:, None]
    start = jnp.zeros_like(position)
    if segment_ids is not None:
        segment_ids = jnp.asarray(segment_ids)
        expect_shape("segment_ids", segment_ids, (batch, key_len))
        start = jnp.take_along_axis(
            document_starts(segment_ids), position, 1, mode="clip"
        )

    dtype = jnp.promote_types(router.dtype, jnp.float32)
    reach = _reaches(window_index, search_power, key_len)
    before, after = (
        jnp.asarray(_sizes(x, span_power, key_len)) for x in (backward, forward)
    )

    def search(router, position, start, key):
        """One query of one sequence: `[N, H]`, `[S, K, H]`."""
        router = router.reshape(key_heads, group, -1).astype(dtype)
        anchor = position + 1 - reach
        keys = jax.lax.stop_gradient(key)[jnp.maximum(anchor, 0)].astype(dtype)
        scores = jnp.einsum("kgh,akh->kga", router, keys, precision="highest")
        scores = jnp.where(anchor >= start, scores, -jnp.inf)
        scores, best = jax.lax.top_k(
            jax.lax.stop_gradient(scores), min(num_spans, len(reach))
        )
        anchor = anchor[best]
        # Again, of the chosen few: these have a gradient.
        keys = key[jnp.maximum(anchor, 0), jnp.arange(key_heads)[:, None, None]]
        again = jnp.einsum(
            "kgh,kgah->kga", router, keys.astype(dtype), precision="highest"
        )
        is_anchor = scores > -jnp.inf
        count = jnp.clip(position + 1 - start, 0, key_len)
        near = position + 2 - reach[0]
        first = jnp.maximum(anchor - before[count], start)
        last = jnp.minimum(anchor + after[count], near - 1)
        spans = Spans(
            jnp.where(is_anchor, first, 0),
            jnp.where(is_anchor, last, -1),
            jnp.where(is_anchor, again, -jnp.inf),
        )
        return jax.tree.map(lambda x: x.reshape(heads, -1), spans)

    numbers = batch * key_heads * len(reach) * key.shape[3]
    spans = _each_query(search, (router, position, start), (key,), numbers)
    return Spans(*(jnp.swapaxes(x, 1, 2) for x in spans))


@tree_class()
class Between(Mask):
    """A query sees the keys from `first` to `last`, int `[B, N, T]`."""

    first: jax.Array
    last: jax.Array

    def __call__(self, batch, head, query, key):
        at = (batch, head, query)
        return (jnp.asarray(self.first)[at] <= key) & (
            key <= jnp.asarray(self.last)[at]
        )


def _attend_spans(query, key, value, spans, longest, scale):
    """`[B, T, N, spans, V]` and `[B, T, N, spans]`, each span attended by itself."""
    batch, _, heads, size = query.shape
    key_len, key_heads = key.shape[1:3]
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    longest = min(longest, key_len)

    def attend(query, first, last, key, value):
        """One query of one sequence: `[N, H]` and `[N, spans]`."""
        query, first, last = (
            x.reshape(key_heads, -1, x.shape[-1]) for x in (query, first, last)
        )
        begin = jnp.clip(first, 0, key_len - longest)

        def cut(x, head, begin):
            start = begin, head, jnp.zeros_like(begin)
            x = jax.lax.dynamic_slice(x, start, (longest, 1, x.shape[2]))
            return x[:, 0].astype(dtype)

        for axis in (None, None, 0):
            cut = jax.vmap(cut, (None, axis, 0))
        head = jnp.arange(key_heads)
        scores = scale * jnp.einsum(
            "kgh,kgslh->kgsl", query.astype(dtype), cut(key, head, begin)
        )
        index = begin[..., None] + jnp.arange(longest)
        inside = (first[..., None] <= index) & (index <= last[..., None])
        scores = jnp.where(inside, scores, -jnp.inf)
        peak = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
        peak = jnp.where(jnp.isfinite(peak), peak, 0)
        weights = jnp.exp(scores - peak)
        total = weights.sum(-1)
        empty = total == 0
        total = jnp.where(empty, 1, total)
        out = jnp.einsum("kgsl,kgslv->kgsv", weights, cut(value, head, begin))
        out /= total[..., None]
        lse = jnp.where(empty, -jnp.inf, peak[..., 0] + jnp.log(total))
        return out.reshape(heads, *out.shape[2:]), lse.reshape(heads, -1)

    first, last = (jnp.swapaxes(x, 1, 2) for x in spans[:2])
    numbers = batch * first.shape[2] * first.shape[3] * longest * size
    return _each_query(attend, (query, first, last), (key, value), numbers)


def _each_query(fn, queries, sequences, numbers):
    """Maps over `[B, T, ...]`, with what is `[B, ...]` beside it.

    As many queries at a time as gather so many numbers each, in the gradient too.
    """

    def one(arrays):
        return jax.vmap(fn)(*arrays, *sequences)

    arrays = tuple(jnp.swapaxes(x, 0, 1) for x in queries)
    at_once = max(1, min(_GATHERED // numbers, len(arrays[0])))
    out = jax.lax.map(jax.checkpoint(one), arrays, batch_size=at_once)
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), out)


def _reach(index, power):
    """F: how far back the anchor of a number is, its key included."""
    return np.floor(np.asarray(index) ** (1 / power) + 1e-9).astype(np.int32)


def _reaches(window_index, power, key_len):
    """F of all anchors past the window that a sequence may have, at least one."""
    most = int(np.ceil((key_len + 1) ** power)) + 1
    reach = _reach(np.arange(window_index + 1, max(window_index + 1, most) + 1), power)
    return reach[: max(1, int((reach <= key_len).sum()))]


def _sizes(factor, power, key_len):
    """Keys on one side of an anchor, by the number of keys up to the query."""
    # Rounding must not add a key where the power is whole.
    count = np.arange(key_len + 1.0)
    return np.ceil(factor * count**power - 1e-9).astype(np.int32)
