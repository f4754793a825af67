"""Masks inside kernels: what a traced predicate says of a tile of pairs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnx import masks
from attnx.softmax.neighborhood import TiledNeighborhood
from pallas_kernels.predicate import KEY, QUERY, Untraceable, trace

B, N, T = 2, 2, 256
TILE = (64, 128)
IDS = jnp.sort(jax.random.randint(jax.random.key(0), (B, T), 0, 4))
RANK = jnp.arange(T)[::-1]
MASKS = {
    "full": masks.Full(),
    "causal": masks.Causal(),
    "window": masks.Window(5, 3),
    "window per head": masks.Window(jnp.array([3, 90]), 0),
    "causal or prefix": masks.Causal() | masks.Prefix(jnp.array([3, 70])),
    "documents": masks.Segments(IDS) & masks.Causal(),
    "not strided": ~masks.Strided(3),
    "power": masks.Power(3, window=2),
    "neighborhood": masks.Neighborhood((16, 16), 5, 2, (1, 2), (True, False)),
    "offset": masks.Offset(masks.Causal(), query=jnp.array([5, 8])),
    "looked up": masks.from_fn(lambda b, h, q, k, rank: rank[q] > rank[k], RANK),
    "by batch and head": masks.from_fn(lambda b, h, q, k: (q + b) % 3 >= (k + h) % 3),
}


def traced(mask):
    return trace(
        lambda batch, head, query_start, row, key_start, column: mask(
            batch, head, query_start + row, key_start + column
        ),
        B,
        N,
        T,
        T,
    )


def evaluate(predicate, arrays, batch, head, starts):
    """As a kernel does: looked up values as vectors along one side of the tile."""
    looked_up = []
    for lookup, array in zip(predicate.lookups, arrays, strict=True):
        row = array[batch % array.shape[0], head % array.shape[1]]
        if lookup.by is None:
            looked_up.append((row[0], None))
        else:
            axis = (QUERY, KEY).index(lookup.by)
            start = starts[axis]
            looked_up.append((row[start : start + TILE[axis]], axis))
    indices = [(jnp.int32(batch), None), (jnp.int32(head), None)]
    for axis, (start, size) in enumerate(zip(starts, TILE, strict=True)):
        indices += [(jnp.int32(start), None), (jnp.arange(size, dtype=jnp.int32), axis)]
    return predicate(indices, looked_up, TILE)


@pytest.mark.parametrize("name", MASKS)
def test_a_tile_is_what_the_mask_shows(name):
    mask = MASKS[name]
    predicate, arrays = traced(mask)
    want = np.broadcast_to(mask.to_dense(T, T, batch=B, heads=N), (B, N, T, T))
    for batch, head, starts in ((0, 0, (0, 0)), (1, 0, (128, 0)), (1, 1, (192, 128))):
        got = evaluate(predicate, arrays, batch, head, starts)
        rows, columns = (
            slice(start, start + size) for start, size in zip(starts, TILE, strict=True)
        )
        np.testing.assert_array_equal(got, want[batch, head, rows, columns])


def test_arrays_are_looked_up_outside_and_no_larger_than_they_must_be():
    predicate, arrays = traced(MASKS["documents"])
    assert sorted(str(lookup.by) for lookup in predicate.lookups) == [KEY, QUERY]
    assert [array.shape for array in arrays] == [(B, 1, T)] * 2
    predicate, arrays = traced(MASKS["window per head"])
    assert [lookup.by for lookup in predicate.lookups] == [None]
    assert [array.shape for array in arrays] == [(1, N, 1)]
    predicate, arrays = traced(masks.Window(jnp.array([3]), 0))
    assert [array.shape for array in arrays] == [(1, N, 1)]
    assert traced(MASKS["neighborhood"])[1] == []


def test_what_a_kernel_cannot_evaluate_says_why():
    dense = jnp.ones((T, T), bool)
    by_both = masks.from_fn(lambda b, h, q, k, seen: seen[q, k], dense)
    with pytest.raises(Untraceable, match="by query and key"):
        traced(by_both)
    with pytest.raises(Untraceable, match="uses sin"):
        traced(masks.from_fn(lambda b, h, q, k: jnp.sin(q * 1.0) > jnp.sin(k * 1.0)))


@pytest.mark.parametrize("stride", [1, 2])
def test_what_takes_long_along_the_queries_can_be_handed_over(stride):
    mask = TiledNeighborhood((16, 16), 5, stride, (1, 2), (True, False), (8, 8))
    predicate, _ = trace(mask.at, 1, 1, T, T)
    assert [word.aval.dtype for word in predicate.words] == [jnp.int32]
    shape = 64, 64  # Of keys and queries.
    columns = jnp.arange(64, dtype=jnp.int32)
    for query_start, key_start in ((64, 0), (64, 64), (192, 128)):
        starts = [(jnp.int32(start), None) for start in (query_start, key_start)]
        indices = [(jnp.int32(0), None)] * 2
        indices += [starts[0], (columns, 1), starts[1], (columns, 0)]
        words = [(x, 1) for x in predicate.make_words(indices, [], shape)]
        want = predicate(indices, [], shape)
        assert 0 < want.sum() < want.size
        # The queries are not asked for again where their words are there.
        indices[3] = (columns * 0, 1)
        np.testing.assert_array_equal(predicate(indices, [], shape, words), want)


@pytest.mark.parametrize("name", ["documents", "looked up"])
def test_what_the_queries_look_up_is_handed_over(name):
    predicate, arrays = traced(MASKS[name])
    assert len(predicate.words) == 1
    rows, columns = jnp.arange(64, 128), jnp.arange(192)
    indices = [(jnp.int32(0), None), (jnp.int32(1), None)]
    indices += [(jnp.int32(0), None), (rows, 0), (jnp.int32(0), None), (columns, 1)]
    by = {QUERY: (rows, 0), KEY: (columns, 1)}

    def seen(*words, queries=1):
        looked_up = []
        for lookup, array in zip(predicate.lookups, arrays, strict=True):
            at, axis = by[lookup.by]
            values = array[0, 0, at] * (queries if lookup.by == QUERY else 1)
            looked_up.append((values, axis))
        return predicate(indices, looked_up, (64, 192), words)

    (query,) = (i for i, x in enumerate(predicate.lookups) if x.by == QUERY)
    word = arrays[query][0, 0, rows], 0
    assert 0 < seen().sum() < seen().size
    # The queries' own are not asked for where the word is there.
    np.testing.assert_array_equal(seen(word, queries=0), seen())


def test_what_is_made_at_once_stays_where_it_is():
    for name in ("causal", "window"):
        assert traced(MASKS[name])[0].words == ()
