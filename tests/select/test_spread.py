"""Rules that keep rows apart, and densities in cells, held against loops over whole matrices."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflex.select import neighbours, spread, tsds
from dataflex.select.choose import Candidates
from dataflex.select.cluster import cells_of
from dataflex.select.neighbours import nearest, similar_rows
from dataflex.select.rules import Rule, choose
from dataflex.select.spread import apart, facility_location, greedy_cover, k_center, near_duplicates, unit
from dataflex.select.tsds import Densities, epanechnikov, tsds_widened
from tests.rounding import sums_apart
from tests.select.test_transport import tsds_probabilities


def whole(seed, count, width=3, low=-3, high=4):
    return np.random.default_rng(seed).integers(low, high, size=(count, width)).astype(np.float32)


# ---------------------------------------------------------------- DEITA

TOY = np.array([[1.0, 0.0], [0.95, 0.3122], [0.0, 1.0]], dtype=np.float32)


def test_deita_toy():
    """Scores 3 > 2 > 1: the second row is too close to the first."""
    toy = Candidates(
        rows=np.arange(3), uniforms=Candidates.stream(0, "x", 0), scores=np.array([3.0, 2.0, 1.0]), vectors=TOY
    )
    assert choose(Rule.of("deita"), toy, 3).tolist() == [0, 2]
    assert choose(Rule.of("deita", threshold=0.96), toy, 3).tolist() == [0, 1, 2]
    assert choose(Rule.of("deita", fill=True), toy, 3).tolist() == [0, 2, 1]
    assert choose(Rule.of("deita", fill=True), toy, 2).tolist() == [0, 2]


def slow_apart(vectors, order, threshold, k):
    kept = []
    for i in order:
        if len(kept) < k and all(vectors[i] @ vectors[j] <= threshold for j in kept):
            kept.append(i)
    return kept


@given(seed=st.integers(0, 10_000), count=st.integers(1, 30), k=st.integers(1, 30), block=st.integers(1, 7))
@settings(max_examples=150, deadline=None)
def test_rows_apart_equal_the_loop(seed, count, k, block):
    """Whole numbers keep products exact; a threshold between them keeps comparisons clear."""
    vectors = whole(seed, count)
    order = np.random.default_rng(seed).permutation(count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spread, "_BLOCK", block)
        found = apart(vectors, order, 2.5, k)
    assert found.tolist() == slow_apart(vectors, order.tolist(), 2.5, k)


def test_unit_vectors_are_not_copied():
    vectors = unit(np.array([[3.0, 4.0], [0.0, 0.0]]))
    np.testing.assert_allclose(vectors, [[0.6, 0.8], [0.0, 0.0]], rtol=1e-6)
    assert unit(vectors[:1]) is not None
    assert np.shares_memory(unit(vectors[:1]), vectors)


# ---------------------------------------------------------------- near-duplicates


def test_near_duplicates_of_better_rows_are_dropped():
    vectors = np.array([[1, 0], [0, 2], [1, 0], [10, 1], [0, 1]], dtype=np.float32)
    assert near_duplicates(vectors, np.arange(5), 0.999).tolist() == [False, False, True, False, True]
    assert near_duplicates(vectors, np.array([4, 3, 2, 1, 0]), 0.999).tolist() == [True, True, False, False, False]
    assert near_duplicates(vectors, np.arange(5), 0.99).tolist() == [False, False, True, True, True]
    assert near_duplicates(vectors[:0], np.arange(0), 0.9).tolist() == []


@given(seed=st.integers(0, 1000), count=st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_what_stays_is_apart_and_what_goes_is_not(seed, count):
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(count, 2)).astype(np.float32)
    vectors[rng.integers(count)] = vectors[rng.integers(count)]
    order = rng.permutation(count)
    dropped = near_duplicates(vectors, order, 0.9)
    cosines = unit(vectors) @ unit(vectors).T
    rank = np.argsort(order)
    stays = np.flatnonzero(~dropped)
    assert (cosines[np.ix_(stays, stays)] - np.eye(len(stays))).max() <= 0.9 + 1e-6
    for i in np.flatnonzero(dropped):
        assert any(cosines[i, j] > 0.9 - 1e-6 and rank[j] < rank[i] for j in stays)


def test_large_pools_are_compared_within_cells(monkeypatch):
    monkeypatch.setattr(spread, "_WHOLE_ROWS", 50)
    monkeypatch.setattr(spread, "_CELL_ROWS", 30)
    rng = np.random.default_rng(0)
    vectors = np.repeat(rng.normal(size=(60, 16)), 3, axis=0) + 0.01 * rng.normal(size=(180, 16))
    dropped = near_duplicates(vectors.astype(np.float32), np.arange(180), 0.95)
    assert dropped.reshape(60, 3).sum(axis=1).tolist() == [2] * 60
    assert not dropped[::3].any()


# ---------------------------------------------------------------- k-center


def test_k_center_toy():
    line = np.array([[0.0], [1], [2], [10]], dtype=np.float32)
    assert k_center(line, 3).tolist() == [0, 3, 2]
    assert k_center(line, 9).tolist() == [0, 3, 2, 1]


def slow_k_center(vectors, k):
    chosen = [0]
    while len(chosen) < min(k, len(vectors)):
        away = [min(float(((x - vectors[j]) ** 2).sum()) for j in chosen) for x in vectors]
        chosen.append(max((i for i in range(len(vectors)) if i not in chosen), key=lambda i: (away[i], -i)))
    return chosen


@given(seed=st.integers(0, 10_000), count=st.integers(1, 30), k=st.integers(1, 30), eager=st.integers(1, 10))
@settings(max_examples=120, deadline=None)
def test_k_center_equals_the_loop(seed, count, k, eager):
    vectors = whole(seed, count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spread, "_EAGER", eager)
        found = k_center(vectors, k)
    assert found.tolist() == slow_k_center(vectors, k)


# ---------------------------------------------------------------- facility location


def test_facility_location_toy():
    similarity = [[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 1.0]]
    chosen = greedy_cover([[0, 1, 2]] * 3, similarity, 2)
    assert chosen.tolist() == [0, 2]
    assert np.array(similarity)[:, chosen].max(axis=1).sum() == pytest.approx(2.9)


def slow_facility(similarity, k):
    chosen = []
    for _ in range(min(k, len(similarity))):
        before = similarity[:, chosen].max(axis=1) if chosen else np.zeros(len(similarity))
        gains = np.maximum(similarity - before[:, None], 0.0).sum(axis=0)
        gains[chosen] = -1.0
        chosen.append(int(gains.argmax()))
    return chosen


@given(seed=st.integers(0, 10_000), count=st.integers(1, 20), k=st.integers(0, 20))
@settings(max_examples=120, deadline=None)
def test_lazy_greedy_equals_greedy(seed, count, k):
    """Similarities of eighths keep every sum exact."""
    table = np.random.default_rng(seed).integers(-2, 9, size=(count, count)) / 8.0
    found = greedy_cover(np.tile(np.arange(count), (count, 1)), table, k)
    assert found.tolist() == slow_facility(np.maximum(table, 0.0), k)


def test_facility_location_on_vectors_and_with_few_neighbours():
    vectors = unit(np.random.default_rng(0).normal(size=(40, 5)))
    cosines = np.maximum((vectors @ vectors.T).astype(np.float64), 0.0)
    assert facility_location(vectors, 12).tolist() == slow_facility(cosines, 12)
    kept = np.zeros_like(cosines)
    order = np.argsort(-(vectors @ vectors.T), axis=1, kind="stable")[:, :6]
    np.put_along_axis(kept, order, np.take_along_axis(cosines, order, axis=1), axis=1)
    assert facility_location(vectors, 12, neighbours=6).tolist() == slow_facility(kept, 12)


def test_representatives_can_be_sought_among_the_best_rows():
    vectors = unit(np.random.default_rng(0).normal(size=(40, 5)))
    scores = np.arange(40.0)
    known = Candidates(rows=np.arange(40), uniforms=Candidates.stream(0, "x", 0), scores=scores, vectors=vectors)
    for name in ("facility_location", "k_center"):
        assert set(choose(Rule.of(name, best_share=0.25), known, 5).tolist()) <= set(range(30, 40))
        assert len(choose(Rule.of(name, best_share=0.05), known, 5)) == 5


# ---------------------------------------------------------------- search, cells, densities


@given(seed=st.integers(0, 1000), k=st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_lists_of_nearest_rows_through_a_sample(seed, k):
    vectors = whole(seed, 40, 2)
    products = vectors @ vectors.T
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "_CELLS", 200)
        places, found = neighbours.similar_rows(vectors, k, "exact")
    order = np.argsort(-products, axis=1, kind="stable")[:, :k]
    assert places.tolist() == order.tolist()
    assert found.tolist() == np.take_along_axis(products, order, axis=1).tolist()


def test_faiss_finds_what_exact_search_finds_in_a_small_pool():
    rng = np.random.default_rng(0)
    rows = unit(rng.normal(size=(60, 4)))
    queries = unit(rng.normal(size=(5, 4)))
    exact, approximate = nearest(queries, rows, 7, "exact"), nearest(queries, rows, 7, "faiss")
    assert exact[0].tolist() == approximate[0].tolist()  # 3 cells, all of which are looked at
    np.testing.assert_allclose(exact[1], approximate[1])
    found = np.unique(exact[0])
    for row in found:  # the distance to the nearest query that found the row
        assert approximate[2][row] == pytest.approx(exact[1][exact[0] == row].min())
    assert np.delete(approximate[2], found).min(initial=9.0) > exact[1].max()
    assert similar_rows(rows, 5, "faiss")[0].tolist() == similar_rows(rows, 5, "exact")[0].tolist()


def test_cells_hold_every_row_once():
    vectors = np.random.default_rng(0).normal(size=(500, 6)).astype(np.float32)
    places = np.arange(0, 500, 2)
    cells = cells_of(vectors, places, 20)
    assert len(cells.members) > 5
    assert np.sort(np.concatenate(cells.members)).tolist() == places.tolist()
    assert cells.around(3, 4)[0] == 3
    assert len(set(cells.around(3, 4))) == 4


def test_densities_are_computed_once_and_for_the_rows_asked_for():
    vectors = np.random.default_rng(0).normal(size=(80, 3)).astype(np.float32)
    among = np.arange(5, 75)
    dense = Densities(vectors, among, 0.9, 10)
    expected = np.full(80, np.nan)
    expected[among] = epanechnikov(vectors[among], 0.9, 10)
    asked = np.array([[7, 30], [74, 7]])
    np.testing.assert_allclose(dense(asked), expected[asked])
    assert np.isfinite(dense._known).sum() == 3
    np.testing.assert_allclose(dense(among), expected[among])
    assert Densities(vectors, among, 0.0, 10)(asked).tolist() == [[1, 1], [1, 1]]


def test_densities_in_cells_find_the_near_duplicates(monkeypatch):
    monkeypatch.setattr(tsds, "_EXACT_PAIRS", 100)
    monkeypatch.setattr(tsds, "_CELL_ROWS", 40)
    rng = np.random.default_rng(0)
    vectors = unit(np.repeat(rng.normal(size=(300, 16)), 4, axis=0) + 0.01 * rng.normal(size=(1200, 16)))
    exact = epanechnikov(vectors, 0.3, 100)
    places = np.arange(1200)
    assert exact.min() > 3.5
    # A kernel value is 1 - (2 - 2 x y) / sigma^2 for unit vectors of 16 places; of itself it is 1 exactly.
    pair = 2.0 * sums_apart(16) / 0.3**2
    np.testing.assert_allclose(Densities(vectors, places, 0.3, 100)(places), exact, rtol=0, atol=3 * pair)
    # At most two count: the row itself and its nearest copy.
    crowded = Densities(vectors, places, 0.3, 2)(places)
    right = np.isclose(crowded, epanechnikov(vectors, 0.3, 2), rtol=0, atol=pair)
    assert right.mean() > 0.97
    assert (crowded <= 2.0).all()


@given(seed=st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_cells_that_can_hold_a_neighbour_are_all_named(seed):
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(200, 3)).astype(np.float32)
    cells = cells_of(vectors, np.arange(200), 10)
    probing = cells.probes(vectors, np.arange(200), 1000, 0.4)
    away = np.linalg.norm(vectors[:, None].astype(float) - vectors[None], axis=2)
    for members, asking in zip(cells.members, probing, strict=True):
        assert set(np.flatnonzero((away[:, members] < 0.39).any(axis=1))) <= set(asking.tolist())


@given(seed=st.integers(0, 10_000), alpha=st.sampled_from([0.0, 0.3, 0.5, 0.9]), c=st.sampled_from([0.3, 1.0, 4.0]))
@settings(max_examples=100, deadline=None)
def test_the_walk_asks_only_for_what_it_needs(seed, alpha, c):
    rng = np.random.default_rng(seed)
    distances = np.sort(rng.random((3, 40)), axis=1)
    found = np.stack([rng.permutation(60)[:40] for _ in range(3)])
    densities = 1.0 + 2.0 * rng.random(60)
    asked = []

    def density_of(places):
        asked.append(places.shape[1])
        return densities[places]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dataflex.select.tsds._FIRST_WIDTH", 3)
        lazy = tsds_widened(distances, found, density_of, 60, alpha=alpha, c=c)
    whole_walk = tsds_probabilities(distances, found, densities[found], 60, alpha=alpha, c=c)
    assert lazy.tolist() == whole_walk.tolist()
    assert alpha > 0.0 or asked[-1] == 40
