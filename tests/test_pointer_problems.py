"""Hulls, triangulations and tours: labels, exact answers and measures."""

import itertools

import jax
import numpy as np
import pytest

from models.pointer import delaunay, hull, tsp, tsplib
from models.pointer.experiment import cut_at_end


def uniform(seed, *shape):
    return np.random.default_rng(seed).random(shape, np.float32)


def distances(points):
    points = points.astype(np.float64)
    return np.linalg.norm(points[..., :, None, :] - points[..., None, :, :], axis=-1)


def shortest_of_all(away):
    """The length of the shortest of all tours, which all are tried."""
    rest = np.array(list(itertools.permutations(range(1, len(away)))))
    tours = np.pad(rest, ((0, 0), (1, 0)))
    return away[tours, np.roll(tours, -1, 1)].sum(1).min()


@pytest.mark.parametrize("problem", [hull, delaunay], ids=["hull", "delaunay"])
def test_labels_are_the_exact_answers(problem):
    """Of sets of any size, whatever stands in the padding."""
    points = uniform(0, 100, 9, 2)
    lengths = np.random.default_rng(1).integers(3, 10, 100)
    valid = np.arange(9) < lengths[:, None]
    labels = np.asarray(jax.jit(jax.vmap(problem.label))(points, valid))
    assert labels.shape[1] == problem.max_symbols(9)
    for places, length, symbols in zip(points, lengths, labels, strict=True):
        truth = problem.solve(places[:length])
        np.testing.assert_array_equal(cut_at_end(symbols), truth)
        assert (symbols[len(truth) :] == 0).all()


def test_hulls_turn_left_from_the_lowest_index():
    points = uniform(2, 30, 2)
    polygon = hull.solve(points)
    assert polygon[0] == polygon.min()
    assert hull.area(points[polygon]) > 0
    assert hull.is_simple(points[polygon])


def test_triangles_are_in_canonical_order():
    points = uniform(3, 20, 2)
    triangles = delaunay.solve(points).reshape(-1, 3)
    assert (np.diff(triangles) > 0).all()
    assert (np.diff(delaunay.incenter(points[triangles])[:, 0]) > 0).all()


def test_incenter_is_as_far_from_every_side():
    corners = uniform(4, 5, 3, 2).astype(np.float64)
    sides = np.roll(corners, -1, 1) - corners
    away = delaunay.incenter(corners)[:, None] - corners
    areas = np.abs(sides[..., 0] * away[..., 1] - sides[..., 1] * away[..., 0])
    heights = areas / np.linalg.norm(sides, axis=-1)
    np.testing.assert_allclose(heights, np.tile(heights[:, :1], 3))


def test_exact_tours_are_the_shortest_of_all():
    """Of seven cities: dynamic programming and integer programming."""
    points = uniform(5, 20, 7, 2)
    away = distances(points)
    tours = np.asarray(jax.jit(jax.vmap(tsp.held_karp))(away.astype(np.float32)))
    np.testing.assert_array_equal(np.sort(tours), np.tile(np.arange(7), (20, 1)))
    for matrix, tour in zip(away, tours, strict=True):
        wanted = pytest.approx(shortest_of_all(matrix), rel=1e-5)
        assert tsp.tour_length(matrix, tour) == wanted
        assert tsp.tour_length(matrix, tsp.optimal_tour(matrix)) == wanted


def test_optimal_tour_joins_what_is_far_apart():
    """Three clusters of three, whose cheapest edges are three tours of their own."""
    centres = np.array([[0, 0], [10, 0], [0, 10]])
    points = (centres[:, None] + uniform(6, 3, 3, 2)).reshape(9, 2)
    away = distances(points)
    tour = tsp.optimal_tour(away)
    np.testing.assert_array_equal(np.sort(tour), np.arange(9))
    assert tsp.tour_length(away, tour) == pytest.approx(shortest_of_all(away))


def test_labels_of_many_cities_are_nearly_the_shortest_tours():
    points = uniform(7, 30, 14, 2)
    labels = np.asarray(jax.jit(jax.vmap(tsp.label))(points, np.ones((30, 14), bool)))
    tours = labels[:, :-1] - 1
    assert (labels[:, -1] == 0).all()
    assert (tours[:, 0] == 0).all()
    np.testing.assert_array_equal(np.sort(tours), np.tile(np.arange(14), (30, 1)))
    assert all(
        hull.area(p[tour]) > 0 or not hull.is_simple(p[tour])
        for p, tour in zip(points, tours, strict=True)
    )
    excess = [
        tsp.measure(p, [tour], tsp.solve(p))["excess of the likeliest"]
        for p, tour in zip(points, tours, strict=True)
    ]
    assert min(excess) > -1e-6
    assert np.mean(excess) < 0.005


def test_held_karp_refuses_many_cities():
    with pytest.raises(ValueError, match="distances: expected 3 to 12 cities, got 13"):
        tsp.held_karp(np.ones((13, 13)))


def test_hull_measures():
    points = np.array([[0, 0], [1, 0], [1, 1], [0, 1], [0.5, 0.25]])
    truth = hull.solve(points)
    measure = lambda *output: hull.measure(points, [np.array(output, int)], truth)
    perfect = {"sequence accuracy": 1, "area coverage": 1, "invalid outputs": 0}
    assert measure(0, 1, 2, 3) == measure(2, 3, 0, 1) == perfect
    assert measure(0, 3, 2, 1) == {**perfect, "sequence accuracy": 0}
    # The corner at (0, 0) cut off, then a dent from the lower side.
    assert measure(1, 2, 3)["area coverage"] == pytest.approx(0.5)
    assert measure(0, 4, 1, 2, 3)["area coverage"] == pytest.approx(0.875)
    for broken in [(0, 2, 1, 3), (0, 1), (), (0, 1, 2, 1)]:
        measured = measure(*broken)
        assert np.isnan(measured["area coverage"])
        assert (measured["invalid outputs"], measured["sequence accuracy"]) == (1, 0)


def test_delaunay_measures():
    points = np.array([[0, 0], [1, 0], [1.1, 1], [0, 1.2]])
    truth = delaunay.solve(points)
    assert sorted(map(tuple, truth.reshape(-1, 3).tolist())) == [(0, 1, 2), (0, 2, 3)]
    measure = lambda *output: list(
        delaunay.measure(points, [np.array(output, int)], truth).values()
    )
    assert measure(*truth) == measure(2, 3, 0, 1, 2, 0) == [1, 1, 0]
    assert measure(0, 1, 2) == [0, 0.5, 0]
    assert measure(0, 1, 2, 0, 1, 3) == [0, 0.5, 0]
    assert measure(0, 1, 2, 0, 2, 3, 0, 2, 3) == [0, 1, 0]
    assert measure(0, 1, 2, 0, 2, 3, 0) == [0, 1, 1]
    assert measure(0, 1, 2, 0, 2, 2) == [0, 0.5, 1]
    assert measure() == [0, 0, 0]


def test_tour_measures():
    """Around a square of side 1, or across it twice."""
    points = np.array([[0, 0], [1, 1], [1, 0], [0, 1]])
    around, across = np.array([0, 2, 1, 3]), np.array([0, 1, 2, 3])
    measured = tsp.measure(points, [across, around], tsp.solve(points))
    crossed = 2 + 2 * 2**0.5
    assert measured == pytest.approx(
        {
            "likeliest tour": crossed,
            "shortest tour of the beam": 4,
            "optimal tour": 4,
            "excess of the likeliest": crossed / 4 - 1,
            "excess of the shortest": 0,
            "invalid outputs": 0,
        }
    )
    broken = tsp.measure(points, [np.array([0, 1, 1, 2])], around)
    assert np.isnan(broken["likeliest tour"])
    assert broken["invalid outputs"] == 1


def test_tsplib_distances_by_hand():
    # 2.5 goes up to 3, where rounding to even would go down.
    assert tsplib.euc_2d(np.array([[0, 0], [1.5, 2]]))[0, 1] == 3
    # Along the equator 1 degree 30 minutes, so 166.98 km, and 1 is added before the
    # fraction goes; from 0.30 south to 0.30 north 1 degree, 111.32 km.
    places = np.array([[0, 0], [0, 1.3], [-0.3, 0], [0.3, 0]])
    away = tsplib.geo(places)
    assert (away[0, 1], away[2, 3]) == (167, 112)
    np.testing.assert_array_equal(away, away.T)
    # Around the Earth through both poles: four quarters of 10019.1 km.
    quarters = tsplib.geo(np.array([[0.0, 0], [90, 0], [0, 180], [-90, 0]]))
    assert tsp.tour_length(quarters, np.arange(4)) == 4 * 10020
