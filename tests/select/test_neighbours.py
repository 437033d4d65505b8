"""Exact nearest rows in blocks, held against whole matrices."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflex.select import neighbours
from dataflex.select.choose import round_robin
from dataflex.select.neighbours import best_similarity, nearest_euclidean, nearest_lists, round_robin_nearest

TOY = np.array([[0.9, 0.8, 0.1], [0.95, 0.2, 0.3]], dtype=np.float32)  # similarities of the sheet


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Several blocks, windows and extensions on small inputs."""
    monkeypatch.setattr(neighbours, "_CELLS", 20)
    monkeypatch.setattr(neighbours, "_WINDOW", 3)
    monkeypatch.setattr(neighbours, "_SHORTEST", 2)


@st.composite
def problems(draw):
    """Queries and rows of whole numbers, so that ties are common and products exact."""
    numbers, width = st.integers(-2, 2), draw(st.integers(1, 3))
    size = st.tuples(st.integers(1, 6), st.integers(1, 25))
    num_queries, num_rows = draw(size)
    values = draw(
        st.lists(numbers, min_size=(num_queries + num_rows) * width, max_size=(num_queries + num_rows) * width)
    )
    table = np.array(values, dtype=np.float32).reshape(-1, width)
    return table[:num_queries], table[num_queries:], draw(st.integers(0, 30))


def walked(similarities, k):
    """Every query's first row, then every query's second, and so on, without repeats."""
    lists = [sorted(range(len(row)), key=lambda i, row=row: (-row[i], i)) for row in similarities.tolist()]
    seen = []
    for rank in range(similarities.shape[1]):
        for one in lists:
            if one[rank] not in seen:
                seen.append(one[rank])
    return seen[:k]


def test_round_robin_toy_of_the_sheet():
    eye = np.eye(3, dtype=np.float32)
    assert round_robin_nearest(TOY, eye, 2).tolist() == [0, 2]
    assert round_robin_nearest(TOY[::-1], eye, 2).tolist() == [0, 1]
    assert round_robin_nearest(TOY, eye, 2, lose_turn=True).tolist() == [0, 1]
    np.testing.assert_allclose(best_similarity(TOY, eye)[0], [0.95, 0.8, 0.3])


@pytest.mark.slow
@given(problem=problems())
@settings(max_examples=150, deadline=None)
def test_blocks_give_what_the_whole_matrix_gives(problem):
    queries, rows, k = problem
    whole = queries @ rows.T
    assert round_robin_nearest(queries, rows, k).tolist() == round_robin(whole, k).tolist()
    assert round_robin_nearest(queries, rows, k, lose_turn=True).tolist() == walked(whole, k)
    best, which = best_similarity(queries, rows)
    assert best.tolist() == whole.max(axis=0).tolist()
    assert which.tolist() == whole.argmax(axis=0).tolist()
    order = np.argsort(-whole, axis=1, kind="stable")[:, :k]
    assert nearest_lists(queries, rows, k).tolist() == order.tolist()


@given(problem=problems())
@settings(max_examples=80, deadline=None)
def test_euclidean_neighbours(problem):
    queries, rows, k = problem
    k = min(max(k, 1), len(rows))
    whole = np.linalg.norm(queries[:, None].astype(float) - rows[None], axis=2)
    places, distances, nearest = nearest_euclidean(queries, rows, k)
    order = np.argsort(whole, axis=1, kind="stable")[:, :k]
    assert places.tolist() == order.tolist()
    np.testing.assert_allclose(distances, np.take_along_axis(whole, order, axis=1), atol=1e-12)
    np.testing.assert_allclose(nearest, whole.min(axis=0), atol=1e-6)


def test_queries_that_are_all_alike_take_the_best_rows():
    rows = np.linspace(1.0, 0.0, 50, dtype=np.float32)[:, None]
    assert round_robin_nearest(np.ones((7, 1), dtype=np.float32), rows, 40).tolist() == list(range(40))
    assert round_robin_nearest(np.ones((7, 1), dtype=np.float32), rows, 40, lose_turn=True).tolist() == list(range(40))


def test_distances_of_copies_are_zero():
    rows = np.random.default_rng(0).normal(size=(20, 64)).astype(np.float32)
    _, distances, _ = nearest_euclidean(rows[:5], rows, 2)
    assert distances[:, 0].tolist() == [0.0] * 5
    assert (distances[:, 1] > 1).all()
