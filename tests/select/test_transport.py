"""Probabilities of TSDS: the sheet's numbers, and a slow transcription of the algorithm."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflex.select import tsds
from dataflex.select.tsds import epanechnikov, tsds_widened


def tsds_probabilities(distances, neighbours, densities, num_rows, *, alpha, c):
    known = np.asarray(densities, dtype=np.float64)
    distances, neighbours = np.asarray(distances, dtype=float), np.asarray(neighbours)
    return tsds_widened(distances, neighbours, lambda found: known[:, : found.shape[1]], num_rows, alpha=alpha, c=c)


def one_query(distances, densities=None, **options):
    count = len(distances)
    return tsds_probabilities([distances], [range(count)], [densities or [1.0] * count], count, **options)


def test_check_a_one_query_without_density():
    p = one_query([0, 1, 2, 3, 4, 5], alpha=0.5, c=5.0)
    np.testing.assert_allclose(p, [1 / 3, 1 / 3, 1 / 3, 0, 0, 0], atol=1e-15)


def test_check_b_two_duplicates_share_one_place():
    distances = [0, 1, 1, 2, 3, 4]
    p = one_query(distances, [1, 2, 2, 1, 1, 1], alpha=0.5, c=2.0)
    np.testing.assert_allclose(p, [0.5, 0.25, 0.25, 0, 0, 0], atol=1e-15)
    p = one_query(distances, alpha=0.5, c=2.0)
    np.testing.assert_allclose(p, [1 / 3, 1 / 3, 1 / 3, 0, 0, 0], atol=1e-15)


def test_check_c_two_queries_widen_together():
    p = tsds_probabilities(
        [[0, 1, 2, 3], [0, 2, 4, 6]], [[0, 1, 2, 3], [4, 5, 6, 7]], np.ones((2, 4)), 8, alpha=0.5, c=2.0
    )
    np.testing.assert_allclose(p, [0.25, 0.25, 0, 0, 0.25, 0.25, 0, 0], atol=1e-15)


def test_a_query_whose_turn_never_came_keeps_its_share():
    """Its unclamped mass would be 2, and the whole 2.5."""
    found = [[0, 1, 2, 3], [4, 5, 6, 7]]
    p = tsds_probabilities([[0, 9, 9, 9]] * 2, found, [[4, 1, 1, 1], [1, 1, 1, 1]], 8, alpha=0.9, c=0.1)
    np.testing.assert_allclose(p, [0.5, 0, 0, 0, 0.5, 0, 0, 0], atol=1e-15)


def test_rows_shared_by_queries_add_up():
    p = tsds_probabilities([[0, 5], [0, 5]], [[3, 1], [3, 2]], np.ones((2, 2)), 4, alpha=1.0, c=1.0)
    assert p.tolist() == [0.0, 0.0, 0.0, 1.0]
    assert tsds_probabilities([[0.5]], [[0]], [[1.0]], 1, alpha=0.5, c=5.0).tolist() == [1.0]


@pytest.mark.parametrize(("alpha", "support"), [(0.0, 5), (1.0, 1)])
def test_the_ends_of_alpha(alpha, support):
    """0 never stops: all neighbours but the last share evenly, and nothing is left for it; 1 stops at once."""
    p = one_query([0, 1, 2, 3, 4, 5], alpha=alpha, c=5.0)
    assert p[p > 0].tolist() == pytest.approx([1 / support] * support)


def slow(distances, neighbours, densities, num_rows, alpha, c):
    """Section 5 of the sheet, step by step; the smallest count is looked for anew every time."""
    M, K = len(distances), len(distances[0])
    waiting = {j: (1 / densities[j][0], 0) for j in range(M)}
    last, cost, s = [0] * M, [0.0] * M, 0.0
    while waiting:
        s, k, j = min((count, k, j) for j, (count, k) in waiting.items())
        del waiting[j]
        moved = sum(distances[j][i] / densities[j][i] for i in range(k + 1))
        cost[j] = distances[j][k + 1] * s - moved
        if alpha / c * sum(cost) >= (1 - alpha) * M:
            break
        last[j] = k
        if k < K - 2:
            waiting[j] = (s + 1 / densities[j][k + 1], k + 1)
    p = [0.0] * num_rows
    for j in range(M):
        left = 1 / M
        for k in range(last[j] + 1):
            share = min(left, 1 / (M * s * densities[j][k]))
            p[neighbours[j][k]] += share
            left -= share
        p[neighbours[j][last[j] + 1]] += left
    return p


@given(
    table=st.lists(st.lists(st.integers(0, 40), min_size=6, max_size=6), min_size=1, max_size=4),
    densities=st.lists(st.sampled_from([1, 2, 4]), min_size=24, max_size=24),
    alpha=st.sampled_from([0.125, 0.5, 0.75]),
    c=st.sampled_from([0.5, 2.0, 8.0]),
    seed=st.integers(0, 9),
)
@settings(max_examples=200, deadline=None)
def test_the_algorithm_step_by_step(table, densities, alpha, c, seed):
    """Powers of two keep every sum exact, so that both stop at the same place."""
    distances = np.sort(np.array(table) / 8.0, axis=1)
    rng = np.random.default_rng(seed)
    found = np.array([rng.permutation(12)[:6] for _ in table])
    rho = np.array(densities[: distances.size], dtype=float).reshape(distances.shape)
    p = tsds_probabilities(distances, found, rho, 12, alpha=alpha, c=c)
    np.testing.assert_allclose(p, slow(distances, found, rho, 12, alpha, c), atol=1e-12)
    assert abs(p.sum() - 1) < 1e-12


def test_knn_uniform_in_general():
    """K is the first k for which k d_k - sum of d_i below k reaches C (1 - alpha) M / alpha."""
    rng = np.random.default_rng(3)
    for _ in range(20):
        d = np.sort(rng.uniform(0, 3, size=30))
        alpha, c = rng.uniform(0.3, 0.8), rng.uniform(0.5, 3)
        reached = [k for k in range(1, 29) if k * d[k] - d[:k].sum() >= c * (1 - alpha) / alpha]
        expected = np.zeros(30)
        expected[: reached[0]] = 1 / reached[0]
        np.testing.assert_allclose(one_query(d.tolist(), alpha=alpha, c=c), expected, atol=1e-12)


@pytest.mark.parametrize("k", [1, 2, 3, 30])
def test_density_is_the_kernel_over_the_nearest(k, monkeypatch):
    monkeypatch.setattr(tsds, "_CELLS", 50)
    vectors = np.random.default_rng(0).normal(size=(30, 3)).astype(np.float32)
    vectors[7] = vectors[21]
    away = np.linalg.norm(vectors[:, None].astype(float) - vectors[None], axis=2)
    kernel = np.sort(np.maximum(0, 1 - away**2 / 1.2**2), axis=1)[:, ::-1]
    density = epanechnikov(vectors, 1.2, k)
    np.testing.assert_allclose(density, kernel[:, :k].sum(axis=1), rtol=1e-5)
    assert (density >= 1).all()
    assert k == 1 or density[7] > 1.99
