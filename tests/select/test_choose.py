"""Subset rules against sorted lists and the loops of the papers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dataflex.errors import ComponentError
from dataflex.plan.proportions import largest_remainder
from dataflex.rng import uniforms
from dataflex.select.choose import gumbel_top_k, round_robin, top_k, worn

# Few distinct values, so that ties, NaN and infinities are common.
SCORE = st.sampled_from([0.0, -0.0, 1.0, 1.5, -2.0, float("nan"), float("-inf"), float("inf"), 1e-300])


def slow_top_k(scores, k):
    eligible = [i for i, s in enumerate(scores) if s == s and s != float("-inf")]
    return sorted(eligible, key=lambda i: (-scores[i], i))[:k]


@pytest.mark.slow
@given(st.lists(SCORE, max_size=30), st.integers(0, 35), st.sampled_from([np.float32, np.float64]))
def test_top_k_equals_sorting_a_list(scores, k, dtype):
    found = top_k(np.array(scores, dtype=dtype), k)
    assert found.dtype == np.int64
    assert found.tolist() == slow_top_k(np.array(scores, dtype=dtype).tolist(), k)


def test_top_k_of_whole_numbers_and_flags():
    assert top_k(np.array([3, 9, 9, 1]), 3).tolist() == [1, 2, 0]
    assert top_k([False, True], 1).tolist() == [1]


def test_top_k_leaves_its_argument_alone():
    scores = np.array([1.0, np.nan, 3.0])
    top_k(scores, 2)
    assert np.array_equal(scores, [1.0, np.nan, 3.0], equal_nan=True)


def test_top_k_of_many_with_many_ties():
    scores = np.random.default_rng(0).integers(0, 1000, 500_000).astype(np.float64)
    assert top_k(scores, 5000).tolist() == np.argsort(-scores, kind="stable")[:5000].tolist()


@pytest.mark.slow
def test_gumbel_inclusion_probabilities():
    # Two of three with p = (.5, .3, .2): closed form of sequential draws without replacement.
    p = np.array([0.5, 0.3, 0.2])
    draws = 40_000
    noise = uniforms(0, "test", 0, np.arange(3 * draws)).reshape(draws, 3)
    included = np.zeros(3)
    for row in noise:
        included[gumbel_top_k(np.log(p), 2, row)] += 1
    assert included / draws == pytest.approx([0.8393, 0.6750, 0.4857], abs=0.01)


@pytest.mark.slow
def test_gumbel_first_pick_follows_the_weights():
    p = np.array([0.5, 0.3, 0.2])
    noise = uniforms(1, "test", 0, np.arange(60_000)).reshape(-1, 3)
    first = [int(gumbel_top_k(np.log(p) + 123.0, 1, row)[0]) for row in noise]
    assert np.bincount(first) / len(first) == pytest.approx(p, abs=0.015)


@given(st.integers(1, 20), st.integers(0, 2**31), st.data())
def test_gumbel_equals_the_formula(n, seed, data):
    weights = data.draw(arrays(np.float64, n, elements=st.sampled_from([0.0, 0.5, 1.0, 30.0])))
    u = uniforms(seed, "g", 0, np.arange(n))
    k = data.draw(st.integers(0, n))
    with np.errstate(divide="ignore"):
        log_w = np.log(weights)
    found = gumbel_top_k(log_w, k, u).tolist()
    assert found == slow_top_k([float(w - np.log(-np.log(x))) for w, x in zip(log_w, u, strict=True)], k)
    assert len(found) == min(k, int((weights > 0).sum()))
    assert all(weights[i] > 0 for i in found)


def test_gumbel_survives_extreme_uniforms():
    assert gumbel_top_k(np.zeros(3), 3, np.array([0.0, 1.0, 0.5])).tolist() == [1, 2, 0]
    assert gumbel_top_k([0.0, float("nan"), float("-inf")], 2, np.full(3, 0.5)).tolist() == [0]


def test_a_shard_draws_what_the_whole_draws():
    # Keys depend on the row id only: the best of two halves contain the best of the whole.
    ids = np.arange(1000)
    weights = np.log(np.random.default_rng(0).random(1000))
    whole = gumbel_top_k(weights, 50, uniforms(5, "g", 2, ids))
    halves = [ids[ids % 2 == r] for r in (0, 1)]
    best = [half[gumbel_top_k(weights[half], 50, uniforms(5, "g", 2, half))] for half in halves]
    assert set(whole.tolist()) <= set(np.concatenate(best).tolist())


def slow_round_robin(scores, k, order):
    """The loop of the sheet with whole sorted lists."""
    lists = [slow_top_k(scores[j], len(scores[j])) for j in order]
    taken, chosen = set(), []
    progress = True
    while progress and len(chosen) < k:
        progress = False
        for best in lists:
            while best and best[0] in taken:
                best.pop(0)
            if best and len(chosen) < k:
                taken.add(best[0])
                chosen.append(best.pop(0))
                progress = True
    return chosen


@given(st.integers(1, 5), st.integers(0, 25), st.integers(0, 30), st.data())
def test_round_robin_equals_the_loop(num_queries, num_rows, k, data):
    scores = data.draw(arrays(np.float64, (num_queries, num_rows), elements=SCORE))
    order = data.draw(st.permutations(range(num_queries)))
    found = round_robin(scores[list(order)], k)
    assert found.tolist() == slow_round_robin(scores.tolist(), k, order)
    assert len(set(found.tolist())) == found.size
    eligible = int((scores > -np.inf).any(axis=0).sum())  # NaN compares as False
    assert found.size == min(k, eligible)
    if num_queries == 1:
        assert found.tolist() == top_k(scores[0], k).tolist()


def test_round_robin_toy():
    scores = np.array([[0.9, 0.8, 0.1], [0.95, 0.2, 0.3]])
    assert round_robin(scores, 2).tolist() == [0, 2]
    assert round_robin(scores[::-1], 2).tolist() == [0, 1]
    assert set(top_k(scores.mean(axis=0), 2).tolist()) == {0, 1}
    assert set(top_k(scores.max(axis=0), 2).tolist()) == {0, 1}


def test_round_robin_extends_its_lists():
    # All queries want the same rows in the same order, so every query runs far past its first list.
    scores = np.tile(np.arange(3000.0), (50, 1))
    assert round_robin(scores, 2500).tolist() == top_k(scores[0], 2500).tolist()


@given(st.integers(0, 5000), st.lists(st.integers(0, 50), min_size=1, max_size=12).filter(any))
def test_largest_remainder(total, shares):
    found = largest_remainder(total, shares)
    assert found.sum() == total
    exact = np.array(shares) / sum(shares) * total
    assert (np.abs(found - exact) < 1 + 1e-9).all()
    assert all(count == 0 for count, share in zip(found, shares, strict=True) if share == 0)
    # Hamilton: nobody who was rounded down lost a larger fraction than somebody who was rounded up.
    fractions = exact - np.floor(exact + 1e-9)
    up = found > np.floor(exact + 1e-9)
    if up.any() and (~up).any():
        assert fractions[up].min() >= fractions[~up].max() - 1e-6


def test_largest_remainder_ties_by_index():
    assert largest_remainder(2, [1, 1, 1]).tolist() == [1, 1, 0]
    assert largest_remainder(5, [0.5, 0.5]).tolist() == [3, 2]
    assert largest_remainder(0, [0.5, 0.5]).tolist() == [0, 0]


def test_largest_remainder_keeps_a_share_of_zero_at_zero_whatever_rounding_does():
    # The sum is 1 up to rounding, every exact share a whole number, and one is missing.
    assert largest_remainder(2**41, [0.0, 1 - 2.0**-41]).tolist() == [0, 2**41]


@pytest.mark.parametrize("shares", [[0.0, 0.0], [-1.0, 2.0], [float("nan"), 1.0], [float("inf"), 1.0]])
def test_largest_remainder_refuses(shares):
    with pytest.raises(ComponentError, match="finite, >= 0 and not all 0"):
        largest_remainder(3, shares)


def test_a_lead_counts_less_each_time_that_a_row_was_served():
    """Mean 5: leads 5, 3, 1 and what is below; served 2, 1 and 3 times they are 2.5, 2.4 and 4/13."""
    scores = np.array([10.0, np.nan, 8.0, 6.0, 0.0, 1.0])
    found = worn(scores, np.array([2, 5, 1, 3, 4, 4]))
    np.testing.assert_allclose(found, [7.5, np.nan, 7.4, 5 + 4 / 13, 0.0, 1.0], rtol=1e-12)
    assert top_k(worn(scores, np.array([3, 0, 1, 0, 0, 0])), 2).tolist() == [2, 0]
    assert top_k(worn(scores, np.array([4, 0, 1, 0, 0, 0])), 1).tolist() == [2]
    assert top_k(worn(scores, np.array([9, 0, 9, 0, 0, 0])), 2).tolist() == [3, 0]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_worn_scores_keep_their_type_and_rows_that_lead_go_on_leading(dtype):
    scores = np.array([3.0, -1.0, np.inf, -np.inf, np.nan, -2.0], dtype=dtype)
    found = worn(scores, np.full(6, 60_000, dtype=np.uint16))
    assert found.dtype == dtype
    np.testing.assert_array_equal(found[1:], scores[1:])
    assert 0 < found[0] < 1e-8  # the mean of what is finite is 0
    nothing = np.full(3, np.nan, dtype=dtype)
    np.testing.assert_array_equal(worn(nothing, np.arange(3)), nothing)
