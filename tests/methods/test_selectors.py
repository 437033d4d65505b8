"""Selectors against oracles, the sheets' numbers and their edge cases."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflex.errors import ComponentError, DataError
from dataflex.selectors.baselines import AllRows, RandomRows
from dataflex.selectors.losses import LossSelector, Tacs, focused, log_weights, relative_gain
from dataflex.signals.kinds import AdaptedLoss, TokenLoss
from dataflex.testing import FakeSignals, example_context
from tests.methods.oracles import oracle_bucket_weights, oracle_relative_gain, oracle_top_rows

FOCI = ("high", "medium", "low")


def pool_of(n, start=0):
    return np.arange(start, start + n, dtype=np.int64)


def context(losses=None, num_rows=64, **options):
    signals = None if losses is None else FakeSignals(losses, **options.pop("signals", {}))
    num_rows = num_rows if losses is None else len(losses)
    return example_context({"one": num_rows}, signals=signals, **options)


def loss_selector(**params):
    return LossSelector(LossSelector.Params(**params))


# ---------------------------------------------------------------- all, random


def test_all_returns_the_pool_in_its_order_whatever_the_budget():
    pool = np.array([5, 3, 9], dtype=np.int64)
    selector = AllRows(AllRows.Params())
    assert not selector.selects_subset
    assert selector.select(pool, 1, context()).rows.tolist() == [5, 3, 9]


def test_random_draws_distinct_rows_and_anew_in_every_interval():
    selector = RandomRows(RandomRows.Params())
    first = selector.select(pool_of(64), 20, context()).rows
    second = selector.select(pool_of(64), 20, context(index=1)).rows
    assert len(set(first.tolist())) == 20
    assert first.tolist() != second.tolist()


def test_random_does_not_depend_on_the_order_of_the_pool():
    selector = RandomRows(RandomRows.Params())
    forward = selector.select(pool_of(64), 20, context()).rows
    backward = selector.select(pool_of(64)[::-1].copy(), 20, context()).rows
    assert forward.tolist() == backward.tolist()


def test_random_reaches_every_row_equally_often():
    selector = RandomRows(RandomRows.Params())
    counts = np.zeros(10)
    for index in range(2000):
        counts[selector.select(pool_of(10), 3, context(num_rows=10, index=index)).rows] += 1
    assert np.abs(counts / 2000 - 0.3).max() < 0.05  # five standard deviations


def test_random_without_replacement_gives_the_whole_pool_when_asked_for_more():
    rows = RandomRows(RandomRows.Params()).select(pool_of(8), 100, context()).rows
    assert sorted(rows.tolist()) == list(range(8))
    assert rows.tolist() != list(range(8))


def test_random_with_replacement_fills_any_budget_uniformly():
    rows = RandomRows(RandomRows.Params(replacement=True)).select(pool_of(4, start=10), 8000, context()).rows
    assert set(rows.tolist()) == {10, 11, 12, 13}
    assert np.abs(np.bincount(rows - 10) / 8000 - 0.25).max() < 0.025
    assert len(RandomRows(RandomRows.Params(replacement=True)).select(pool_of(0), 5, context()).rows) == 0


# ---------------------------------------------------------------- loss


def test_toy_of_the_sheet_weights_one_one_five():
    in_focus = focused(np.array([1.0, 2.0, 3.0]), "high", (0.33, 0.66))
    p = np.exp(log_weights(in_focus, 5.0, 1.0))
    np.testing.assert_allclose(p / p.sum(), [1 / 7, 1 / 7, 5 / 7], rtol=1e-9)
    p = np.exp(log_weights(in_focus, 5.0, float("inf")))
    np.testing.assert_allclose(p / p.sum(), [1 / 3] * 3, rtol=1e-12)


@given(
    st.lists(st.integers(0, 12).map(lambda i: i / 4), min_size=1, max_size=40),
    st.sampled_from(FOCI),
    st.tuples(st.floats(0, 1), st.floats(0, 1)).map(lambda q: tuple(sorted(q))),
)
def test_buckets_equal_the_oracle_ties_included(losses, focus, quantiles):
    weights = np.where(focused(np.array(losses), focus, quantiles), 5.0, 1.0)
    # A quantile that falls on a loss up to rounding may go either way; compare where it is clear of all losses.
    edges = np.quantile(losses, quantiles)
    clear = [all(abs(loss - edge) > 1e-9 or loss == edge for edge in edges) for loss in losses]
    expected = np.array(oracle_bucket_weights(losses, focus, quantiles))
    assert (weights == expected)[clear].all()


def test_every_finite_row_lies_in_exactly_one_bucket():
    losses = np.random.default_rng(0).gamma(2.0, size=101)
    buckets = np.stack([focused(losses, focus, (0.33, 0.66)) for focus in FOCI])
    assert (buckets.sum(axis=0) == 1).all()
    assert buckets.sum(axis=1).tolist() == [34, 33, 34]


@pytest.mark.slow
@pytest.mark.parametrize("replacement", [False, True])
def test_first_draw_follows_the_weights(replacement):
    selector = loss_selector(replacement=replacement)
    counts = np.zeros(3)
    for index in range(4000):
        counts[selector.select(pool_of(3), 1, context([1.0, 2.0, 3.0], index=index)).rows[0]] += 1
    assert np.abs(counts / 4000 - [1 / 7, 1 / 7, 5 / 7]).max() < 0.035  # five standard deviations


@pytest.mark.slow
def test_drawing_without_replacement_equals_sequential_drawing():
    # Enumerate sequential draws of two rows out of weights (1, 1, 5).
    weights = [1.0, 1.0, 5.0]
    expected = {(i, j): weights[i] / 7 * weights[j] / (7 - weights[i]) for i, j in itertools.permutations(range(3), 2)}
    selector, counts = loss_selector(), dict.fromkeys(expected, 0)
    for index in range(4000):
        rows = selector.select(pool_of(3), 2, context([1.0, 2.0, 3.0], index=index)).rows
        counts[tuple(rows.tolist())] += 1
    for pair, probability in expected.items():
        assert abs(counts[pair] / 4000 - probability) < 0.04, pair


def test_scores_are_the_losses_and_rows_without_one_are_never_drawn():
    losses = np.array([np.nan, 2.0, np.inf, 1.0, -np.inf, 3.0])
    selection = loss_selector().select(pool_of(6), 6, context(losses))
    assert sorted(selection.rows.tolist()) == [1, 3, 5]
    np.testing.assert_array_equal(selection.scores, np.float32([np.nan, 2, np.nan, 1, np.nan, 3]))
    assert "3 rows have no finite loss" in selection.reason


def test_rows_outside_the_pool_are_neither_asked_about_nor_drawn():
    ctx = context(np.arange(1.0, 21.0))
    pool = np.array([3, 17, 8, 12], dtype=np.int64)
    selection = loss_selector().select(pool, 3, ctx)
    assert ctx.signals.calls[0].rows.tolist() == pool.tolist()
    assert set(selection.rows.tolist()) <= set(pool.tolist())
    assert selection.scores.tolist() == [4.0, 18.0, 9.0, 13.0]


@pytest.mark.slow
@pytest.mark.parametrize("focus", FOCI)
def test_equal_losses_draw_uniformly(focus):
    selector, counts = loss_selector(focus=focus), np.zeros(4)
    for index in range(2000):
        counts[selector.select(pool_of(4), 1, context([2.0] * 4, index=index)).rows] += 1
    assert np.abs(counts / 2000 - 0.25).max() < 0.05


def test_an_empty_bucket_is_told():
    selection = loss_selector(focus="high").select(pool_of(4), 2, context([2.0] * 4))
    assert "no row is of high loss (ties), so the draw was uniform" in selection.reason


def test_no_finite_loss_at_all_is_an_error_of_the_data():
    with pytest.raises(DataError, match=r"all 4 rows have no finite loss \(are their labels all masked\?\)"):
        loss_selector().select(pool_of(4), 2, context([np.nan] * 4))


def test_losses_of_another_length_are_refused():
    short = {TokenLoss: lambda _, rows, __: np.ones(len(rows) - 1)}
    ctx = example_context({"one": 4}, signals=FakeSignals(np.ones(4), values=short))
    with pytest.raises(ComponentError, match="asked for the scores of 4 rows"):
        loss_selector().select(pool_of(4), 2, ctx)


def test_a_focus_weight_of_zero_draws_the_others_first():
    selection = loss_selector(focus_weight=0.0).select(pool_of(9), 6, context(np.arange(1.0, 10.0)))
    assert set(selection.rows.tolist()).isdisjoint(np.flatnonzero(focused(np.arange(9.0), "high", (0.33, 0.66))))


@pytest.mark.parametrize("quantiles", [(0.6, 0.3), (-0.1, 0.5), (0.5, 1.5), (0.5, float("nan"))])
def test_quantiles_must_rise_from_0_to_1(quantiles):
    with pytest.raises(ValueError, match="quantiles"):
        LossSelector.Params(quantiles=quantiles)


# ---------------------------------------------------------------- tacs


def tacs(losses, adapted, budget, targets=None, **params):
    names = targets or tuple(adapted)
    given = {AdaptedLoss: lambda signal, rows, target: np.asarray(adapted[signal.towards])[rows]}
    ctx = context(losses, targets=names, signals={"values": given})
    return Tacs(Tacs.Params(**params)).select(pool_of(len(losses)), budget, ctx), ctx


def test_toy_of_the_sheet_a_fall_from_2_to_1_5_scores_a_quarter():
    selection, _ = tacs([2.0], {"t": [1.5]}, 1)
    assert selection.scores[0] == pytest.approx(0.25, abs=1e-8)


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.floats(0, 8, width=32), st.floats(0, 8, width=32)), min_size=1, max_size=20),
    st.integers(0, 25),
)
def test_scores_and_choice_equal_the_oracle(pairs, budget):
    start, adapted = (list(column) for column in zip(*pairs, strict=True))
    selection, _ = tacs(start, {"t": adapted}, budget)
    expected = [oracle_relative_gain(a, b) for a, b in pairs]
    np.testing.assert_allclose(selection.scores, expected, rtol=1e-9, atol=1e-12)
    assert selection.rows.tolist() == oracle_top_rows(selection.scores.tolist(), budget)


def test_the_floor_keeps_known_rows_from_winning():
    losses, adapted = [0.001, 2.0], [0.0005, 1.5]
    assert tacs(losses, {"t": adapted}, 1)[0].rows.tolist() == [1]
    assert tacs(losses, {"t": adapted}, 1, floor=0.0)[0].rows.tolist() == [0]


def test_a_row_counts_for_its_best_target():
    selection, ctx = tacs([2.0, 2.0, 2.0], {"a": [1.0, 2.0, 1.9], "b": [2.0, 1.5, 1.9]}, 2)
    np.testing.assert_allclose(selection.scores, [0.5, 0.25, 0.05], atol=1e-6)
    assert selection.rows.tolist() == [0, 1]
    assert [call.options.get("towards") for call in ctx.signals.calls] == [None, "a", "b"]


def test_equal_scores_keep_the_order_of_the_pool():
    assert tacs([2.0] * 5, {"t": [1.0] * 5}, 3)[0].rows.tolist() == [0, 1, 2]


def test_rows_without_a_loss_are_never_kept():
    selection, _ = tacs([np.nan, 2.0, 2.0, np.inf], {"t": [1.0, np.nan, 1.9, 1.0]}, 4)
    assert selection.rows.tolist() == [2]
    assert np.isnan(selection.scores[[0, 1, 3]]).all()
    assert "3 rows have no finite loss" in selection.reason


def test_a_diverged_probe_is_told():
    with pytest.raises(ComponentError, match=r"probe trained towards 't' gives no finite loss. Lower learning_rate"):
        tacs([1.0, 2.0], {"t": [np.nan, np.nan]}, 1)


def test_the_probe_gets_the_parameters():
    _, ctx = tacs([1.0], {"t": [0.5]}, 1, depth_steps=7, learning_rate=0.5, rank=3, alpha=2.0)
    asked = AdaptedLoss(towards="t", depth_steps=7, learning_rate=0.5, rank=3, alpha=2.0)
    assert ctx.signals.calls[1].asked == asked


def test_relative_gain_is_nan_where_a_loss_is_not_finite():
    gain = relative_gain(np.array([np.nan, 1.0, np.inf]), np.array([1.0, -np.inf, np.inf]), 0.05)
    assert np.isnan(gain).all()
