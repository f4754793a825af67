"""The simulator of neighborhoods: published bounds, and counts by brute force."""

import math

import numpy as np
import pytest

import attnx
from attnx.neighborhood import best_tile, perfect, simulate, windows
from attnx.softmax.neighborhood import fits_word
from attnx.softmax.tile_lists import tile_lists

HUNYUAN = ((30, 48, 80), (18, 24, 24))
FLUX = ((256, 256), (80, 80))
COSMOS = ((16, 44, 80), (16, 24, 16))


@pytest.mark.parametrize(
    ("case", "stride", "tile", "worst", "mean"),
    [
        # "Theoretical max" of NATTEN's charts, by the worst tile; and the mean.
        (HUNYUAN, 1, ((4, 8, 8), (2, 8, 8)), 900 / 275, 4.92),
        (FLUX, 1, ((16, 16), (16, 8)), 512 / 84, 7.06),
        (COSMOS, 1, ((8, 4, 8), (4, 4, 8)), 440 / 84, 6.09),
        (HUNYUAN, (16, 8, 8), (2, 8, 8), 11.1, 11.1),
        (FLUX, 16, (16, 8), 10.2, 10.2),
        (COSMOS, (1, 8, 16), (4, 4, 8), 9.2, 9.2),
    ],
)
def test_bounds_are_nattens(case, stride, tile, worst, mean):
    got = simulate(*case, stride, tile=tile)
    assert got.worst_bound == pytest.approx(worst, abs=0.05)
    assert got.bound == pytest.approx(mean, abs=0.05)
    assert got.partial == (0 if np.prod(stride) > 1 else pytest.approx(0.7, abs=0.2))


@pytest.mark.parametrize(
    ("case", "tile", "visited"),
    [
        (HUNYUAN, (2, 8, 8), 165.4),
        (FLUX, (16, 8), 68.1),
        (COSMOS, (4, 4, 8), 72.3),
        (((121, 256, 256), 11), (4, 4, 8), 69.7),
        (((56, 56), 7), (8, 8), 7.37),
    ],
)
def test_mean_visited_tiles(case, tile, visited):
    assert simulate(*case, tile=tile).visited == pytest.approx(visited, abs=0.05)


def test_shares_of_full_tiles():
    for case, tile, share in [
        (((32768,), 2048), (128,), 0.89),
        (FLUX, (16, 8), 0.50),
        (HUNYUAN, (2, 8, 8), 0.17),
    ]:
        assert 1 - simulate(*case, tile=tile).partial == pytest.approx(share, abs=0.005)


@pytest.mark.parametrize(
    ("arguments", "query_tile", "key_tile"),
    [
        (((61,), 8, 3, 4, True), (4,), (8,)),
        (((13, 22), (5, 7), (2, 3), (2, 3), (False, True)), (4, 2), (2, 2)),
        (((9, 8), (4, 8), (4, 1)), (4, 4), (2, 8)),
    ],
)
def test_counts_by_brute_force(arguments, query_tile, key_tile):
    shape = arguments[0]
    tokens = math.prod(shape)
    seen = attnx.masks.Neighborhood(*arguments).to_dense(tokens, tokens)[0, 0]
    axes = windows(*arguments)

    def tiles(tile):
        """The tile of each token, and how many there are of a tile's full size."""
        index = np.indices(shape).reshape(len(shape), -1)
        place = [
            axis.split(i)[0] * 1000 + axis.split(i)[1] // size
            for axis, size, i in zip(axes, tile, index, strict=True)
        ]
        return np.unique(np.stack(place), axis=1, return_inverse=True)[1].ravel()

    query, key = tiles(query_tile), tiles(key_tile)
    sizes = [math.prod(query_tile), math.prod(key_tile)]
    pairs = np.zeros((query.max() + 1, key.max() + 1))
    np.add.at(pairs, (query[:, None], key), np.asarray(seen))
    # Padded queries do not make a tile partial, padded keys do.
    full = np.bincount(query)[:, None] * sizes[1] == pairs
    visited = (pairs > 0).sum(1)
    got = simulate(*arguments, tile=(query_tile, key_tile))
    assert got.visited == pytest.approx(visited.mean())
    assert got.worst == visited.max()
    assert got.partial == pytest.approx(1 - full.sum() / visited.sum())
    assert got.density == pytest.approx(
        np.asarray(seen).sum() / (visited.sum() * math.prod(sizes))
    )
    assert got.dense == -(-tokens // sizes[1])


def test_counts_are_those_of_the_lists():
    arguments, tile = ((13, 22), (5, 7), (2, 3), (2, 3)), (4, 2)
    lists, got = tile_lists(windows(*arguments), tile), simulate(*arguments, tile=tile)
    counts = np.asarray(lists.counts)
    assert got.worst == counts.max()
    assert got.visited == pytest.approx(counts[counts > 0].mean())
    assert got.partial == pytest.approx(lists.partial_counts.sum() / counts.sum())


@pytest.mark.parametrize("case", [HUNYUAN, FLUX, COSMOS], ids=str)
def test_perfect_neighborhoods_are_found(case):
    found = perfect(*case)
    dense_over_window = math.prod(case[0]) / math.prod(case[1])
    assert found[0].bound == pytest.approx(dense_over_window, abs=0.01)
    bounds = [it.bound for it in found]
    assert bounds == sorted(bounds, reverse=True)
    for it in found:
        assert it.partial == 0
        assert it == simulate(*case, it.stride, tile=(it.query_tile, it.key_tile))
    assert math.prod(found[0].key_tile) == 128


def test_perfect_settings_of_natten_are_among_them():
    for case, stride, tile in [
        (HUNYUAN, (16, 8, 8), (2, 8, 8)),
        (FLUX, (16, 16), (16, 8)),
        (COSMOS, (1, 8, 16), (4, 4, 8)),
    ]:
        # On the first axis of Cosmos, a whole window, strides make no difference.
        assert any(it.stride == stride for it in perfect(*case, tiles=[tile]))


def test_tiles_of_the_search_can_be_given():
    (found,) = perfect((64,), 16, tiles=[((16,), (8,))])
    assert (found.query_tile, found.key_tile, found.stride) == ((16,), (8,), (16,))
    assert perfect((65,), 3) == []


@pytest.mark.parametrize(
    ("arguments", "tile"),
    [
        (((32768,), 2048), (128,)),
        (((100,), 3), (128,)),
        (((7, 7), 7), (8, 8)),
        (((20, 3), 3), (32, 4)),
        (((3, 40, 40), 3, 1, (1, 2, 2)), (4, 4, 8)),
    ],
)
def test_best_tile(arguments, tile):
    assert best_tile(windows(*arguments)) == tile


@pytest.mark.parametrize("case", [HUNYUAN, FLUX, COSMOS, ((56, 56), 7)], ids=str)
def test_best_tile_visits_no_more_than_others(case):
    tile = best_tile(windows(*case))
    assert math.prod(tile) == 128
    assert fits_word(tile)
    others = [(2, 8, 8), (4, 4, 8), (8, 4, 4)] if len(tile) == 3 else [(8, 16), (16, 8)]
    best = simulate(*case, tile=tile).bound
    assert all(best >= simulate(*case, tile=other).bound for other in others)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"kernel_size": 30}, "kernel_size"),
        ({"kernel_size": 3, "tile": (8,)}, "tile: expected 2 sizes of at least 1"),
        ({"kernel_size": 3, "tile": (8, 0)}, "tile: expected 2 sizes of at least 1"),
        ({"kernel_size": 3, "tile": ((8, 8), (8,))}, "tile: expected 2 sizes"),
        ({"kernel_size": 3, "tile": 8}, "tile: expected one tile or a pair"),
    ],
)
def test_bad_input_is_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        simulate((16, 16), **kwargs)


def test_tokens_of_the_best_tile_are_a_power_of_two():
    with pytest.raises(ValueError, match="tokens: expected a power of two, got 100"):
        best_tile(windows((16, 16), 3), tokens=100)
