"""InfoBatch against a slow transcription: who is left out, what the others weigh, and when all rows are served."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dataflex.errors import ComponentError
from dataflex.method import Selection
from dataflex.selectors.infobatch import InfoBatch
from dataflex.signals.kinds import InRun
from dataflex.testing import FakeSignals, example_context
from dataflex.validate import check_selection


def selected(losses, budget=None, *, seed=0, stop=10, steps=100, **params):
    """Select of rows that were last served with these losses; NaN for those that never were."""
    losses = np.asarray(losses, dtype=np.float64)
    shown = np.column_stack([losses, np.where(np.isnan(losses), np.nan, 3.0)])
    signals = FakeSignals(np.ones(len(losses)), values={InRun: shown})
    ctx = example_context(
        {"a": len(losses)}, signals=signals, seed=seed, stop_step=stop, total_sequences=4 * steps, global_batch=4
    )
    selector = InfoBatch(InfoBatch.Params(**params))
    pool = np.arange(len(losses))
    found = selector.select(pool, len(losses) if budget is None else budget, ctx)
    check_selection(selector, found, pool, len(losses) if budget is None else budget)
    return found


def by_row(found):
    weights = np.ones(len(found.rows)) if found.weights is None else found.weights
    return dict(zip(found.rows.tolist(), weights.tolist(), strict=True))


@pytest.mark.parametrize(
    ("well", "ratio", "kept", "weight"), [(3, 0.5, 1, 3.0), (7, 0.3, 4, 1.75), (5, 0.5, 2, 2.5), (10, 0.3, 7, 10 / 7)]
)
def test_how_many_are_kept_and_what_they_weigh(well, ratio, kept, weight):
    """Fixed numbers; the authors' weight 1 / (1 - r) would be 2, 1.428571, 2 and 1.428571."""
    others = 4
    losses = [1.0] * well + [9.0] * others
    found = by_row(selected(losses, kept + others, prune_ratio=ratio))
    assert sorted(row for row in found if row >= well) == list(range(well, well + others))
    assert [found[row] for row in found if row < well] == pytest.approx([weight] * kept)
    assert math.fsum(found.values()) == pytest.approx(well + others)


def test_rows_strictly_below_the_mean_are_known_well():
    found = [by_row(selected([1.0, 2.0, 3.0, 6.0], 3, seed=seed)) for seed in range(20)]
    assert {tuple(sorted(each)) for each in found} == {(0, 2, 3), (1, 2, 3)}
    assert all(each[row] == (2.0 if row < 2 else 1.0) for each in found for row in each)


def test_rows_that_were_never_served_are_kept_and_do_not_move_the_mean():
    nan = math.nan
    found = by_row(selected([1.0, nan, 3.0, nan, nan, 1.5], 5))
    assert set(found) >= {1, 2, 3, 4}
    assert sum(row in found for row in (0, 5)) == 1
    assert {found[row] for row in (1, 2, 3, 4)} == {1.0}
    assert set(by_row(selected([nan] * 6, 4)).values()) == {1.0}


def slow(losses, budget, ratio):
    """Return how many rows of each kind are served at most, and the weight of those below the mean."""
    known = [loss for loss in losses if not math.isnan(loss)]
    mean = sum(known) / len(known)
    well = [row for row, loss in enumerate(losses) if loss < mean]
    kept = int(round((1 - ratio) * 1000) * len(well) // 1000)
    while kept == 0 or len(losses) - len(well) + kept < budget:  # the interval must be full, and none is lost
        kept += 1
    return set(well), kept, len(well) / kept


@pytest.mark.parametrize("seed", range(8))
def test_selections_against_a_slow_transcription(seed):
    rng = np.random.default_rng(seed)
    losses = rng.gamma(2.0, size=60)
    losses[rng.random(60) < 0.2] = math.nan
    for budget, ratio in ((20, 0.5), (45, 0.5), (59, 0.5), (60, 0.9), (40, 0.25)):
        found = by_row(selected(losses, budget, seed=seed, prune_ratio=ratio))
        well, kept, weight = slow(losses.tolist(), budget, ratio)
        assert len(found) == budget
        assert sum(row in well for row in found) <= kept
        assert all(found[row] == pytest.approx(weight if row in well else 1.0) for row in found)
        if budget == 60 - len(well) + kept:
            assert math.fsum(found.values()) == pytest.approx(60)


def test_every_row_counts_alike_in_expectation():
    losses, budget, draws = np.array([1.0, 1.0, 1.0, 1.0, 1.0, 8.0, 8.0, 8.0]), 4, 4000
    total = np.zeros(8)
    for seed in range(draws):
        found = selected(losses, budget, seed=seed)
        total[found.rows] += found.weights
    # 2 of 5 and 3 others make 5 rows, of which 4 are drawn: each row counts 4 / 5 in the mean.
    deviation = math.sqrt(0.8 * 2.5 / draws)
    assert np.abs(total / draws - 0.8).max() < 5 * deviation


@pytest.mark.parametrize(("epochs", "full"), [(10, [8, 9]), (8, [7]), (3, [2])])
def test_the_last_epochs_serve_every_row(epochs, full):
    """An interval is an epoch here, counted from 0."""
    losses, length = [1.0] * 6 + [9.0] * 4, 25
    found = [
        epoch
        for epoch in range(epochs)
        if selected(losses, 6, stop=(epoch + 1) * length, steps=epochs * length).weights is None
    ]
    assert found == full


def test_weights_are_checked():
    selector, pool = InfoBatch(InfoBatch.Params()), np.arange(4)
    ours = {"rows": np.array([0, 1, 0])}
    for weights, told in (
        ([1.0, 2.0], "gave 2 weights for 3 rows"),
        ([1.0, -1.0, 1.0], "negative or non-finite weights, such as -1"),
        ([1.0, 2.0, 3.0], "a row that is there twice two weights"),
    ):
        with pytest.raises(ComponentError, match=told):
            check_selection(selector, Selection(**ours, weights=np.array(weights)), pool, 4)
    check_selection(selector, Selection(**ours, weights=np.array([1.0, 2.0, 1.0])), pool, 4)
