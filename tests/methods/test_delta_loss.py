"""Delta loss: the window's numbers, first losses, edge cases. And two baselines without a model."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dataflex.errors import DataError
from dataflex.selectors.baselines import Longest, RandomBalanced
from dataflex.selectors.losses import DeltaLoss, window
from dataflex.testing import FakeSignals, example_context


def pool_of(count):
    return np.arange(count, dtype=np.int64)


def decide(selector, losses, budget, *, index=0, seed=0, pool=None):
    ctx = example_context({"all": len(losses)}, signals=FakeSignals(losses), seed=seed, index=index)
    return selector.select(pool_of(len(losses)) if pool is None else pool, budget, ctx)


def delta_loss(**params):
    return DeltaLoss(DeltaLoss.Params(**{"updates": 3, "outside_weight": 1e-300, **params}))


def after_first(selector, losses):
    decide(selector, losses, 1)
    return selector


def test_window_toy_of_the_sheet():
    assert [window(100, t, 0.2, 10.0) for t in (0.0, 0.5, 1.0)] == [(0, 20), (40, 60), (79, 99)]
    assert window(4, 0.5, 0.2, 10.0) == (1, 1)
    start, stop = window(100, 0.0, 0.29, 10.0)
    assert stop - start == 29, "whatever the last bit of the product says"


def test_the_window_slides_over_the_ranks_by_fall():
    """With no weight outside, the rows of the window come first; row i falls by (99 - i) / 100."""
    first = np.full(100, 5.0)
    falls = (99 - np.arange(100)) / 100
    selector = after_first(delta_loss(updates=3), first)
    for index, start in ((1, 0), (2, 40), (3, 79)):
        chosen = decide(selector, first - falls, 20, index=index)
        assert sorted(chosen.rows.tolist()) == list(range(start, start + 20))
        assert f"20 of them of ranks {start} to {start + 19}" in chosen.reason
        np.testing.assert_allclose(chosen.scores, falls, atol=1e-6)
    # Past the number of updates given, the window stays at the end.
    assert sorted(decide(selector, first - falls, 20, index=4).rows.tolist()) == list(range(79, 99))


def test_a_single_update_has_the_window_at_its_start():
    selector = after_first(delta_loss(updates=1), np.full(100, 5.0))
    assert "ranks 0 to 19" in decide(selector, np.arange(100) / 25, 20, index=1).reason


def test_weights_inside_and_outside():
    """First draws: 20 rows of weight 1 and 80 of 0.025, so the window has 20 / 22 of them."""
    first, falls = np.full(100, 5.0), np.arange(100) / 100
    hits = 0
    for seed in range(400):
        selector = after_first(DeltaLoss(DeltaLoss.Params(updates=3)), first)
        hits += decide(selector, first - falls, 1, index=1, seed=seed).rows[0] >= 80
    assert abs(hits / 400 - 20 / 22) < 0.05


def test_the_first_decision_is_uniform_and_records():
    selector = DeltaLoss(DeltaLoss.Params(updates=3))
    chosen = decide(selector, np.arange(100.0), 100)
    assert sorted(chosen.rows.tolist()) == list(range(100))
    assert chosen.rows.tolist() != list(range(100))
    assert chosen.scores.tolist() == [0.0] * 100
    assert "first losses" in chosen.reason
    firsts = [decide(DeltaLoss(DeltaLoss.Params(updates=3)), np.arange(4.0), 1, seed=s).rows[0] for s in range(400)]
    np.testing.assert_allclose(np.bincount(firsts, minlength=4) / 400, 0.25, atol=0.08)


def test_the_window_ends_before_the_first_rising_loss():
    first = np.full(10, 5.0)
    falls = np.array([3, 2, 1, 0, -1, -2, -3, -4, -5, -6.0])
    selector = after_first(delta_loss(window_size=0.6), first)
    chosen = decide(selector, first - falls, 4, index=1)
    assert sorted(chosen.rows.tolist()) == [0, 1, 2, 3]
    assert "ranks 0 to 3" in chosen.reason


@pytest.mark.parametrize("falls", [-np.ones(100), np.r_[np.ones(60), -np.ones(40)]])
def test_an_empty_window_draws_uniformly(falls):
    """At the end of the run the window starts at rank 79, past the first rising loss."""
    selector = after_first(delta_loss(updates=2, steepness=100.0), np.full(100, 5.0))
    selector.decisions = 2  # past the end: progress 1
    chosen = decide(selector, np.full(100, 5.0) - falls, 50, index=2)
    assert "drawn uniformly: no row whose loss fell ranks" in chosen.reason
    assert min(np.sum(chosen.rows < 50), np.sum(chosen.rows >= 50)) > 10


def test_relative_falls_divide_by_the_first_loss():
    first, now = np.array([2.0, 1.0, 4.0, 1.0, 1.0]), np.array([1.5, 0.5, 3.0, 1.0, 1.0])
    chosen = decide(after_first(delta_loss(relative=True), first), now, 1, index=1)
    np.testing.assert_allclose(chosen.scores, [0.25, 0.5, 0.25, 0.0, 0.0], atol=1e-6)
    assert chosen.rows.tolist() == [1]


def test_rows_without_a_loss_and_rows_that_join_later():
    first = np.array([math.nan, 3.0, 3.0, 3.0, 3.0, math.inf])
    selector = delta_loss(window_size=0.5)
    assert sorted(decide(selector, first, 6).rows.tolist()) == [1, 2, 3, 4]
    chosen = decide(selector, [2.0, 2.0, 1.0, 2.5, math.nan, 2.0], 6, index=1)
    np.testing.assert_allclose(chosen.scores, [0.0, 1.0, 2.0, 0.5, math.nan, 0.0])
    assert set(chosen.rows[:2].tolist()) == {1, 2}
    assert chosen.reason.endswith("; 1 rows have no finite loss")
    late = delta_loss(window_size=0.5)
    decide(late, np.full(6, 3.0), 1, pool=np.array([0, 2]))
    np.testing.assert_allclose(decide(late, np.full(6, 2.0), 1, index=1, pool=np.array([1, 2])).scores, [0.0, 1.0])


def test_state_holds_the_first_losses():
    first, now = np.linspace(2, 3, 50), np.linspace(3, 1, 50)
    selector = after_first(delta_loss(), first)
    resumed = delta_loss()
    resumed.load_state_dict(selector.state_dict())
    for index in (1, 2):
        straight, again = (decide(one, now, 10, index=index) for one in (selector, resumed))
        assert straight.rows.tolist() == again.rows.tolist()
        assert straight.scores.tolist() == again.scores.tolist()


# ---------------------------------------------------------------- baselines without a model


def test_longest_rows_first_and_ties_by_pool_order():
    ctx = example_context({"a": 2, "b": 3}, lengths=[5, 9, 9, 1, 7])
    chosen = Longest(Longest.Params()).select(np.array([4, 2, 1, 0]), 3, ctx)
    assert chosen.rows.tolist() == [2, 1, 4]
    assert chosen.scores.tolist() == [7.0, 9.0, 9.0, 5.0]
    assert chosen.reason == "3 of 4 rows of at least 7 tokens"
    object.__setattr__(ctx.domains, "lengths", None)
    with pytest.raises(DataError, match="token count"):
        Longest(Longest.Params()).select(pool_of(5), 3, ctx)


@pytest.mark.parametrize(
    ("budget", "counts"), [(9, [2, 3.5, 3.5]), (12, [2, 5, 5]), (30, [2, 10, 18]), (32, [2, 10, 20]), (99, [2, 10, 50])]
)
def test_balanced_draws_give_equal_numbers_as_far_as_rows_last(budget, counts):
    """The third is the water-filling toy of the sheet."""
    ctx = example_context({"a": 2, "b": 10, "c": 50})
    chosen = RandomBalanced(RandomBalanced.Params()).select(pool_of(62), budget, ctx)
    given = np.bincount(ctx.domains.domain_of[chosen.rows], minlength=3)
    assert np.abs(given - counts).max() <= 0.5
    assert len(set(chosen.rows.tolist())) == min(budget, 62)


def test_balanced_draws_are_uniform_within_domains_and_over_the_last_turn():
    firsts, turns = np.zeros(62), np.zeros(3)
    for seed in range(600):
        ctx = example_context({"a": 2, "b": 10, "c": 50}, seed=seed)
        chosen = RandomBalanced(RandomBalanced.Params()).select(pool_of(62), 4, ctx).rows
        firsts[chosen[:3]] += 1
        turns[ctx.domains.domain_of[chosen[3]]] += 1
    np.testing.assert_allclose(firsts[:2] / 600, 1 / 2, atol=0.08)
    np.testing.assert_allclose(firsts[2:12] / 600, 1 / 10, atol=0.05)
    np.testing.assert_allclose(turns / 600, 1 / 3, atol=0.08)
