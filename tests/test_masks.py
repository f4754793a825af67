"""Masks: what they show, what tiles they claim, and their algebra."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_matches, normal
from hypothesis import given
from hypothesis import strategies as st

import attnx
from attnx import masks
from attnx.softmax.mask import Tiles

T, S = 23, 37
IDS = jnp.array([[0] * 9 + [1] * 14, [2] * 3 + [3] * 20])
KEY_IDS = jnp.array([[0] * 20 + [1] * 17, [3] * 30 + [2] * 7])

MASKS = {
    "full": (masks.Full(), lambda b, n, i, j: True),
    "causal": (masks.Causal(), lambda b, n, i, j: j <= i),
    "window": (masks.Window(4, 2), lambda b, n, i, j: i - 4 <= j <= i + 2),
    "left": (masks.Window(4, None), lambda b, n, i, j: i - 4 <= j),
    "window a head": (
        masks.Window(jnp.array([1, 9]), 0),
        lambda b, n, i, j: i - (1, 9)[n] <= j <= i,
    ),
    "prefix": (masks.Prefix(6), lambda b, n, i, j: j < 6),
    "prefix a row": (
        masks.Prefix(jnp.array([0, 30])),
        lambda b, n, i, j: j < (0, 30)[b],
    ),
    "lengths": (
        masks.Lengths(jnp.array([5, 23]), jnp.array([37, 11])),
        lambda b, n, i, j: i < (5, 23)[b] and j < (37, 11)[b],
    ),
    "segments": (
        masks.Segments(IDS, KEY_IDS),
        lambda b, n, i, j: int(IDS[b, i]) == int(KEY_IDS[b, j]),
    ),
    "segments, one row": (
        masks.Segments(IDS[0], KEY_IDS[0]),
        lambda b, n, i, j: int(IDS[0, i]) == int(KEY_IDS[0, j]),
    ),
    "strided": (masks.Strided(5), lambda b, n, i, j: (i - j) % 5 == 0),
    "power": (
        masks.Power(),
        lambda b, n, i, j: j <= i and (i - j).bit_count() <= 1,
    ),
    "power of blocks": (
        masks.Power(3, window=4),
        lambda b, n, i, j: (
            j <= i and (i // 3 - j // 3 < 4 or (i // 3 - j // 3).bit_count() <= 1)
        ),
    ),
    "offset": (
        masks.Offset(masks.Causal(), query=jnp.array([3, 14]), key=1),
        lambda b, n, i, j: j + 1 <= i + (3, 14)[b],
    ),
    "from_fn": (
        masks.from_fn(lambda b, n, i, j, m: (i * j + n) % m == b, jnp.array(3)),
        lambda b, n, i, j: (i * j + n) % 3 == b,
    ),
    "and, or, not": (
        ~(masks.Causal() & masks.Window(7, 0)) | masks.Prefix(2),
        lambda b, n, i, j: not (j <= i and i - 7 <= j) or j < 2,
    ),
}


def dense(mask, query_len=T, key_len=S):
    seen = mask.to_dense(query_len, key_len, batch=2, heads=2)
    return np.broadcast_to(seen, (2, 2, query_len, key_len))


@pytest.mark.parametrize("name", MASKS)
def test_shows_what_its_definition_says(name):
    mask, definition = MASKS[name]
    want = np.array(
        [
            bool(definition(*pair))
            for pair in itertools.product(range(2), range(2), range(T), range(S))
        ]
    )
    np.testing.assert_array_equal(dense(mask).ravel(), want)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("block_size", [(8, 8), (5, 16), (23, 1)])
def test_bounds_never_miss_a_pair(name, block_size):
    mask, _ = MASKS[name]
    some, every = mask.bounds(Tiles.grid(T, S, block_size, batch=2, heads=2))
    assert_bounds(dense(mask), some, every, block_size)


@pytest.mark.parametrize(
    "name", ["causal", "window", "prefix", "lengths", "from_fn", "power"]
)
def test_bounds_of_one_mask_are_exact(name):
    mask, _ = MASKS[name]
    some, every = mask.bounds(Tiles.grid(T, S, (8, 8), batch=2, heads=2))
    assert_bounds(dense(mask), some, every, (8, 8), exact=True)


@given(
    left=st.integers(0, 12),
    right=st.integers(0, 12),
    stride=st.integers(1, 12),
    query=st.integers(-9, 9),
    size=st.sampled_from([(4, 4), (8, 3)]),
)
def test_bounds_of_any_combination(left, right, stride, query, size):
    window = masks.Window(left, right)
    mask = masks.Offset(window & ~masks.Strided(stride), query=query) | masks.Prefix(2)
    some, every = mask.bounds(Tiles.grid(16, 16, size))
    assert_bounds(np.asarray(mask.to_dense(16, 16)), some, every, size)


def test_layers_of_power_reach_the_distances_of_few_binary_ones():
    length, ones = 300, np.array([n.bit_count() for n in range(300)])
    seen = np.asarray(masks.Power().to_dense(length, length)[0, 0])
    distance = np.subtract.outer(np.arange(length), np.arange(length))
    reached = np.eye(length, dtype=bool)
    for layers in range(1, 9):
        reached = reached @ seen
        want = (distance >= 0) & (ones[np.maximum(distance, 0)] <= layers)
        np.testing.assert_array_equal(reached, want)
        hole_free = min(2 ** (layers + 1) - 2, length - 1)
        assert reached[-1, length - 1 - hole_free :].all()
    assert reached[np.tri(length, dtype=bool)].all()


def test_power_of_blocks_has_the_papers_density():
    power = masks.Power(256, window=5) | masks.Causal() & masks.Prefix(256)
    for length, density in ((8192, 0.389), (32768, 0.131), (131072, 0.041)):
        lists = attnx.BlockMask.from_mask(power, length, length, block_size=(256, 256))
        tokens = 256 * (256 * lists.counts.sum() - (length // 256) * 255 / 2)
        np.testing.assert_allclose(
            tokens / (length * (length + 1) / 2), density, atol=5e-4
        )


def test_power_attends_alike_everywhere():
    mask = masks.Power(3, window=2)
    arrays = normal(0, *[(1, 50, 2, 8)] * 3)

    def attention(implementation):
        return lambda *arrays: attnx.dot_product_attention(
            *arrays, mask=mask, implementation=implementation, return_residual=True
        )

    assert_matches(attention("xla"), attention("reference"), arrays)
    query, key, value = arrays
    length = jnp.array([50])
    step = attnx.decode_attention(query[:, -1:], key, value, length, mask=mask)
    want = attention("reference")(*arrays)[0][:, -1:]
    chex.assert_trees_all_close(step, want, atol=2e-6)


@pytest.mark.parametrize("size", [{"block_size": 64}, {"window": 64}])
def test_wide_power_is_causal(size):
    chex.assert_trees_all_equal(dense(masks.Power(**size)), dense(masks.Causal()))


def test_combinations_are_pytrees_that_trace():
    mask = masks.Causal() & masks.Window(jnp.array(3), 0) | ~masks.Segments(IDS[0])
    traced = jax.jit(lambda m: m.to_dense(T, T))(mask)
    chex.assert_trees_all_equal(traced, mask.to_dense(T, T))
    assert len(jax.tree.leaves(mask)) == 3


def test_masks_of_the_same_fields_are_different_trees():
    causal = masks.Causal()
    for one, other in [(causal, masks.Full()), (causal & causal, causal | causal)]:
        assert jax.tree.structure(one) != jax.tree.structure(other)
        assert jax.tree.structure(one) == jax.tree.structure(jax.tree.map(abs, one))


def test_truth_value_is_refused():
    with pytest.raises(TypeError, match="combine masks with &"):
        _ = masks.Causal() and masks.Full()
    with pytest.raises(TypeError):
        _ = masks.Causal() & True


def test_bad_masks_are_refused():
    with pytest.raises(ValueError, match="Window left: expected at least 0, got -1"):
        masks.Window(-1, 0)
    with pytest.raises(ValueError, match="Strided stride: expected at least 1, got 0"):
        masks.Strided(0)
    with pytest.raises(ValueError, match="Power window: expected at least 1, got 0"):
        masks.Power(window=0)


def test_plot_draws_every_pair():
    import matplotlib

    matplotlib.use("Agg")
    ax = masks.plot(masks.Causal(), 12, 20, block_size=(4, 4))
    image = ax.images[0].get_array()
    chex.assert_shape(image, (12, 20))
    seen = np.asarray(masks.Causal().to_dense(12, 20)[0, 0])
    assert image[seen].min() > image[~seen].max()


def assert_bounds(seen, some, every, block_size, exact=False):
    """No tile with a visible pair is skipped, none with a hidden one is called full."""
    query_len, key_len = seen.shape[-2:]
    rows, columns = -(-query_len // block_size[0]), -(-key_len // block_size[1])
    shape = (*seen.shape[:2], rows, columns)
    some, every = (np.broadcast_to(np.asarray(x), shape) for x in (some, every))
    for i, j in itertools.product(range(rows), range(columns)):
        tile = seen[
            ...,
            i * block_size[0] : (i + 1) * block_size[0],
            j * block_size[1] : (j + 1) * block_size[1],
        ]
        has_any, has_all = tile.any((-2, -1)), tile.all((-2, -1))
        assert (some[..., i, j] >= has_any).all(), (i, j)
        assert (every[..., i, j] <= has_all).all(), (i, j)
        if exact:
            np.testing.assert_array_equal(some[..., i, j], has_any)
            np.testing.assert_array_equal(every[..., i, j], has_all)
